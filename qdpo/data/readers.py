"""Rows of one local file, one after the other: JSON, JSON lines, CSV, TSV, Parquet and Arrow, text ones gzipped or not.

JSON and CSV are read as they stand, without a table in between: rows whose cells differ in type stay as they were
written, and "NA" stays a word. No file is held in memory; a JSON array is read item by item.
"""

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qdpo.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class BadLine:
    """A line that could not be read, where `data.skip_bad_lines` lets the others be used."""

    detail: str


Numbered = tuple[int, Row | BadLine]
"""The line of the file where a row begins (in an array its item, in a table its row), counted from 1."""


class Gauge:
    """How many bytes of a file have been read, for a progress bar."""

    def __init__(self) -> None:
        self.file: IO[bytes] | None = None
        self.share = 0.0

    def bytes_read(self, size: int) -> int:
        """Bytes of a file of `size` bytes; a closed file was read to its end."""
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
        """The line as BadLine, or the error. `problem` goes on after "line N"."""
        if self.skip_bad:
            return BadLine(f"line {number}{problem}")
        raise DataError(f"{self.path}, line {number}{problem}")


GZIP_MAGIC = b"\x1f\x8b"
ZIP_MAGIC = b"PK\x03\x04"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
CHUNK_BYTES = 2**20
SHOWN_BEFORE = 25
"""Characters before a damaged place that a message shows."""
SPACE = re.compile(r"[ \t\r\n]*")


@contextmanager
def _open(reading: Reading) -> Iterator[IO[bytes]]:
    """Opened for reading, unpacked where the first bytes are gzip's, whatever the name says."""
    with reading.path.open("rb") as raw:
        reading.gauge.file = raw
        magic = raw.read(4)
        raw.seek(0)
        if magic == ZIP_MAGIC:
            raise DataError(f"{reading.path} is a zip archive. Unpack it and give the file inside.")
        try:
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw)) if magic.startswith(GZIP_MAGIC) else raw
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{reading.path} is damaged gzip ({error}). Download or pack it again.") from None


def _refuse_binary(path: Path, data: bytes, before: int) -> None:
    """Raises: DataError where `data` is no text; it stands behind the first `before` bytes of the file."""
    if not before and data.startswith(UTF16_MARKS):
        raise DataError(f"{path} is UTF-16. Save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`).")
    if b"\0" in data:
        raise DataError(
            f"{path} holds a NUL byte (byte {before + data.index(0) + 1} of the file): it is not text. Is its ending "
            "right, and was it written to the end?"
        )


def _lines(reading: Reading) -> Iterator[tuple[int, str | BadLine]]:
    """Numbered lines as text. Only a line feed ends one: JSON may hold U+2028, at which `splitlines` would cut."""
    with _open(reading) as file:
        done = 0
        for number, line in enumerate(file, 1):
            _refuse_binary(reading.path, line, done)
            done += len(line)
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                what = f": byte {error.start + 1} of the line is not UTF-8 ({error.object[error.start]:#04x})"
                yield number, reading.bad_line(number, f"{what}. Save the file as UTF-8.")


def read_json(reading: Reading) -> Iterator[Numbered]:
    """An array of objects, or one object a line; the content says which, not the name."""
    with _open(reading) as file:
        start = b""
        while not start.strip(b"\xef\xbb\xbf \t\r\n") and (more := file.read(4096)):
            start += more
    if start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        yield from _read_array(reading)
        return
    for number, line in _lines(reading):
        if isinstance(line, BadLine):
            yield number, line
        elif line.strip():
            yield number, _read_object(reading, number, line)


def _read_object(reading: Reading, number: int, line: str) -> Row | BadLine:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        return reading.bad_line(number, _not_json(error, line))
    if not isinstance(row, dict):
        return reading.bad_line(number, f": {type(row).__name__} where an object {{…}} with columns should be.")
    return row


def _not_json(error: Exception, line: str) -> str:
    line = line.strip()
    shown = line if len(line) <= 80 else f"{line[:50]} … {line[-25:]}"
    problem = getattr(error, "msg", None) or str(error)
    return (
        f" is not JSON ({problem}): {shown!r}. Mend or remove the line (data.skip_bad_lines=true leaves such lines "
        "out); the file must be one object a line, or one array of objects."
    )


def _read_array(reading: Reading) -> Iterator[Numbered]:
    """The objects of one JSON array, however it is broken into lines; an item at a time is held."""
    for item, (line, row) in enumerate(_array_items(reading), 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{reading.path}, line {line}: item {item} of the array is {type(row).__name__}, not an object {{…}} "
                "with columns."
            )
        yield line, row


def _array_items(reading: Reading) -> Iterator[tuple[int, Any]]:
    with closing(_chunks(reading)) as chunks:  # an error may leave them in the middle of the file
        yield from _items(_Window(reading.path, chunks))


def _items(text: "_Window") -> Iterator[tuple[int, Any]]:
    text.skip("[")
    is_first = True
    while True:
        mark = text.peek()
        if mark == "]":
            text.skip("]")
            if text.peek():
                raise text.error("something stands after the end of the array")
            return
        if not is_first:
            if mark != ",":
                raise text.error("the array is not closed" if not mark else "a comma is missing between two items")
            text.skip(",")
            text.peek()
        yield text.line, text.item()
        is_first = False


class _Window:
    """The part of a JSON text that is being looked at."""

    def __init__(self, path: Path, chunks: Iterator[str]):
        self.path, self.line, self._text, self._place, self._chunks = path, 1, "", 0, chunks

    def peek(self) -> str:
        """The next character that is no white space; empty at the end of the file."""
        while True:
            match = SPACE.match(self._text, self._place)
            assert match is not None
            self._go_to(match.end())
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._read():
                return ""

    def skip(self, mark: str) -> None:
        assert self.peek() == mark
        self._place += 1

    def item(self) -> Any:
        """The value that begins here."""
        decoder, wanted = json.JSONDecoder(), 1
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                is_torn = error.pos >= len(self._text) - 16 or error.msg.startswith("Unterminated string")
                if is_torn and any([self._read() for _ in range(wanted)]):
                    wanted *= 2
                    continue
                self._go_to(error.pos)
                raise self.error(error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self.error(str(error)) from None
            self._go_to(end)
            return value

    def error(self, problem: str) -> DataError:
        shown = self._text[max(0, self._place - SHOWN_BEFORE) : self._place + 50]
        return DataError(
            f"{self.path}, line {self.line} is not JSON ({problem}): {shown!r}. Mend it there; the file must be one "
            "object a line, or one array of objects."
        )

    def _go_to(self, place: int) -> None:
        self.line += self._text.count("\n", self._place, place)
        self._place = place

    def _read(self) -> bool:
        more = next(self._chunks, "")
        if more:
            seen = max(0, self._place - SHOWN_BEFORE)
            self._text, self._place = self._text[seen:] + more, self._place - seen
        return bool(more)


def _chunks(reading: Reading) -> Generator[str, None, None]:
    decoder, done = codecs.getincrementaldecoder("utf-8-sig")(), 0
    with _open(reading) as file:
        while data := file.read(CHUNK_BYTES):
            _refuse_binary(reading.path, data, done)
            try:
                text = decoder.decode(data)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{reading.path}: byte {done + error.start + 1} of the file is not UTF-8 "
                    f"({error.object[error.start]:#04x}). Save the file as UTF-8."
                ) from None
            done += len(data)
            if text:
                yield text


def _read_csv(reading: Reading, delimiter: str) -> Iterator[Numbered]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses a cell above 128 kB
    number = 0

    def texts() -> Iterator[str]:
        nonlocal number  # csv's own count stops before the line that it cannot read
        for line_number, line in _lines(Reading(reading.path, reading.gauge)):
            number = line_number
            assert isinstance(line, str)  # a cell may go over several lines: none can be left out
            yield line

    reader = csv.DictReader(texts(), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                expected = len(reader.fieldnames or [])
                yield (
                    number,
                    reading.bad_line(
                        number,
                        f": the row has another number of cells than the header ({expected}). Texts with commas, tabs "
                        "or line breaks must stand in double quotes.",
                    ),
                )
            else:
                yield number, row
    except csv.Error as error:
        raise DataError(f"{reading.path}, line {number} is not CSV ({error}). Check its quotes.") from None


def read_comma(reading: Reading) -> Iterator[Numbered]:
    """Rows of a CSV file, whose first line names the columns."""
    return _read_csv(reading, ",")


def read_tab(reading: Reading) -> Iterator[Numbered]:
    """Rows of a TSV file, whose first line names the columns."""
    return _read_csv(reading, "\t")


@contextmanager
def _whole_table(reading: Reading, kind: str) -> Iterator[None]:
    import pyarrow  # type: ignore[import-untyped]

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        first = str(error).split("\n")[0]
        raise DataError(f"{reading.path} is not a whole {kind} file ({first}). Download or write it again.") from None


def read_parquet(reading: Reading) -> Iterator[Numbered]:
    """Rows of a Parquet file, a thousand at a time."""
    import pyarrow.parquet  # type: ignore[import-untyped]

    with _whole_table(reading, "Parquet"), pyarrow.parquet.ParquetFile(reading.path) as table:
        yield from _table_rows(table.iter_batches(batch_size=1000), table.metadata.num_rows, reading)


def read_arrow(reading: Reading) -> Iterator[Numbered]:
    """Rows of an Arrow file, as `datasets` saves it (a stream) or as Feather."""
    import pyarrow

    with _whole_table(reading, "Arrow"), pyarrow.memory_map(str(reading.path)) as file:
        try:
            stream = pyarrow.ipc.open_stream(file)
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(file)
            batches: Any = (table.get_batch(number) for number in range(table.num_record_batches))
        else:
            batches = iter(stream)
        yield from _table_rows(_in_thousands(batches), None, reading)


def _in_thousands(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        yield from (batch.slice(start, 1000) for start in range(0, batch.num_rows, 1000))


def _table_rows(batches: Iterator[Any], count: int | None, reading: Reading) -> Iterator[Numbered]:
    number = 0
    for batch in batches:
        batch.validate(full=True)  # pyarrow reads where the offsets of a damaged file point to, and crashes
        for row in batch.to_pylist():
            number += 1
            yield number, row
        if count:
            reading.gauge.share = number / count
    reading.gauge.share = 1.0


READERS: dict[str, Callable[[Reading], Iterator[Numbered]]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".csv": read_comma,
    ".tsv": read_tab,
}
TABLES = {".parquet", ".arrow", ".feather"}
