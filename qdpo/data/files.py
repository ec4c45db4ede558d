"""Rows of local files: JSON, JSON lines, CSV, TSV and Parquet, gzipped or not.

JSON and CSV are read as they stand, without a table in between: rows whose cells differ in type stay as they were
written, "NA" stays a word, and row n of a JSONL file is its line n (blank lines are not counted).
"""

import csv
import difflib
import gzip
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from qdpo.errors import DataError

Row = dict[str, Any]

GZIP_MAGIC = b"\x1f\x8b"
LFS_POINTER = b"version https://git-lfs"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files of a folder in order of their names. Raises DataError on a mixed folder."""
    if path.is_file():
        kind_of_file(path)
        return [path]
    found = sorted(file for file in path.iterdir() if file.is_file() and _kind(file) is not None)
    if not found:
        raise DataError(f"The folder {path} holds no data files. qdpo reads {_readable()}.")
    kinds = {_kind(file): file for file in found}
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise DataError(
            f"The folder {path} mixes kinds of files: {one.name} and {other.name}. Give data.path one of them, or keep "
            "one kind in the folder."
        )
    return found


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """The first `limit` rows of a file, or all. Raises DataError that names the line where the file is damaged."""
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes). Was it written to the end?")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise DataError(f"{path} is a Git LFS pointer, not the data. Run `git lfs pull` in its folder.")
    rows = list(islice(READERS[kind_of_file(path)](path), limit))
    if not rows:
        raise DataError(f"{path} holds no rows. Was it written to the end?")
    return rows


def sha256_of(path: Path) -> str:
    """SHA-256 of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kind_of_file(path: Path) -> str:
    """The ending that says how to read a file, without .gz. Raises DataError for an unknown one."""
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{path} has an ending that qdpo does not read. It reads {_readable()}; rename or convert it.")
    return kind


def missing_file(path: Path, origin: str) -> DataError:
    """The error for a file that is not there, with names near it."""
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3)
    if near:
        hint = f"In {folder} there is: {', '.join(near)}."
    else:
        hint = f"The folder {folder} {'has no name like it' if folder.is_dir() else 'does not exist either'}."
    return DataError(f"There is no file {path} (from {origin}). {hint}")


def _kind(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    kind = Path(name).suffix
    return kind if kind in READERS and not (kind == ".parquet" and path.name.lower().endswith(".gz")) else None


def _readable() -> str:
    return ", ".join(READERS) + " (all but Parquet also as .gz)"


def _open(path: Path) -> IO[bytes]:
    """Opened for reading, unpacked where the first bytes are gzip's, whatever the name says."""
    with path.open("rb") as file:
        packed = file.read(2) == GZIP_MAGIC
    return io.BufferedReader(gzip.GzipFile(path)) if packed else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines as text. Only a line feed ends one: JSON may hold U+2028, at which `splitlines` would cut."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if number == 1 and line.startswith(UTF16_MARKS):
                    raise DataError(f"{path} is UTF-16. Save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`).")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {number}: byte {error.start + 1} of the line is not UTF-8 "
            f"({error.object[error.start]:#04x}). Save the file as UTF-8."
        ) from None
    except (gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path} is damaged gzip ({error}). Download or pack it again.") from None


def _read_json(path: Path) -> Iterator[Row]:
    """An array of objects, or one object a line; the content says which, not the name."""
    lines = _lines(path)
    is_first = True
    for number, line in lines:
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith("["):
            before = "\n" * (number - 1)  # so that the parser's line numbers are the file's
            yield from _read_array(path, before + line + "".join(rest for _, rest in lines))
            return
        is_first = False
        yield _read_object(path, number, line)


def _read_array(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise _bad_json(path, error.lineno, text.split("\n")[error.lineno - 1], error.msg) from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(
                f"{path}: item {number} of the array is {type(row).__name__}, not an object {{…}} with columns."
            )
        yield row


def _read_object(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise _bad_json(path, number, line, error.msg) from None
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: {type(row).__name__} where an object {{…}} with columns should be.")
    return row


def _bad_json(path: Path, number: int, line: str, problem: str) -> DataError:
    line = line.strip()
    shown = line if len(line) <= 80 else f"{line[:50]} … {line[-25:]}"
    return DataError(
        f"{path}, line {number} is not JSON ({problem}): {shown!r}. Mend or remove the line; the file must be one "
        "object a line, or one array of objects."
    )


def _read_csv(path: Path, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses a cell above 128 kB
    number = 0

    def texts() -> Iterator[str]:
        nonlocal number  # csv's own count stops before the line that it cannot read
        for line_number, line in _lines(path):
            number = line_number
            yield line

    reader = csv.DictReader(texts(), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                expected = len(reader.fieldnames or [])
                raise DataError(
                    f"{path}, line {number}: the row has another number of cells than the header "
                    f"({expected}). Texts with commas, tabs or line breaks must stand in double quotes."
                )
            yield row
    except csv.Error as error:
        raise DataError(f"{path}, line {number} is not CSV ({error}). Check its quotes.") from None


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a whole Parquet file ({error}). Download or write it again.") from None


def _read_tsv(path: Path) -> Iterator[Row]:
    return _read_csv(path, "\t")


def _read_comma(path: Path) -> Iterator[Row]:
    return _read_csv(path, ",")


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_comma,
    ".tsv": _read_tsv,
}
