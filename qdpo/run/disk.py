"""Reading and atomic writing of small files, and free space."""

import contextlib
import errno
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from qdpo.errors import DiskError

# Not through a link, and without waiting for the other end of a named pipe. Windows has neither flag.
_ONLY_THIS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)
WRONG_KIND = {errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENXIO, errno.ENAMETOOLONG}
"""Errors that no free space heals: something else is where the file or folder is due."""


def cache_folder(given: str | Path | None) -> Path:
    """The folder given (cache.dir), else $QDPO_CACHE, else qdpo in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qdpo"
    return Path(given or os.environ.get("QDPO_CACHE") or default).expanduser()


def write_bytes(path: Path, content: bytes) -> None:
    """Writes the whole file or nothing. Raises: DiskError."""
    write_stream(path, lambda file: file.write(content))


def write_stream(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Writes the file by `fill`, or nothing: to a temporary file, flushed, renamed over `path`. Raises: DiskError."""
    _need_no_other(path)
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
    """Appends the whole text, on disk when this returns, or nothing. A partial last line is removed first.

    Raises: DiskError, also if the path is a link or not a file.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _BINARY | _ONLY_THIS, 0o666)
        try:
            _need_file(path, os.fstat(descriptor).st_mode)
            size = _end_of_lines(descriptor)
            try:
                if size < os.fstat(descriptor).st_size:
                    os.ftruncate(descriptor, size)
                os.lseek(descriptor, size, os.SEEK_SET)
                left = memoryview(text.encode())
                while left:
                    left = left[os.write(descriptor, left) :]
                os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, size)  # leave no partial line
                raise
        finally:
            os.close(descriptor)
    except OSError as error:
        raise disk_error(error, path) from error


def cut_torn_line(path: Path) -> bool:
    """Removes a partial last line left by a crash. True if there was one. Raises: DiskError."""
    try:
        descriptor = os.open(path, os.O_RDWR | _BINARY | _ONLY_THIS)
        try:
            _need_file(path, os.fstat(descriptor).st_mode)
            size, whole = os.fstat(descriptor).st_size, _end_of_lines(descriptor)
            os.ftruncate(descriptor, whole)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise disk_error(error, path) from error
    return whole < size


def _end_of_lines(descriptor: int) -> int:
    """Size of the file without a partial last line."""
    end = os.fstat(descriptor).st_size
    while end:
        start = max(0, end - 2**16)
        os.lseek(descriptor, start, os.SEEK_SET)
        if (place := os.read(descriptor, end - start).rfind(b"\n")) >= 0:
            return start + place + 1
        end = start
    return 0


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The file's value. Raises: ValueError if it is not JSON; OSError, DiskError as read_bytes does."""
    return parse(read_bytes(path).decode())


def parse(text: str) -> Any:
    """The value of a JSON text. Raises: ValueError, also where values are nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_bytes(path: Path) -> bytes:
    """The file's contents. Raises: OSError if there is none; DiskError if the path is not a file, such as a pipe."""
    descriptor = os.open(path, os.O_RDONLY | _BINARY | getattr(os, "O_NONBLOCK", 0))
    try:
        _need_file(path, os.fstat(descriptor).st_mode)
    except DiskError:
        os.close(descriptor)
        raise
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def is_there(path: Path) -> bool:
    """True if the folder has an entry of that name, even a link to nothing."""
    return os.path.lexists(path)


def remove(path: Path) -> None:
    """Removes a file, a link (never what it points to), or a folder with its contents. Raises: DiskError."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


def _need_no_other(path: Path) -> None:
    """Raises: DiskError if a pipe, a device or a folder has the name; a file or a link may be replaced."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if not stat.S_ISLNK(mode):
        _need_file(path, mode)


def _need_file(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise DiskError(f"{path} is {kind_of(mode)}, not a file. Move it away, then run the same command again.")


def kind_of(mode: int) -> str:
    """The kind of an entry of a folder, in words."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a file" if stat.S_ISREG(mode) else "a device")


def write_file(path: Path, fill: Callable[[Path], None]) -> None:
    """As write_stream, for a library that opens the file itself: `fill` receives the path of the temporary file."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    _need_no_other(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        try:
            fill(temporary)
            share(temporary)
            _flush(temporary)
            os.replace(temporary, path)
            _flush(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except Exception as error:
        if not is_disk_trouble(error):
            raise
        raise disk_error(error, path) from error


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Creates the folder `path` whole or not at all: `fill` writes into a temporary folder, which is then renamed.

    An existing folder of that name is replaced.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        remove(temporary)
        temporary.mkdir(parents=True)
        try:
            fill(temporary)
            for file in sorted(temporary.rglob("*")):
                if file.is_file():
                    share(file)
                    _flush(file)
            _flush(temporary)
            if is_there(path):
                remove(path)
            os.replace(temporary, path)
            _flush(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except Exception as error:
        if not is_disk_trouble(error):
            raise
        raise disk_error(error, path) from error


def is_disk_trouble(error: Exception) -> bool:
    """True if a library could not write: safetensors and tokenizers report a full disk as errors of their own."""
    return isinstance(error, (OSError, SafetensorError)) or re.search(r"\(os error \d+\)", str(error)) is not None


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
    if isinstance(error, OSError) and error.errno in WRONG_KIND:
        there = f" ({path} is {kind_of(path.lstat().st_mode)})" if is_there(path) else ""
        return DiskError(
            f"Cannot write {path}: {error}{there}. Move what is in its way, then run the same command again."
        )
    return DiskError(
        f"Cannot write {path}: {error}. Free some space or fix the permissions, then run the same command again."
    )


def may_heal(error: DiskError) -> bool:
    """True if the same write may succeed later: the disk was full, or away."""
    return not (isinstance(error.__cause__, OSError) and error.__cause__.errno in WRONG_KIND)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
