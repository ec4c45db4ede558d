"""The cache of reference log-probs: one SQLite file per loaded base, one row per answer.

A value depends only on the reference's weights as loaded, its config, the way it is computed, and the token ids. The
ids are the row's key, all else forms the identity that names the file. Template, truncation, system prompt and
tokenizer matter only through the ids.
"""

import hashlib
import json
import os
import shlex
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock

from qdpo.data.tokens.sieve import TokenPair
from qdpo.errors import DiskError

# Increase when the rule that turns ids into log-probs changes (shift, mask, precision of the sums).
SCORING_RULE = 1

# SQLite result codes for the disk, permissions or another process. All other codes mean damaged content.
OF_THE_DISK = {
    sqlite3.SQLITE_PERM, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOLFS, sqlite3.SQLITE_AUTH,
}  # fmt: skip
UNREADABLE = {sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ}
# Error messages quote a damaged schema, which may not be text.
ERRORS = (sqlite3.DatabaseError, UnicodeDecodeError)
WAIT_S = 60

_Result = TypeVar("_Result")
_described: dict[str, dict[str, Any]] = {}


def identity(weights: str, adapter: str | None, path: dict[str, Any]) -> str:
    """Name of a reference: hex digest over the checksums of its weights and start adapter, and the way of computing.

    `path` is that way: compute type, attention path, device, digest of the config (not before 0.2.0), kernel packages.
    """
    parts = {"weights": weights, "adapter": adapter, "rule": SCORING_RULE, **path}
    name = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    _described[name] = parts
    return name


def answer_keys(pair: TokenPair) -> tuple[bytes, bytes]:
    """Keys of the pair's chosen and rejected answer: sha256 of the answer's first position and all token ids."""

    def key(answer: np.ndarray) -> bytes:
        ids = np.concatenate([[len(pair.prompt)], pair.prompt, answer]).astype("<i4")
        return hashlib.sha256(ids.tobytes()).digest()

    return key(pair.chosen), key(pair.rejected)


def is_intact(key: Any, value: Any, crc: Any) -> bool:
    """True if a row is as stored under this key: a damaged index can lead to the row of another answer."""
    return isinstance(key, bytes) and isinstance(value, bytes) and _checksum(key, value) == crc


def is_damage(error: sqlite3.DatabaseError | UnicodeDecodeError, path: Path) -> bool:
    """True if the cause is the file's content, not its disk or its permissions."""
    if isinstance(error, UnicodeDecodeError):
        return True
    code = error.sqlite_errorcode
    if code in UNREADABLE or code & 0xFF not in OF_THE_DISK:
        return True
    # One flipped bit in the header forbids writing. SQLite also returns this after the file was renamed while open.
    is_read_only = code & 0xFF == sqlite3.SQLITE_READONLY and code != sqlite3.SQLITE_READONLY_DIRECTORY
    return is_read_only and os.access(path, os.W_OK)


class ReferenceCache:
    """float32 log-probs of every response token, by answer. Safe for concurrent processes; each `put` is one commit.

    A damaged row counts as absent. When damage to the file shows, the file is renamed *.corrupt-TIME, `say` reports it,
    and a new file is created; other processes notice and switch to the new file.
    Raises: DiskError, from every method, if the file cannot be read or written.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        older: str | None = None,
        base: str = "",
        say: Callable[[str], None] = lambda line: None,
    ):
        """`base` is the model's name, stored in the file with the parts of the identity, for people to read.

        `older` is the name of the same reference by the rule of an earlier version.
        """
        self._older = (folder, older)
        self.path = folder / "reference" / f"{name}.sqlite"
        command = f"qdpo cache clear {name[:12]} --dir {shlex.quote(str(folder))}"
        self.way_out = f"Remove it with `{command}`; then the same command computes it again."
        self._about = json.dumps({"base": base, **_described.get(name, {})})
        self._say = say
        self._threads = threading.Lock()
        self._processes = FileLock(f"{self.path}.lock", timeout=WAIT_S)  # held to create a file and to set one aside
        self._database: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._guarded(lambda database: None)

    def get(self, pair: TokenPair) -> tuple[np.ndarray, np.ndarray] | None:
        """Log-probs of the chosen and the rejected tokens, or None if either is absent or damaged."""
        keys, found = answer_keys(pair), []
        query = "SELECT value, crc FROM logps WHERE key = ?"
        rows = self._guarded(lambda database: [database.execute(query, (key,)).fetchone() for key in keys])
        for key, row, length in zip(keys, rows, (len(pair.chosen), len(pair.rejected)), strict=True):
            if row is None or not is_intact(key, *row) or len(row[0]) != 4 * length:
                return None
            found.append(np.frombuffer(row[0], dtype="<f4"))
        return found[0], found[1]

    def put(self, scored: Iterable[tuple[TokenPair, np.ndarray, np.ndarray]]) -> None:
        """Stores the log-probs of a batch of pairs in one transaction."""
        rows = []
        for pair, chosen, rejected in scored:
            for key, logps in zip(answer_keys(pair), (chosen, rejected), strict=True):
                value = logps.astype("<f4").tobytes()
                rows.append((key, value, _checksum(key, value)))

        def write(database: sqlite3.Connection) -> None:
            with database:
                database.executemany("INSERT OR REPLACE INTO logps VALUES (?, ?, ?)", rows)

        self._guarded(write)

    def older(self) -> "ReferenceCache | None":
        """The file of an earlier version, if there is one."""
        folder, name = self._older
        if name is None or not (folder / "reference" / f"{name}.sqlite").exists():
            return None
        return ReferenceCache(folder, name, say=self._say)

    def close(self) -> None:
        with self._threads:
            self._disconnect()

    def _guarded(self, act: Callable[[sqlite3.Connection], _Result]) -> _Result:
        """Runs `act` on the current file and returns its result. All handling of damage and disk errors is here."""
        with self._threads:
            try:
                try:
                    return act(self._connected())
                except ERRORS as error:
                    if not is_damage(error, self.path):
                        raise
                    self._set_aside(error)
                    return act(self._connected())
            except (*ERRORS, OSError) as error:
                raise DiskError(
                    f"Cannot use the reference cache {self.path}: {error}. Rows stored earlier are safe. Free some "
                    "space, fix the permissions, or set another `cache.dir`; then run the same command again."
                ) from error

    def _connected(self) -> sqlite3.Connection:
        """An open connection. A renamed file is abandoned: its journal's name belongs to the file that replaced it."""
        if self._database is not None and _file_id(self.path) == self._file:
            return self._database
        self._disconnect()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._processes:
            self.path.touch()  # the time of last use; fails here if the file is read-only
            self._file = _file_id(self.path)
            database = sqlite3.connect(self.path, timeout=WAIT_S, check_same_thread=False)
            try:
                self._prepare(database)
            except BaseException:
                database.close()
                raise
            self._database = database
        return database

    def _prepare(self, database: sqlite3.Connection) -> None:
        database.text_factory = bytes  # damage can turn a blob into text
        # Not WAL: it is unsafe on network disks. TRUNCATE with FULL costs about a millisecond a commit.
        database.execute("PRAGMA journal_mode=TRUNCATE")
        database.execute("PRAGMA synchronous=FULL")
        with database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, value BLOB NOT NULL, crc INTEGER NOT NULL)"
            )
            database.execute("CREATE TABLE IF NOT EXISTS about (description TEXT NOT NULL)")
            database.execute("INSERT INTO about SELECT ? WHERE NOT EXISTS (SELECT 1 FROM about)", (self._about,))

    def _disconnect(self) -> None:
        if self._database is not None:
            with suppress(sqlite3.Error):
                self._database.close()
        self._database = None

    def _set_aside(self, error: Exception) -> None:
        """Renames the damaged file and its journal, unless another process has already done so."""
        self._disconnect()
        with self._processes:
            if _file_id(self.path) != self._file:
                return
            seconds = int(time.time())
            while (aside := self.path.with_suffix(f".corrupt-{seconds}")).exists():
                seconds += 1
            self.path.rename(aside)
            journal = Path(f"{self.path}-journal")
            if journal.exists():  # otherwise it would be rolled back into the next file
                journal.rename(f"{aside}-journal")
        self._say(f"reference: {self.path} is damaged ({error}); kept as {aside.name}, its values are computed again")


def _checksum(key: bytes, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(key))


def _file_id(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
