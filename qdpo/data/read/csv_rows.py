"""Reads rows of a CSV or TSV file unchanged: every cell is text, and "NA" stays a word."""

import csv
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing

from qdpo.data.read.filetext import not_utf8, pieces, text_of
from qdpo.data.read.progress import Numbered, Reading
from qdpo.data.read.skip import CsvRow
from qdpo.errors import DataError

MOST_LINES = 1_000_000
"""Lines of one row that is too large to be read, beyond which a quote is taken as forgotten."""


class _TooLarge(Exception):
    """A row is longer than rows may be; its lines were read to its end."""


class _Lines:
    """The lines of a file for csv.reader, which asks for one more as long as a quoted cell is open."""

    def __init__(self, reading: Reading, delimiter: str):
        self._reading, self._delimiter, self._pieces = reading, delimiter, pieces(reading)
        self.number = self.start = 0
        self._row: list[bytes] = []
        self._bytes = 0

    def close(self) -> None:
        self._pieces.close()

    def begin_row(self) -> None:
        self._row, self._bytes = [], 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, piece = next(self._pieces)
        if self._row or piece.strip():
            self.start = self.start if self._row else self.number
            self._row.append(piece)
            self._bytes += len(piece)
        if self._bytes > self._reading.max_bytes:
            self._skip_row()
            raise _TooLarge
        try:
            return text_of(piece, self.number)
        except UnicodeDecodeError as error:  # a cell may span several lines, so none can be left out
            raise DataError(f"{self._reading.path}, line {self.number}{not_utf8(error)}") from None

    def _skip_row(self) -> None:
        quotes = CsvRow(self._delimiter)
        for piece in self._row:
            quotes.feed(piece)
        while not quotes.ended:
            if self.number > self.start + MOST_LINES:
                raise DataError(
                    f"{self._reading.path}: a quote that is opened in the row at line {self.start} is not closed in "
                    f"the {MOST_LINES:,} lines that follow. Check the quotes there."
                )
            self.number, piece = next(self._pieces, (self.number, b""))
            if not piece:
                if quotes.is_open:
                    raise DataError(
                        f"{self._reading.path}: a quote that is opened in the row at line {self.start} is not closed "
                        "up to the end of the file. Check the quotes there."
                    )
                return
            quotes.feed(piece)


def _read_csv(reading: Reading, delimiter: str) -> Iterator[Numbered]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses a cell above 128 kB
    with closing(_Lines(reading, delimiter)) as lines:
        yield from _rows(reading, lines, delimiter)


def _rows(reading: Reading, lines: _Lines, delimiter: str) -> Iterator[Numbered]:
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    _check_header(reading, reader, delimiter)
    while True:
        lines.begin_row()
        try:
            row = next(reader)
        except StopIteration:
            return
        except _TooLarge:
            yield lines.start, reading.too_large(lines.start)
            continue
        except csv.Error as error:
            began = "" if lines.start == lines.number else f" (its row begins at line {lines.start})"
            raise DataError(
                f"{reading.path}, line {lines.number}{began} is not CSV ({error}). Check its quotes."
            ) from None
        if None in row or None in row.values():
            expected = len(reader.fieldnames or [])
            problem = (
                f": the row and the header ({expected} cells) differ in length. Put texts with commas, tabs or line "
                "breaks in double quotes."
            )
            yield lines.number, reading.bad_line(lines.number, problem)
        else:
            yield lines.number, row


def _check_header(reading: Reading, reader: "csv.DictReader[str]", delimiter: str) -> None:
    try:
        names = list(reader.fieldnames or [])
    except (csv.Error, _TooLarge) as error:
        problem = str(error) or f"more than {reading.max_bytes / 2**20:.3g} MiB"
        raise DataError(
            f"{reading.path}: its first line, the header, is not CSV ({problem}). Check its quotes."
        ) from None
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise DataError(
            f"{reading.path} has {len(repeated)} columns of the same name in its header ({repeated[0]!r}). Rename or "
            "remove one of each."
        )
    others = (
        [mark for mark in (";", "\t", "|", ",") if mark != delimiter and mark in names[0]] if len(names) == 1 else []
    )
    if others:
        mark = "tabs" if others[0] == "\t" else repr(others[0])
        way = "Rename the file to .tsv" if others[0] == "\t" else "Save it with commas (or with tabs, as .tsv)"
        raise DataError(f"{reading.path} has one column, {names[0]!r}: its cells look separated by {mark}. {way}.")


def read_comma(reading: Reading) -> Iterator[Numbered]:
    """Rows of a CSV file, whose first line names the columns."""
    return _read_csv(reading, ",")


def read_tab(reading: Reading) -> Iterator[Numbered]:
    """Rows of a TSV file, whose first line names the columns."""
    return _read_csv(reading, "\t")
