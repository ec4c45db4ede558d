"""Lists, checks and clears the cache folder, without torch."""

import difflib
import shlex
import shutil
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.errors import ConfigError, DiskError, VerificationError
from qdpo.run import disk
from qdpo.run.disk import cache_folder
from qdpo.train.policy.reference_cache import ERRORS, is_damage, is_intact

PLACES = ("reference", "bases", "forecast")
SHOWN_DIGITS = 12
"""Digits of a reference's name that are shown: enough to identify it."""


@dataclass(frozen=True)
class Contents:
    """The paths in a cache folder, by kind; other files do not belong to qdpo."""

    folder: Path
    references: list[Path]
    bases: list[Path]
    """Converted bases, and leftovers of interrupted conversions."""
    corrupt: list[Path]
    traces: list[Path]
    """Traced layers of models, from which forecasts are made."""


def contents(given: Path | None) -> Contents:
    """Contents of the given folder, else of the default one. Raises: DiskError if it cannot be read."""
    folder = cache_folder(given)
    with _disk_errors(folder):
        inside = {name: sorted(place.iterdir()) if (place := folder / name).is_dir() else [] for name in PLACES}
    return Contents(
        folder,
        references=[path for path in inside["reference"] if path.suffix == ".sqlite"],
        bases=inside["bases"],
        corrupt=[path for path in inside["reference"] if path.suffix.startswith(".corrupt-")],
        traces=[path for path in inside["forecast"] if path.suffix == ".json"],
    )


def list_lines(given: Path | None) -> list[str]:
    """Tables of references, converted bases, files set aside as damaged, and traced layers."""
    found = contents(given)
    with _disk_errors(found.folder):
        references = [_about(path) for path in found.references]
        bases = [(path.name, _size(path)) for path in found.bases if path.is_dir() and path.name[0] != "."]
        corrupt = [(path.name, _size(path)) for path in found.corrupt]
        traces = (
            [("forecast/", str(len(found.traces)), _readable(sum(map(_bytes, found.traces))))] if found.traces else []
        )
    tables = [
        _table(("reference", "answers", "size", "last used", "base", "computed with"), references),
        _table(("converted base", "size"), bases),
        _table(("set aside as damaged", "size"), corrupt),
        _table(("traced layers", "files", "size"), traces),
    ]
    if not any(tables):
        return [f"{found.folder} has no reference log-probs, converted models or traced layers."]
    return [str(found.folder), *(line for table in tables if table for line in ("", *table))]


def verify_lines(given: Path | None) -> Iterator[str]:
    """A line for each reference, as it is checked. Raises: VerificationError at the end if any is damaged."""
    found, damaged = contents(given), []
    for path in found.references:
        with _disk_errors(path):
            answers, faults = _faults(path)
        if faults:
            damaged.append(path.stem[:SHOWN_DIGITS])
        yield f"{path.stem[:SHOWN_DIGITS]}: {f'{answers} answers, intact' if not faults else '; '.join(faults)}"
    if damaged:
        names = " ".join(damaged)
        raise VerificationError(
            f"Damaged in {found.folder}: {names}. A run computes damaged rows again and sets unreadable files aside. "
            f"To remove them now: `qdpo cache clear {names} --dir {shlex.quote(str(found.folder))}`."
        )
    yield f"{len(found.references)} references in {found.folder}, all intact"


def clear_lines(given: Path | None, names: Sequence[str], *, corrupt: bool, everything: bool) -> Iterator[str]:
    """Remove the named references, the files set aside, or everything; yield a line for each.

    Raises: ConfigError, before anything is removed, if a name matches no reference or several, or nothing is named.
    """
    found = contents(given)
    if not (names or corrupt or everything):
        raise ConfigError("Nothing to clear is named. Give a NAME from `qdpo cache ls`, --corrupt, or --all.")
    doomed = found.references if everything else list(dict.fromkeys(_named(name, found) for name in names))
    whole = [(f"reference {path.stem[:SHOWN_DIGITS]}", [path, *_companions(path)]) for path in doomed]
    if corrupt or everything:
        whole += [(path.name, [path]) for path in found.corrupt]
    if everything:
        whole += [(f"bases/{path.name}", [path]) for path in found.bases]
        whole += [(f"traced layers ({len(found.traces)} files)", found.traces)] if found.traces else []
    _check_inside(found.folder, [path for _, paths in whole for path in paths])
    freed = 0
    for what, paths in whole:
        with _disk_errors(paths[0]):
            size = sum(_bytes(path) for path in paths)
            for path in paths:
                _remove(path)
        freed += size
        yield f"removed {what}: {_readable(size)}"
    yield f"freed {_readable(freed)} in {found.folder}"


def _named(name: str, found: Contents) -> Path:
    known = [path.stem for path in found.references]
    fits = [path for path in found.references if name and path.stem.startswith(name)]
    if len(fits) == 1:
        return fits[0]
    if fits:
        raise ConfigError(
            f"{name!r} matches {len(fits)} references: {', '.join(p.stem for p in fits)}. Give more digits."
        )
    near = difflib.get_close_matches(name, known + [stem[: len(name)] for stem in known], n=1, cutoff=0.3)
    full = next((stem for stem in known if near and stem.startswith(near[0])), None)
    hint = f"Did you mean {full[:SHOWN_DIGITS]!r}?" if full else "`qdpo cache ls` lists them."
    raise ConfigError(f"There is no reference {name!r} in {found.folder}. {hint}")


def _companions(path: Path) -> list[Path]:
    beside = [Path(f"{path}{ending}") for ending in ("-journal", ".lock")]
    return [file for file in beside if file.exists()]


def _check_inside(folder: Path, paths: Sequence[Path]) -> None:
    """Raises: ConfigError for a path that a link leads out of the cache folder."""
    for path in paths:
        if not path.parent.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{path.parent} is a link to {path.parent.resolve()}, outside the cache folder, so nothing is deleted "
                "there. Remove its files yourself."
            )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _about(path: Path) -> tuple[str, ...]:
    """A reference's row in the list."""
    answers, about = "unreadable", dict[str, Any]()
    try:
        with _opened(path) as database:
            answers = str(database.execute("SELECT count(*) FROM logps").fetchone()[0])
            (text,) = database.execute("SELECT description FROM about").fetchone() or ("{}",)
            with suppress(ValueError):
                about = described if isinstance(described := disk.parse(str(text)), dict) else {}
    except ERRORS as error:
        if not is_damage(error, path):
            raise
    start = f", adapter {str(about['adapter'])[:SHOWN_DIGITS]}" if about.get("adapter") else ""
    how = ", ".join(str(about[part]) for part in ("dtype", "attention", "device") if part in about) + start
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
    return path.stem[:SHOWN_DIGITS], answers, _size(path), used, str(about.get("base") or "unknown"), how or "unknown"


def _faults(path: Path) -> tuple[int, list[str]]:
    """Number of rows, and the file's faults."""
    answers = damaged = 0
    try:
        with _opened(path) as database:
            said = [line for (line,) in database.execute("PRAGMA integrity_check(1)")]
            faults = [] if said == ["ok"] else [" ".join(str(line).split()) for line in said]
            for key, value, crc in database.execute("SELECT key, value, crc FROM logps"):
                answers += 1
                damaged += not is_intact(key, value, crc)
    except ERRORS as error:
        if not is_damage(error, path):
            raise
        return answers, [str(error)]
    return answers, faults + ([f"{damaged} of {answers} rows do not match their checksum"] if damaged else [])


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """Open an existing file, for writing, since an unfinished transaction of a killed process must be rolled back."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=60)) as database:
        database.text_factory = lambda raw: raw.decode(errors="replace")
        yield database


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        raise DiskError(
            f"Cannot use {path}: {error}. Fix its permissions, or give another folder with --dir."
        ) from error


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]


def _bytes(path: Path) -> int:
    if path.is_dir() and not path.is_symlink():
        return sum(_bytes(entry) for entry in path.iterdir())
    return path.lstat().st_size


def _size(path: Path) -> str:
    return _readable(_bytes(path))


def _readable(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"
