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


@contextmanager
def opened(reading: Reading) -> Iterator[IO[bytes]]:
    """Open for reading; unpack the file if its first bytes are gzip's, whatever its name."""
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
    """Raises: DataError if `data`, which follows the first `before` bytes of the file, is not text."""
    if not before and data.startswith(UTF16_MARKS):
        raise DataError(f"{path} is UTF-16. Save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`).")
    if b"\0" in data:
        raise DataError(
            f"{path} has a NUL byte (byte {before + data.index(0) + 1} of the file), so it is not text. Check the "
            "file's ending, and that it was written to the end."
        )


def lines(reading: Reading) -> Iterator[tuple[int, str | BadLine]]:
    """Numbered lines as text. Only a line feed ends a line: JSON may contain U+2028, where `splitlines` would split."""
    with opened(reading) as file:
        done = 0
        for number, line in enumerate(file, 1):
            _refuse_binary(reading.path, line, done)
            done += len(line)
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                what = f": byte {error.start + 1} of the line is not UTF-8 ({error.object[error.start]:#04x})"
                yield number, reading.bad_line(number, f"{what}. Save the file as UTF-8.")


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
