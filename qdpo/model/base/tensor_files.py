"""Reads the tensors of a model folder's safetensors files one, or one piece, at a time."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdpo.errors import ConfigError
from qdpo.model.base.folder import WEIGHTS, WEIGHTS_INDEX, leaves_folder, read_json

TYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "U8": torch.uint8,
    "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TYPES.items()}
PIECE_BYTES = 2**24


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its bytes begin at `start`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    start: int

    @property
    def bytes(self) -> int:
        """Size in its file."""
        return prod(self.shape) * self.dtype.itemsize

    def pieces(self) -> Iterator[Tensor]:
        """The whole tensor, flat, in pieces of 16 MiB."""
        step = PIECE_BYTES // self.dtype.itemsize
        total = prod(self.shape)
        for first in range(0, total, step):
            yield self.part(first, min(step, total - first))

    def whole(self) -> Tensor:
        return self.part(0, prod(self.shape)).view(self.shape)

    def matrix(self, number: int) -> Tensor:
        """One of the matrices of a stack, by its number."""
        size = prod(self.shape[1:])
        return self.part(number * size, size).view(self.shape[1:])

    def part(self, first: int, count: int) -> Tensor:
        """`count` elements from the one numbered `first`, flat.

        Reads instead of mapping: mapped pages would count as this process's memory.
        """
        size = count * self.dtype.itemsize
        raw = np.fromfile(self.path, dtype=np.uint8, count=size, offset=self.start + first * self.dtype.itemsize)
        if len(raw) != size:
            raise ConfigError(f"{self.path} ends inside {self.name}. Copy or download the model again.")
        return torch.from_numpy(raw).view(self.dtype)


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a model folder by name, in the files' order.

    Raises: ConfigError for a file that is missing, truncated or outside the folder, or for an unknown type.
    """
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file():
        names = sorted({str(name) for name in read_json(folder / WEIGHTS_INDEX)["weight_map"].values()})
    found: dict[str, Stored] = {}
    for name in names:
        if leaves_folder(name):
            raise ConfigError(f"{folder / WEIGHTS_INDEX} points outside its folder, to {name!r}. Do not use it.")
        found |= {stored.name: stored for stored in stored_in(folder / name)}
    return found


def stored_in(path: Path) -> list[Stored]:
    """The tensors of one file, in its order. Raises: ConfigError."""
    if not path.is_file():
        raise ConfigError(f"There is no file {path}, which the model needs. Copy or download the model again.")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its header would be longer than the file")
            header: dict[str, Any] = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return [
            Stored(name, TYPES[entry["dtype"]], tuple(entry["shape"]), path, 8 + length + entry["data_offsets"][0])
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a safetensors file that can be merged ({type(error).__name__}: {error}). Copy or download "
            "the model again."
        ) from error
