"""Finds weights that are NaN or infinite: in a loaded model, or in its files where loading would hide them."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdpo.errors import ConfigError
from qdpo.model.base.headers import HeaderEntry, read_header
from qdpo.model.base.quant import stored_tensors

PIECE = 2**24  # bytes in memory at a time and thread
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
READERS = 4


def check_finite(model: Any, folder: Path) -> None:
    """One pass over the loaded weights, without a copy. Raises: ConfigError that names the first that is not finite."""
    buffers = {name for name, _ in model.named_buffers()}  # not weights: a mask may well hold -inf
    for name, tensor in stored_tensors(model):
        if name not in buffers and tensor.dtype in TYPES.values() and tensor.numel() and not is_finite(tensor):
            raise _not_finite(folder, name)


def check_files_finite(folder: Path, files: list[str]) -> None:
    """One pass over the files, in small pieces. Raises: ConfigError that names the first tensor that is not finite.

    For weights that are quantised on a GPU: there the largest value of a block is found by a maximum that passes over
    NaN, and the layer looks sound.
    """
    with ThreadPoolExecutor(READERS) as pool:
        for file in files:
            path = folder / file
            tensors = [tensor for tensor in read_header(path) if tensor.dtype in TYPES]
            for tensor, finite in zip(tensors, pool.map(partial(_is_stored_finite, path), tensors), strict=True):
                if not finite:
                    raise _not_finite(path, tensor.name)


def _is_stored_finite(path: Path, tensor: HeaderEntry) -> bool:
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little") + tensor.start)
        left = tensor.end - tensor.start
        while left:
            piece = torch.frombuffer(bytearray(file.read(min(left, PIECE))), dtype=TYPES[tensor.dtype])
            left -= piece.nbytes
            if not is_finite(piece):
                return False
    return True


def is_finite(tensor: Tensor) -> bool:
    """True if no element is NaN or infinite, found without a copy."""
    low, high = torch.aminmax(tensor)  # NaN where any element is NaN
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _not_finite(where: Path, name: str) -> ConfigError:
    return ConfigError(
        f"{where} (from model.path): the weight {name!r} holds NaN or infinite values, so nothing can be calculated "
        "with this model. Copy or download it again."
    )
