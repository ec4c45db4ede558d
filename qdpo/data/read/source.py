"""Opens sources of preference data: the Hub, a file, a folder, or data that ships with qdpo; one or several."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from qdpo.data.read.files import Advance, FileRows, Place, Sample, data_files, missing_file, sha256_of
from qdpo.data.read.hub import HUB_NAME, HubName, open_hub
from qdpo.data.read.progress import ROW_BYTES, BadLine, Row
from qdpo.data.read.readers import READERS
from qdpo.errors import ConfigError

BUNDLED = "bundled:"


class Rows(Protocol):
    """Rows on disk that can be iterated over several times."""

    def __iter__(self) -> Iterator[Row]:
        """The rows that can be read."""

    def located(self, advance: Advance | None = None) -> Iterator[tuple[Place, Row | BadLine]]:
        """Every row with its place; `advance` receives the bytes read since it was last called."""

    @property
    def bytes(self) -> int:
        """Bytes to read for all rows, for a progress bar."""

    def read_sample(self, advance: Advance | None = None) -> Sample:
        """Number, columns and a sample of the rows."""


@dataclass(frozen=True)
class Source:
    """Rows with their origin."""

    name: str
    rows: Rows
    fingerprint: str
    """Changes when the rows do: the commit of a Hub data set, else SHA-256 over the contents of the files."""
    files: dict[str, str] = field(default_factory=dict)
    """Absolute path to SHA-256, for local data; empty for the Hub."""
    revision: str | None = None
    license: str | None = None


def split_paths(path: str) -> list[str]:
    """The sources in a `data.path`, which may be several, as in `mine.jsonl+owner/name`."""
    return [path] if _exists(_on_disk(path)) else [part for part in path.split("+") if part]


def open_source(
    path: str,
    *,
    split: str | None = None,
    revision: str | None = None,
    shipped: Path,
    limit: int | None = None,
    skip_bad: bool = False,
    row_bytes: int = ROW_BYTES,
) -> Source:
    """Open one source of `data.path`; `limit` reads at most that many rows, from the first.

    `bundled:NAME` is a file in `shipped`. A path that exists on disk is local; else `owner/name` is a data set on the
    Hub, optionally followed by `:config`, `@revision` and `/split`. `skip_bad` skips lines that cannot be read;
    rows of more than `row_bytes` are skipped always.
    Raises: DataError if the data cannot be reached or read; ConfigError if the settings contradict each other.
    """
    local = shipped / path.removeprefix(BUNDLED) if path.startswith(BUNDLED) else _on_disk(path)
    hub = HUB_NAME.fullmatch(path)
    if path.startswith(BUNDLED) or _exists(local) or hub is None or _looks_local(path):
        if not _exists(local):
            raise missing_file(local, f"data.path={path}")
        _refuse_hub_settings(path, local, split, revision)
        files = data_files(local, split)
        return _local(path, files, FileRows(files, limit, skip_bad=skip_bad, row_bytes=row_bytes))
    for setting, given, inside in (("split", split, hub["split"]), ("revision", revision, hub["revision"])):
        if given and inside and given != inside:
            raise ConfigError(f"data.{setting}={given}, but data.path={path} names {inside!r}. Keep one of the two.")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # datasets reports each load to a counter; read at import
    found = open_hub(
        HubName(hub["repo"], hub["config"], hub["revision"] or revision, hub["split"] or split, path), limit
    )
    return Source(found.name, found.rows, found.commit, revision=found.commit, license=found.license)


def _looks_local(path: str) -> bool:
    return path.startswith((".", "~", "/")) or Path(path.removesuffix(".gz")).suffix in READERS


def _refuse_hub_settings(path: str, local: Path, split: str | None, revision: str | None) -> None:
    if split not in (None, "train") and not (local / "dataset_dict.json").is_file():
        raise ConfigError(
            f"data.split={split} has no effect on the local data {path}. Name the file of that split instead."
        )
    if revision is not None:
        raise ConfigError(f"data.revision={revision} has no effect on the local data {path}. Leave it out.")


def _local(name: str, files: list[Path], rows: FileRows) -> Source:
    digests = {str(file.resolve()): sha256_of(file) for file in files}
    fingerprint = sha256("\n".join(digests.values()).encode()).hexdigest()
    return Source(name, rows, fingerprint, digests)


def _on_disk(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~somebody who has no account
        return Path(path)


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):  # a name that is too long, or a folder that may not be read
        return False
