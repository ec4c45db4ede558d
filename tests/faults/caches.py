"""A damaged, locked or foreign cache folder: for a run that reads it, and for `qdpo cache`."""

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from tests.faults.base import DONE, REFUSED, SAME, Case, Good

KIND = "caches"
Damage = Callable[[Path, random.Random], object]
VERBS = {
    "ls": ["cache", "ls", "--dir", "cache"], "verify": ["cache", "verify", "--dir", "cache"],
    "clear": ["cache", "clear", "--all", "--dir", "cache"],
    "corrupt": ["cache", "clear", "--corrupt", "--dir", "cache"],
}  # fmt: skip


def cases(rng: random.Random, good: Good) -> Iterator[Case]:
    for number in range(90):
        what, damage = rng.choice(list(DAMAGE.items()))
        seed, verb = rng.random(), rng.choice(["run", "run", *VERBS])
        right = REFUSED | (SAME if verb == "run" else DONE)

        def make(folder: Path, damage: Damage = damage, seed: float = seed, verb: str = verb) -> list[str]:
            words = _laid(good, folder)
            damage(_reference(folder), random.Random(seed))
            return words if verb == "run" else VERBS[verb]

        yield Case(KIND, f"{verb}: {what} ({number})", make, right)
    for verb in ("run", *VERBS):
        right = REFUSED | (SAME if verb == "run" else DONE)

        def locked(folder: Path, verb: str = verb) -> list[str]:
            words = _laid(good, folder)
            return words if verb == "run" else VERBS[verb]

        yield Case(KIND, f"{verb}: briefly locked by another process", locked, right, around=_locked)


def _laid(good: Good, folder: Path) -> list[str]:
    """A new run that reads the copy of a filled cache."""
    words = good.lay(folder)
    shutil.copytree(good.cache, folder / "cache")
    return words


def _reference(folder: Path) -> Path:
    return next((folder / "cache" / "reference").glob("*.sqlite"))


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Another connection holds the file's lock for two seconds."""
    pid = os.fork()
    if pid == 0:
        try:
            with closing(sqlite3.connect(_reference(folder))) as other:
                other.execute("BEGIN EXCLUSIVE")
                (folder / "is_locked").touch()
                import time

                time.sleep(2)
        finally:
            os._exit(0)
    while not (folder / "is_locked").exists():
        pass
    try:
        yield
    finally:
        os.waitpid(pid, 0)


def _bytes(path: Path, rng: random.Random, count: int) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(count):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)


def _header(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(100)] = rng.randrange(256)
    path.write_bytes(content)


def _sql(path: Path, *statements: str) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        for statement in statements:
            database.execute(statement)


def _instead(path: Path, build: Callable[[Path], object]) -> None:
    path.unlink()
    build(path)


def _instead_of_folder(path: Path, build: Callable[[Path], object]) -> None:
    shutil.rmtree(path)
    build(path)


DAMAGE: dict[str, Damage] = {
    "a byte changed": lambda path, rng: _bytes(path, rng, 1),
    "50 bytes changed": lambda path, rng: _bytes(path, rng, 50),
    "a byte of the header changed": _header,
    "cut": lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    "empty": lambda path, rng: os.truncate(path, 0),
    "NUL bytes": lambda path, rng: path.write_bytes(bytes(path.stat().st_size)),
    "a text": lambda path, rng: path.write_text("not a database\n" * 100),
    "longer": lambda path, rng: path.write_bytes(path.read_bytes() + rng.randbytes(5000)),
    "read-only": lambda path, rng: path.chmod(0o400),
    "a folder": lambda path, rng: _instead(path, lambda new: new.mkdir()),
    "a link to nothing": lambda path, rng: _instead(path, lambda new: new.symlink_to("nowhere/x")),
    "a link to itself": lambda path, rng: _instead(path, lambda new: new.symlink_to(new.name)),
    "a link to another file": lambda path, rng: _instead(path, lambda new: new.symlink_to("../../pairs.jsonl")),
    "a named pipe": lambda path, rng: _instead(path, os.mkfifo),
    "an endless device": lambda path, rng: _instead(path, lambda new: new.symlink_to("/dev/zero")),
    "a table less": lambda path, rng: _sql(path, "DROP TABLE logps"),
    "no description": lambda path, rng: _sql(path, "DROP TABLE about"),
    "an empty description": lambda path, rng: _sql(path, "DELETE FROM about"),
    "a description that is a list": lambda path, rng: _sql(path, "UPDATE about SET description = '[]'"),
    "a description that is a number": lambda path, rng: _sql(path, "UPDATE about SET description = 7"),
    "a deep description": lambda path, rng: _sql(path, f"UPDATE about SET description = '{'[' * 50000}'"),
    "a description of odd parts": lambda path, rng: _sql(
        path, f"UPDATE about SET description = '{json.dumps({'adapter': 7, 'base': [], 'dtype': None})}'"
    ),
    "a description with control codes": lambda path, rng: _sql(
        path, "UPDATE about SET description = '{\"base\": \"\\u001b[31mred\"}'"
    ),
    "another column": lambda path, rng: _sql(path, "ALTER TABLE logps RENAME COLUMN crc TO sum"),
    "a column more": lambda path, rng: _sql(path, "ALTER TABLE logps ADD COLUMN more TEXT"),
    "texts for values": lambda path, rng: _sql(path, "UPDATE logps SET value = 'x'"),
    "wrong checksums": lambda path, rng: _sql(path, "UPDATE logps SET crc = crc + 1"),
    "a later version": lambda path, rng: _sql(path, "PRAGMA user_version = 99"),
    "write-ahead logging": lambda path, rng: _sql(path, "PRAGMA journal_mode = WAL"),
    "a view for a table": lambda path, rng: _sql(
        path, "ALTER TABLE logps RENAME TO kept", "CREATE VIEW logps AS SELECT * FROM kept"
    ),
    "a journal of something else": lambda path, rng: Path(f"{path}-journal").write_bytes(rng.randbytes(4096)),
    "a journal that is a folder": lambda path, rng: _beside(path, "-journal", lambda new: new.mkdir()),
    "a lock that is a folder": lambda path, rng: _beside(path, ".lock", lambda new: new.mkdir()),
    "a lock that is a link to nothing": lambda path, rng: _beside(path, ".lock", lambda new: new.symlink_to("no/x")),
    "a reference folder that is a file": lambda path, rng: _instead_of_folder(path.parent, lambda new: new.touch()),
    "a reference folder that is a link": lambda path, rng: _instead_of_folder(
        path.parent, lambda new: new.symlink_to("../base")
    ),
    "a cache folder that is a file": lambda path, rng: _instead_of_folder(path.parents[1], lambda new: new.touch()),
    "odd files beside": lambda path, rng: [
        (path.parent / name).write_bytes(rng.randbytes(99))
        for name in ("x.sqlite", ".sqlite", "y.corrupt-1", "z.corrupt-x", "\x1b[31m.sqlite", "é.sqlite")
    ],
    "folders beside": lambda path, rng: [
        (path.parent / name).mkdir() for name in ("x.sqlite", "y.corrupt-1", "z.sqlite.lock")
    ],
    "bases that are files": lambda path, rng: _odd_bases(path.parents[1]),
}  # fmt: skip


def _beside(path: Path, ending: str, build: Callable[[Path], object]) -> None:
    place = Path(f"{path}{ending}")
    place.unlink(missing_ok=True)
    build(place)


def _odd_bases(folder: Path) -> None:
    bases = folder / "bases"
    bases.mkdir(exist_ok=True)
    (bases / "a file").touch()
    (bases / "a link").symlink_to("nowhere")
    (bases / "a link out").symlink_to("../../base")
    (bases / "a folder").mkdir()
    os.mkfifo(bases / "a folder" / "pipe")
