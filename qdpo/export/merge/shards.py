"""Reads and writes safetensors files one tensor, or one piece of a tensor, at a time.

A file is its header's length (8 bytes, little-endian), the header as JSON with each tensor's type, shape and offsets,
and the tensors' bytes one after another, so the header can be written before any tensor is known.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
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
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TYPES.items()}
# transformers' default size limit for a file.
SHARD_BYTES = 5 * 10**9
PIECE_BYTES = 2**24


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Stored(PlannedTensor):
    """A tensor in a file: its bytes begin at `start`."""

    path: Path
    start: int

    def pieces(self) -> Iterator[Tensor]:
        """The whole tensor, flat, in pieces of 16 MiB."""
        step = PIECE_BYTES // self.dtype.itemsize
        total = prod(self.shape)
        for first in range(0, total, step):
            yield self._read(first, min(step, total - first))

    def whole(self) -> Tensor:
        return self._read(0, prod(self.shape)).view(self.shape)

    def _read(self, first: int, count: int) -> Tensor:
        """Reads instead of mapping: mapped pages would count as this process's memory."""
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


def write_shards(
    folder: Path, planned: Sequence[PlannedTensor], produce: Callable[[PlannedTensor], Iterable[Tensor]]
) -> list[str]:
    """Writes the tensors to files of up to 5 GB, with an index if there are several; returns the files' names.

    `produce` gives a tensor's values in order, in pieces of any shape; only one piece is held at a time.
    """
    shards = _split(planned)
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(tensor.bytes for tensor in planned)},
            "weight_map": {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(shard))
            for tensor in shard:
                written = 0
                for piece in produce(tensor):
                    assert piece.dtype == tensor.dtype
                    written += file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                assert written == tensor.bytes, f"{tensor.name}: {written} bytes of {tensor.bytes}"
    return names


def _split(planned: Sequence[PlannedTensor]) -> list[list[PlannedTensor]]:
    shards: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    return shards


def _header(shard: Sequence[PlannedTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in shard:
        place = [start, start + tensor.bytes]
        entries[tensor.name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place}
        start += tensor.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text
