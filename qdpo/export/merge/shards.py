"""Writes safetensors files one tensor, or one piece of a tensor, at a time.

A file is its header's length (8 bytes, little-endian), the header as JSON with each tensor's type, shape and offsets,
and the tensors' bytes one after another, so the header can be written before any tensor is known.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdpo.model.base.folder import WEIGHTS, WEIGHTS_INDEX
from qdpo.model.base.tensor_files import NAMES

# transformers' default size limit for a file.
SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


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
