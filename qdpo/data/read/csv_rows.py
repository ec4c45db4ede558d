"""Reads rows of a CSV or TSV file unchanged: every cell is text, and "NA" stays a word."""

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterator

from qdpo.data.read.filetext import not_utf8, pieces, text_of
from qdpo.data.read.progress import Numbered, Reading
from qdpo.errors import DataError

QUOTE = ord('"')


class _TooLarge(Exception):
    """A row is longer than rows may be; its lines were read to its end."""


class _Lines:
    """The lines of a file for csv.reader, which asks for one more as long as a quoted cell is open."""

    def __init__(self, reading: Reading, delimiter: str):
        self._reading, self._delimiter, self._pieces = reading, delimiter, pieces(reading)
        self.number = self.start = 0
        self._row: list[bytes] = []

    def begin_row(self) -> None:
        self._row = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        self.number, piece = next(self._pieces)
        if self._row or piece.strip():
            self.start = self.start if self._row else self.number
            self._row.append(piece)
        if sum(map(len, self._row)) > self._reading.max_bytes:
            self._skip_row()
            raise _TooLarge
        try:
            return text_of(piece, self.number)
        except UnicodeDecodeError as error:  # a cell may span several lines, so none can be left out
            raise DataError(f"{self._reading.path}, line {self.number}{not_utf8(error)}") from None

    def _skip_row(self) -> None:
        quotes = _Quotes(self._delimiter)
        for piece in self._row:
            quotes.feed(piece)
        while not quotes.ended:
            _number, piece = next(self._pieces, (0, b""))
            if not piece:
                if quotes.is_open:
                    raise DataError(
                        f"{self._reading.path}: a quote that is opened in the row at line {self.start} is not closed "
                        "up to the end of the file. Check the quotes there."
                    )
                return
            quotes.feed(piece)


class _Quotes:
    """Follows CSV text piece by piece to the end of a row."""

    def __init__(self, delimiter: str):
        self._stop = re.compile(b"[\n" + re.escape(delimiter.encode()) + b"]")
        self._quoted, self._at_quote, self._at_start, self.ended = False, False, True, False

    @property
    def is_open(self) -> bool:
        return self._quoted and not self._at_quote

    def feed(self, text: bytes) -> None:
        place = 0
        while place < len(text) and not self.ended:
            if self._at_quote:
                self._at_quote = False
                if text[place] == QUOTE:  # two of them are one, and the cell goes on
                    place += 1
                    continue
                self._quoted = False
            if self._quoted:
                place = text.find(b'"', place) + 1 or len(text) + 1
                self._at_quote = place <= len(text)
            elif self._at_start and text[place] == QUOTE:
                self._quoted, self._at_start = True, False
                place += 1
            else:
                found = self._stop.search(text, place)
                self._at_start = found is not None
                place = found.end() if found else len(text)
                self.ended = found is not None and found.group() == b"\n"


def _read_csv(reading: Reading, delimiter: str) -> Iterator[Numbered]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses a cell above 128 kB
    lines = _Lines(reading, delimiter)
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
