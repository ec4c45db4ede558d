"""Reads the text of a file, gzipped or not, in lines or chunks; anything but UTF-8 is refused. Nothing is kept."""

import codecs
import gzip
import io
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from qdpo.data.read.progress import BadLine, Reading
from qdpo.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
ZIP_MAGIC = b"PK\x03\x04"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
CHUNK_BYTES = 2**20
BLANK_LINES = 100_000


@contextmanager
def opened(reading: Reading) -> Iterator[IO[bytes]]:
    """Open for reading; unpack the file if its first bytes are gzip's, whatever its name."""
    with _raw(reading.path) as raw:
        reading.gauge.file = raw
        magic = raw.read(4)
        raw.seek(0)
        if magic == ZIP_MAGIC:
            raise DataError(f"{reading.path} is a zip archive. Unpack it and give the file inside.")
        try:
            yield io.BufferedReader(gzip.GzipFile(fileobj=raw), CHUNK_BYTES) if magic.startswith(GZIP_MAGIC) else raw
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{reading.path} is damaged gzip ({error}). Download or pack it again.") from None
        except OSError as error:
            raise unreadable(reading.path, error) from None


def _raw(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file that the system does not let us read."""
    return DataError(f"{path} cannot be read ({error.strerror or error}). Check its permissions and its disk.")


def _refuse_binary(path: Path, data: bytes, before: int) -> None:
    """Raises: DataError if `data`, which follows the first `before` bytes of the file, is not text."""
    if not before and data.startswith(UTF16_MARKS):
        raise DataError(f"{path} is UTF-16. Save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`).")
    if b"\0" in data:
        raise DataError(
            f"{path} has a NUL byte (byte {before + data.index(0) + 1} of the file), so it is not text. Check the "
            "file's ending, and that it was written to the end."
        )


def pieces(reading: Reading) -> Generator[tuple[int, bytes]]:
    """Numbered lines; one that is longer than rows may be comes in several pieces, all with its number.

    Only a line feed ends a line: JSON may contain U+2028, where `splitlines` would split.
    """
    with opened(reading) as file:
        number, done, blank, is_new = 0, 0, 0, True
        while piece := file.readline(reading.max_bytes + 1):
            _refuse_binary(reading.path, piece, done)
            number += is_new
            done += len(piece)
            is_new = piece.endswith(b"\n")
            blank = 0 if piece.strip() else blank + 1
            if blank > BLANK_LINES:
                raise DataError(
                    f"{reading.path} has more than {BLANK_LINES:,} empty lines in a row, up to line {number}."
                )
            yield number, piece


def lines(reading: Reading) -> Iterator[tuple[int, str | BadLine]]:
    """Numbered lines as text; those that are longer than rows may be are never in memory as a whole."""
    skipped = 0
    for number, line in pieces(reading):
        if number == skipped:
            continue
        if len(line) > reading.max_bytes:
            skipped = number
            yield number, reading.too_large(number)
            continue
        try:
            yield number, text_of(line, number)
        except UnicodeDecodeError as error:
            yield number, reading.bad_line(number, not_utf8(error))


def text_of(line: bytes, number: int) -> str:
    """The line as text, without the byte order mark of a first line. Raises: UnicodeDecodeError."""
    return line.decode("utf-8-sig" if number == 1 else "utf-8")


def not_utf8(error: UnicodeDecodeError) -> str:
    """The problem of a line that is not UTF-8, to follow "line N"."""
    what = f": byte {error.start + 1} of the line is not UTF-8 ({error.object[error.start]:#04x})"
    return f"{what}. Save the file as UTF-8."


def chunks(reading: Reading) -> Generator[str, None, None]:
    """The text piece by piece, for values that span lines."""
    decoder, done = codecs.getincrementaldecoder("utf-8-sig")(), 0
    with opened(reading) as file:
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
