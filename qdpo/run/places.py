"""Checks that each entry of a run folder is of the kind that is due: a link, a pipe or a folder instead is refused.

Checked before anything is read, written or removed, so that no link leads a write or a removal out of the folder.
"""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from qdpo.errors import DiskError
from qdpo.run import disk
from qdpo.run.folder import RunDir

FILES = {".json", ".safetensors", ".jinja", ".md", ".model", ".txt"}


def check_places(run: RunDir) -> None:
    """Raises: DiskError that names the first entry of the wrong kind."""
    for folder in (run.prepared, run.checkpoints, run.adapter):
        if _kind(folder) not in (None, stat.S_IFDIR):
            raise _wrong(folder, "a folder")
    for path in (*_files(run), *_inside(run.prepared), *_inside(run.adapter)):
        check_file(path, may_link=True)


def check_file(path: Path, *, may_link: bool = False) -> None:
    """Raises: DiskError if the path is something other than a file; `may_link` allows a link to a file, to be read."""
    kind = _kind(path)
    if kind not in (None, stat.S_IFREG) and not (may_link and kind == stat.S_IFLNK and path.is_file()):
        raise _wrong(path, "a file")


def is_folder(path: Path) -> bool:
    """True for a folder itself, false for a link to one."""
    return _kind(path) == stat.S_IFDIR


def _files(run: RunDir) -> tuple[Path, ...]:
    return (
        run.record, run.environment, run.config, run.data_report, run.metrics, run.tracked, run.samples, run.eval_pairs,
        run.result, run.card, run.report, run.path / "debug.log",
    )  # fmt: skip


def _inside(folder: Path) -> Iterator[Path]:
    """The files of the folder, and what has a file's name.

    Leftovers of killed processes, which begin with a dot, are removed at the start.
    """
    if not is_folder(folder):
        return
    for path in sorted(folder.iterdir()):
        if not path.name.startswith(".") and (path.suffix in FILES or not is_folder(path)):
            yield path


def _kind(path: Path) -> int | None:
    """The kind of the entry itself, links included; None if there is none. Raises: DiskError if it cannot be read."""
    try:
        return stat.S_IFMT(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise disk.disk_error(error, path) from error


def _wrong(path: Path, due: str) -> DiskError:
    kind = disk.kind_of(os.lstat(path).st_mode)
    to = f" to {os.readlink(path)}" if kind == "a link" else ""
    return DiskError(
        f"{path} is {kind}{to}, but {due} of the run is due there. Move it away, then run the same command again; put "
        "the run's own back from a copy, or start the run again with `--fresh`."
    )
