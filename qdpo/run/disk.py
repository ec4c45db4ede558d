"""Reading and atomic writing of small files, and free space."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from qdpo.errors import DiskError


def cache_folder(given: str | Path | None) -> Path:
    """The folder given (cache.dir), else $QDPO_CACHE, else qdpo in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdpo"
    return Path(given or os.environ.get("QDPO_CACHE") or default).expanduser()


def write_bytes(path: Path, content: bytes) -> None:
    """Writes the whole file or nothing. Raises: DiskError."""
    write_stream(path, lambda file: file.write(content))


def write_stream(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Writes the file by `fill`, or nothing: to a temporary file, flushed, renamed over `path`. Raises: DiskError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            share(Path(name))
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise disk_error(error, path) from error


def write_text(path: Path, text: str) -> None:
    """As write_bytes, for text in UTF-8."""
    write_bytes(path, text.encode())


def append_text(path: Path, text: str) -> None:
    """Appends the whole text, on disk when this returns, or nothing. Raises: DiskError."""
    try:
        with path.open("ab") as file:
            size = file.tell()
            try:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(path, size)  # leave no partial line
                raise
    except OSError as error:
        raise disk_error(error, path) from error


def cut_torn_line(path: Path) -> bool:
    """Removes a partial last line left by a crash. True if there was one."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole == len(content):
        return False
    write_bytes(path, content[:whole])
    return True


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_file(path: Path, fill: Callable[[Path], None]) -> None:
    """As write_stream, for a library that opens the file itself: `fill` receives the path of the temporary file."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fill(temporary)
            share(temporary)
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


def read_lines(path: Path) -> list[Any]:
    """The values of a JSON Lines file, without a partial last line left by a crash; empty if there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Creates the folder `path` whole or not at all: `fill` writes into a temporary folder, which is then renamed.

    An existing folder of that name is replaced.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    share(file)
                    _flush(file)
            _flush(temporary)
            if path.exists():
                shutil.rmtree(path)
            os.replace(temporary, path)
            _flush(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        raise disk_error(error, path) from error


def share(path: Path) -> None:
    """Sets the mode that the umask asks for; safetensors and mkstemp write 0600, which no server can read."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def need_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Raises: DiskError unless the disk of `folder` (which need not exist yet) has `needed_bytes` free."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise DiskError(
            f"{purpose} needs {needed_bytes / 2**30:.1f} GiB, but {existing} has {free_bytes / 2**30:.1f} GiB free. "
            "Free some space, or use another disk: output.dir for runs, cache.dir for reference log-probs and "
            "converted bases, HF_HOME for downloads."
        )


def disk_error(error: Exception, path: Path) -> DiskError:
    """A DiskError that names the file that could not be written, and the cause."""
    return DiskError(
        f"Cannot write {path}: {error}. Free some space or fix the permissions, then run the same command again."
    )


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
