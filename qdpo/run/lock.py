"""One process per run: its lock, moving an earlier run aside, and clearing up after a killed process."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from qdpo.errors import ConfigError
from qdpo.run import disk, places
from qdpo.run.folder import RunDir


@contextmanager
def exclusive(run: RunDir) -> Iterator[None]:
    """Holds the run's lock: no other process works on the run. Raises: ConfigError if another process holds it."""
    places.check_file(run.lock)
    lock = FileLock(run.lock)
    try:
        run.lock.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ConfigError(
            f"Another process is working on {run.path}. Wait for it to end, or choose another `output.name`."
        ) from error
    except OSError as error:
        raise disk.disk_error(error, run.path) from error
    try:
        yield
    finally:
        # Removed while the lock is held: after the release, another process may already hold that file. filelock does
        # not lock a file that has lost its name. Windows refuses the removal, since the file is open.
        with suppress(PermissionError):
            run.lock.unlink(missing_ok=True)
        lock.release()


def move_aside(run: RunDir) -> Path:
    """Renames an existing run folder so that a new run can take its name; nothing is deleted."""
    number = 1
    while disk.is_there(aside := run.path.with_name(f"{run.path.name}.old-{number}")):
        number += 1
    with exclusive(run):
        try:
            run.path.rename(aside)
        except OSError as error:
            raise disk.disk_error(error, aside) from error
    return aside


def clear_leftovers(run: RunDir) -> None:
    """Removes the temporary files that a killed process left for this run. The caller must hold the run's lock.

    A leftover that is a link is removed, never what it points to.
    """
    beside = rf"\.tmp-{re.escape(run.path.name)}-\d+"  # the run folder itself, at its first start
    inside = r"\.tmp-[\w.-]+-\d+|\.[\w.-]+\.\w{8}"  # of write_folder and write_bytes
    for folder, name in ((run.path.parent, beside), (run.path, inside), (run.adapter, inside)):
        if folder == run.adapter and not places.is_folder(folder):
            continue
        for path in folder.glob(".*"):
            if re.fullmatch(name, path.name):
                disk.remove(path)
