"""State of a local file that is being read: progress, and handling of lines that cannot be read."""

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qdpo.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class BadLine:
    """A line that could not be read and is skipped (`data.skip_bad_lines`)."""

    detail: str


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

    def bad_line(self, number: int, problem: str) -> BadLine:
        """The line as BadLine if bad lines are skipped, else the error. `problem` continues after "line N"."""
        if self.skip_bad:
            return BadLine(f"line {number}{problem}")
        raise DataError(f"{self.path}, line {number}{problem}")
