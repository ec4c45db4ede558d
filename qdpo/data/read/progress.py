"""State of a local file that is being read: progress, and handling of lines that cannot be read."""

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qdpo.errors import DataError

Row = dict[str, Any]
ROW_BYTES = 4 * 2**20
"""Default of `data.max_row_mib`: a row of 100,000 tokens in prompt and answers has about 1 MiB."""
DEEPEST = 100
"""Levels of lists and objects in a row; deeper ones end in Python's limit of recursion."""


@dataclass(frozen=True)
class BadLine:
    """A row that is left out, for a reason that is counted by its name."""

    detail: str
    reason: str = "unreadable_line"


Numbered = tuple[int, Row | BadLine]
"""The line of the file where a row begins (in an array its item, in a table its row), counted from 1."""


class Gauge:
    """Counter of the bytes read of a file, for a progress bar."""

    def __init__(self) -> None:
        self.file: IO[bytes] | None = None
        self.share = 0.0

    def bytes_read(self, size: int) -> int:
        """Bytes read of a file of `size` bytes; a closed file was read to its end."""
        if self.file is None:
            return round(self.share * size)
        return size if self.file.closed else self.file.tell()


@dataclass(frozen=True)
class Reading:
    """One file being read; `skip_bad` turns errors of single lines into BadLine."""

    path: Path
    gauge: Gauge
    skip_bad: bool = False
    max_bytes: int = ROW_BYTES
    """Rows with more bytes are left out (`data.max_row_mib`)."""

    def bad_line(self, number: int, problem: str) -> BadLine:
        """The line as BadLine if bad lines are skipped, else the error. `problem` continues after "line N"."""
        if self.skip_bad:
            return BadLine(f"line {number}{problem}")
        raise DataError(f"{self.path}, line {number}{problem}")

    def too_large(self, number: int) -> BadLine:
        """The row that begins at this line, which is longer than rows may be."""
        return BadLine(
            f"line {number}: the row has more than {self.max_bytes / 2**20:.3g} MiB (data.max_row_mib)", "row_too_large"
        )


def is_deep(value: Any, text: str = "") -> bool:
    """True if lists and objects are nested deeper than DEEPEST; `text` is the JSON of `value`, if there is one."""
    if text and text.count("[") + text.count("{") <= DEEPEST:
        return False
    level = [value]
    for _ in range(DEEPEST):
        nested = [part for part in level if isinstance(part, dict | list)]
        level = [inner for part in nested for inner in (part.values() if isinstance(part, dict) else part)]
    return any(isinstance(part, dict | list) for part in level)


def size_of(value: Any) -> int:
    """Letters and numbers in a row, about its bytes in memory."""
    left, size = [value], 0
    while left:
        part = left.pop()
        size += len(part) if isinstance(part, str | bytes) else 8
        left += part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
    return size
