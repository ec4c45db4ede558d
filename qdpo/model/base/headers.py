"""The headers of safetensors files: read without the weights, and held to the format before any library maps the file.

Format: 8 bytes with the length of the header, little-endian; the header, a JSON object from names to dtype, shape and
offsets; then the tensors' bytes, without a gap.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from qdpo.errors import ConfigError

BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
LONGEST = 32 * 2**20  # bytes of a header; one with 100,000 tensors takes 12 MiB
MOST_DIMENSIONS = 8
AGAIN = "Copy or download it again."


@dataclass(frozen=True)
class HeaderEntry:
    """A tensor of a safetensors file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    """Place of its bytes after the header."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> list[HeaderEntry]:
    """The tensors of a file, in the order of their bytes. Raises: ConfigError unless the header is well-formed."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            _refuse(path, f"it has {size:,} bytes, and its header would take {length:,}: it is truncated or damaged")
        if length > LONGEST:
            _refuse(path, f"its header takes {length:,} bytes, more than {LONGEST:,}")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=keys_once)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is not JSON ({type(error).__name__}: {str(error)[:100]})")
    if not isinstance(header, dict):
        _refuse(path, "its header is not a JSON object")
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        _refuse(path, "__metadata__ in its header is not an object of texts")
    found = sorted((_stored(path, name, entry) for name, entry in header.items()), key=lambda item: item.start)
    at = 0
    for tensor in sorted(found, key=lambda item: (item.start, item.end)):
        if tensor.start != at:
            _refuse(path, f"the bytes of {tensor.name!r} begin at {tensor.start:,} instead of {at:,}")
        at = tensor.end
    if at != size - 8 - length:
        _refuse(path, f"its tensors take {at:,} bytes, but {size - 8 - length:,} follow its header: it is truncated")
    return found


def _stored(path: Path, name: str, entry: Any) -> HeaderEntry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"{name!r} in its header is not an object with dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        _refuse(path, f"{name!r} has the dtype {dtype!r:.40}, which is none of safetensors")
    if not _naturals(shape) or len(shape) > MOST_DIMENSIONS:
        _refuse(path, f"{name!r} has the shape {shape!r:.60}")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _refuse(path, f"{name!r} has the data_offsets {offsets!r:.60}")
    if math.prod(shape) * BITS[dtype] != (offsets[1] - offsets[0]) * 8:
        _refuse(path, f"{name!r} of shape {shape} and dtype {dtype} does not take {offsets[1] - offsets[0]:,} bytes")
    return HeaderEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**53 for item in value)


def keys_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For JSON's `object_pairs_hook`: the object. Raises: ValueError for a key that is there twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def _refuse(path: Path, what: str) -> NoReturn:
    raise ConfigError(f"{path} (from model.path) is not a sound safetensors file: {what}. {AGAIN}")


def tensors_of(folder: Path, files: list[str]) -> dict[str, HeaderEntry]:
    """The tensors of several files of a folder. Raises: ConfigError if one is damaged, or two hold one name."""
    found: dict[str, HeaderEntry] = {}
    home: dict[str, str] = {}
    for file, tensor in _each(folder, files):
        if tensor.name in found:
            raise ConfigError(
                f"{folder} (from model.path): {home[tensor.name]} and {file} both hold the tensor {tensor.name!r}, so "
                f"which is meant is unknown. {AGAIN}"
            )
        found[tensor.name], home[tensor.name] = tensor, file
    if not found:
        raise ConfigError(f"{folder} (from model.path): {', '.join(files)} holds no tensor. {AGAIN}")
    return found


def _each(folder: Path, files: list[str]) -> Iterator[tuple[str, HeaderEntry]]:
    for file in files:
        for tensor in read_header(folder / file):
            yield file, tensor
