"""Walks through the header of a GGUF file before any library reads it: counts, lengths and types within the file.

Format (versions 2 and 3): magic, version, number of tensors, number of keys; the keys, each a name, a type and a value;
the tensors, each a name, dimensions, a type and the place of its bytes. All numbers are little-endian.
"""

import struct
from pathlib import Path
from typing import BinaryIO, NoReturn

from qdpo.errors import ConfigError

SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a value: bytes that it takes."""
TEXT, ARRAY = 8, 9
LEAST_KEY, LEAST_TENSOR = 13, 24
"""Bytes of the shortest entry."""
LONGEST_NAME = 2**16
MOST_ITEMS = 2**22
MOST_DIMENSIONS = 4
MOST_TENSOR_TYPES = 256


def check_gguf_header(path: Path) -> None:
    """Raises: ConfigError for a header that does not fit its file."""
    with path.open("rb") as file:
        walk = _Walk(path, file, path.stat().st_size)
        walk.skip(4)
        version = walk.number(4)
        if version not in (2, 3):
            walk.refuse(f"its version is {version}; 2 and 3 are known")
        tensors, keys = walk.number(8), walk.number(8)
        if tensors * LEAST_TENSOR + keys * LEAST_KEY > walk.size:
            walk.refuse(f"it declares {tensors:,} tensors and {keys:,} keys in {walk.size:,} bytes")
        for _ in range(keys):
            name = walk.text(LONGEST_NAME)
            walk.value(walk.number(4), name, 0)
        for _ in range(tensors):
            name = walk.text(LONGEST_NAME)
            dimensions = walk.number(4)
            if dimensions > MOST_DIMENSIONS:
                walk.refuse(f"the tensor {name!r:.60} has {dimensions:,} dimensions")
            elements = 1
            for _ in range(dimensions):
                elements *= walk.number(8)
            kind, place = walk.number(4), walk.number(8)
            # A tensor takes at least one bit an element in every type.
            if kind >= MOST_TENSOR_TYPES or place > walk.size or elements > 8 * walk.size:
                walk.refuse(f"the tensor {name!r:.60} of type {kind}, {elements:,} elements, is outside the file")


class _Walk:
    def __init__(self, path: Path, file: BinaryIO, size: int):
        self._path, self._file, self.size = path, file, size

    def number(self, width: int) -> int:
        """An unsigned number of 4 or 8 bytes."""
        content = self._file.read(width)
        if len(content) < width:
            self.refuse(f"it ends after {self.size:,} bytes, within its header")
        return int(struct.unpack("<I" if width == 4 else "<Q", content)[0])

    def text(self, longest: int) -> str:
        length = self.number(8)
        if length > longest:
            self.refuse(f"a name in it would take {length:,} bytes")
        return self._file.read(length).decode("utf-8", "replace")

    def skip(self, length: int) -> None:
        if length > self.size - self._file.tell():
            self.refuse(f"it ends after {self.size:,} bytes, within its header")
        self._file.seek(length, 1)

    def value(self, kind: int, name: str, depth: int) -> None:
        if kind in SCALARS:
            self.skip(SCALARS[kind])
        elif kind == TEXT:
            self.skip(self.number(8))
        elif kind == ARRAY and depth < 2:
            inner, count = self.number(4), self.number(8)
            if count > MOST_ITEMS:
                self.refuse(f"the key {name!r:.60} has {count:,} items")
            if inner in SCALARS:
                self.skip(SCALARS[inner] * count)
            else:
                for _ in range(count):
                    self.value(inner, name, depth + 1)
        else:
            self.refuse(f"the key {name!r:.60} has a value of type {kind}")

    def refuse(self, what: str) -> NoReturn:
        raise ConfigError(
            f"{str(self._path)!r} (from model.path) is truncated or damaged: {what}. Compare its size with the source "
            "and download it again."
        )
