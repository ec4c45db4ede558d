"""Disks that are full, after a random number of bytes: a small tmpfs where it can be mounted, else a limit on files."""

import contextlib
import ctypes
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.base import DONE, REFUSED, Case, Good, SkippedError
from tests.faults.run_files import READERS

KIB = 1024
PAGE = 4096
NEW_MOUNTS = 0x20000
"""CLONE_NEWNS of Linux."""
CAN_MOUNT = os.name == "posix" and hasattr(os, "geteuid") and os.geteuid() == 0 and shutil.which("mount") is not None


def cases(rng: random.Random, good: Good) -> Iterator[Case]:
    """Endless: which folder is on the full disk, how much fits, and a verb."""
    number = 0
    while True:
        number += 1
        place = rng.choice(("runs", "runs", "runs", "cache"))
        verb = rng.choice(("run", "run", "resume", "resume", *READERS))
        room = int(2 ** rng.uniform(0, 11)) * KIB
        yield full(good, f"{number}: {place} with room for {room:,} bytes, {verb}", place, room, verb)


def full(good: Good, name: str, place: str, room: int, verb: str) -> Case:
    """The verb, with `place` on a disk that has `room` bytes left."""

    def make(folder: Path) -> list[str]:
        words = ["output.on_disk_full=stop"]
        if verb == "run":
            return ["run", *good.words(), *words]
        laid = good.lay_run(folder, good.stopped if verb == "resume" else good.run)
        return [*laid, *words] if verb == "resume" else READERS[verb]

    def around(folder: Path) -> contextlib.AbstractContextManager[None]:
        return mounted(folder / place, room) if CAN_MOUNT else limited(room)

    return Case("disks", name, make, REFUSED | DONE, around=around, typed="hello\n")


@contextlib.contextmanager
def mounted(folder: Path, room: int) -> Iterator[None]:
    """Moves the folder onto a tmpfs of its own with `room` bytes left."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder.with_name(f"{folder.name}.kept")
    folder.rename(kept)
    folder.mkdir()
    taken = sum(-(-path.lstat().st_size // PAGE) * PAGE + PAGE for path in kept.rglob("*"))
    size = taken + PAGE + room
    # In a mount namespace of this process: nothing is left mounted, even if it is killed.
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS):
        raise SkippedError(f"no mount namespace can be made here: {os.strerror(ctypes.get_errno())}")
    for words in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={size}", "qdpo-full", str(folder)]):
        done = subprocess.run(["mount", *words], capture_output=True, text=True)
        if done.returncode:
            raise SkippedError(f"no tmpfs can be mounted here: {done.stderr.strip()}")
    shutil.copytree(kept, folder, symlinks=True, dirs_exist_ok=True)
    yield


@contextlib.contextmanager
def limited(room: int) -> Iterator[None]:
    """No file of this process grows beyond `room` bytes."""
    before: Callable[..., object] | int | None = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
