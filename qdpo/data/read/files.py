"""The files of a local `data.path`, and their rows as one sequence that is never held in memory."""

import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from qdpo.data.read.progress import BadLine, Gauge, Reading, Row
from qdpo.data.read.readers import READERS, TABLES
from qdpo.errors import ConfigError, DataError

LFS_POINTER = b"version https://git-lfs"
SAVED_BY_DATASETS = {"dataset_info.json", "state.json", "dataset_dict.json"}
SAMPLED_ROWS = 200
Advance = Callable[[int], None]


class Place(NamedTuple):
    """Position of a row: the file, and the line (item of an array, row of a table) in it, counted from 1."""

    file: str
    line: int


@dataclass(frozen=True)
class Sample:
    """Result of one pass over all rows: their number, their columns, and about 200 rows, evenly spread."""

    count: int
    columns: list[str]
    rows: Mapping[int, Row]
    """Rows by number, counted from 1."""
    firsts: Mapping[int, Row] = field(default_factory=dict)
    """The first row that has something in a column, for each column: some are empty in nearly all rows."""


class FileRows:
    """The rows of several files in turn, at most `limit`; the files are read again on each iteration."""

    def __init__(self, files: list[Path], limit: int | None = None, *, skip_bad: bool = False):
        self._files, self._limit, self._skip_bad = files, limit, skip_bad

    def __iter__(self) -> Iterator[Row]:
        return (row for _place, row in self.located() if not isinstance(row, BadLine))

    def located(self, advance: Advance | None = None) -> Iterator[tuple[Place, Row | BadLine]]:
        """Every row with its place; `advance` receives the bytes read, every thousand rows."""
        return islice(self._all(advance or (lambda done: None)), self._limit)

    def _all(self, advance: Advance) -> Iterator[tuple[Place, Row | BadLine]]:
        for path in self._files:
            gauge, told, size = Gauge(), 0, path.stat().st_size
            _refuse_empty(path)
            number = 0
            reading = Reading(path, gauge, skip_bad=self._skip_bad)
            for number, (line, row) in enumerate(READERS[kind_of_file(path)](reading), 1):
                yield Place(str(path), line), row
                if number % 1000 == 0:
                    advance(gauge.bytes_read(size) - told)
                    told = gauge.bytes_read(size)
            if not number:
                raise DataError(f"{path} has no rows. Check that it was written to the end.")
            advance(size - told)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for path in self._files)

    def read_sample(self, advance: Advance | None = None) -> Sample:
        """Read every row once, so that damage anywhere is found before any tokens are computed."""
        columns: dict[str, None] = {}
        kept: dict[int, Row] = {}
        firsts: dict[int, Row] = {}
        unseen: dict[str, None] = {}
        stride, count = 1, 0
        for _place, row in self.located(advance):
            count += 1
            if isinstance(row, BadLine):
                continue
            if not columns.keys() >= row.keys():
                unseen |= dict.fromkeys(name for name in row if name not in columns)
                columns |= dict.fromkeys(row)
            if unseen and (filled := [name for name in unseen if row.get(name)]):
                firsts[count] = row
                unseen = {name: None for name in unseen if name not in filled}
            if (count - 1) % stride == 0:
                kept[count] = row
                if len(kept) > 2 * SAMPLED_ROWS:
                    stride *= 2
                    kept = {number: row for number, row in kept.items() if (number - 1) % stride == 0}
        return Sample(count, list(columns), kept, firsts)


def data_files(path: Path, split: str | None = None) -> list[Path]:
    """The file itself, or the data files of a folder, sorted by name.

    A folder written by datasets' `save_to_disk` may have a subfolder for each `split`.
    Raises: DataError for a folder of mixed kinds of files; ConfigError for a split that does not exist.
    """
    if path.is_file():
        kind_of_file(path)
        return [path]
    if (path / "dataset_dict.json").is_file():
        path = _split_folder(path, split)
    found = sorted(
        file
        for file in path.iterdir()
        if file.is_file() and _kind(file) is not None and file.name not in SAVED_BY_DATASETS
    )
    if not found:
        raise DataError(f"The folder {path} has no data files. qdpo reads {_readable()}.")
    kinds = {_kind(file): file for file in found}
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise DataError(
            f"The folder {path} mixes kinds of files: {one.name} and {other.name}. Set data.path to one file, or keep "
            "only one kind in the folder."
        )
    return found


def _split_folder(path: Path, split: str | None) -> Path:
    found = sorted(entry.name for entry in path.iterdir() if (entry / "dataset_info.json").is_file())
    wanted = split or ("train" if "train" in found else found[0] if len(found) == 1 else None)
    if wanted not in found:
        raise ConfigError(f"{path} has the splits {', '.join(found)}. Choose one with data.split=….")
    return path / str(wanted)


def sha256_of(path: Path) -> str:
    """SHA-256 of the bytes of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kind_of_file(path: Path) -> str:
    """The file name's ending, without .gz, which selects the reader. Raises: DataError if it is unknown."""
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{path} has an unknown file type. qdpo reads {_readable()}. Rename or convert the file.")
    return kind


def missing_file(path: Path, origin: str) -> DataError:
    """The error for a file that does not exist, with similar names."""
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=3)
    if near:
        hint = f"Similar names in {folder}: {', '.join(near)}."
    else:
        hint = f"The folder {folder} {'has no similar name' if folder.is_dir() else 'does not exist either'}."
    return DataError(f"There is no file {path} (from {origin}). {hint}")


def _refuse_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes). Check that it was written to the end.")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise DataError(f"{path} is a Git LFS pointer, not the data. Run `git lfs pull` in its folder.")


def _kind(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    kind = Path(name).suffix
    return kind if kind in READERS and not (kind in TABLES and path.name.lower().endswith(".gz")) else None


def _readable() -> str:
    return ", ".join(READERS) + " (the text ones also as .gz)"
