"""The cache of reference log-probs: an SQLite file for each loaded base, a row for each answer.

A value depends on the reference's weights as loaded, on how it is computed, and on the token ids; nothing else. The
first two are the identity that names the file, the ids are the row's key. Template, truncation, system prompt and
tokenizer act only through the ids.
"""

import hashlib
import json
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from qdpo.data.tokens import TokenPair
from qdpo.errors import DiskError

# Raise it when the rule that turns ids into log-probs changes (shift, mask, precision of the sums).
SCORING_RULE = 1


def identity(weights: str, adapter: str | None, path: dict[str, Any]) -> str:
    """Name of a reference: hex digest of its weights' checksum, its start adapter's, and the way of computing."""
    text = json.dumps({"weights": weights, "adapter": adapter, "rule": SCORING_RULE, **path}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def answer_keys(pair: TokenPair) -> tuple[bytes, bytes]:
    """Keys of the pair's chosen and rejected answer: sha256 of where the answer starts and of all token ids."""

    def key(answer: np.ndarray) -> bytes:
        ids = np.concatenate([[len(pair.prompt)], pair.prompt, answer]).astype("<i4")
        return hashlib.sha256(ids.tobytes()).digest()

    return key(pair.chosen), key(pair.rejected)


class ReferenceCache:
    """float32 log-probs of every response token, by answer. Safe for several processes; each `put` is one commit."""

    def __init__(self, folder: Path, name: str):
        self.path = folder / "reference" / f"{name}.sqlite"
        self._lock = threading.Lock()  # a step's rows are looked up on another thread than an evaluation's
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except (OSError, sqlite3.OperationalError) as error:
            raise DiskError(
                f"Cannot open the reference cache {self.path}: {error}. Choose another folder with cache.dir=."
            ) from error

    def _open(self) -> None:
        try:
            self._connect()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise
            self.path.rename(self.path.with_suffix(f".corrupt-{int(time.time())}"))
            self._connect()

    def _connect(self) -> None:
        self._database = sqlite3.connect(self.path, timeout=60, check_same_thread=False)
        # Not WAL: it is unsafe on network disks. TRUNCATE with FULL costs about a millisecond a commit.
        self._database.execute("PRAGMA journal_mode=TRUNCATE")
        self._database.execute("PRAGMA synchronous=FULL")
        self._database.execute(
            "CREATE TABLE IF NOT EXISTS logps (key BLOB PRIMARY KEY, value BLOB NOT NULL, crc INTEGER NOT NULL)"
        )
        self._database.commit()

    def get(self, pair: TokenPair) -> tuple[np.ndarray, np.ndarray] | None:
        """Log-probs of the chosen and the rejected tokens, or None if either is absent or damaged."""
        found = []
        for key, length in zip(answer_keys(pair), (len(pair.chosen), len(pair.rejected)), strict=True):
            with self._lock:
                row = self._database.execute("SELECT value, crc FROM logps WHERE key = ?", (key,)).fetchone()
            if row is None or zlib.crc32(row[0]) != row[1] or len(row[0]) != 4 * length:
                return None
            found.append(np.frombuffer(row[0], dtype="<f4"))
        return found[0], found[1]

    def put(self, scored: Iterable[tuple[TokenPair, np.ndarray, np.ndarray]]) -> None:
        """Stores the log-probs of a batch of pairs in one transaction."""
        rows = []
        for pair, chosen, rejected in scored:
            for key, logps in zip(answer_keys(pair), (chosen, rejected), strict=True):
                blob = logps.astype("<f4").tobytes()
                rows.append((key, blob, zlib.crc32(blob)))
        with self._writing():
            self._database.executemany("INSERT OR REPLACE INTO logps VALUES (?, ?, ?)", rows)

    def missing(self, pairs: Iterable[TokenPair]) -> list[TokenPair]:
        """Those pairs that have no usable row, each once."""
        seen: dict[str, TokenPair] = {pair.digest: pair for pair in pairs}
        return [pair for pair in seen.values() if self.get(pair) is None]

    def close(self) -> None:
        self._database.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            with self._database:
                yield
        except sqlite3.OperationalError as error:
            raise DiskError(
                f"Cannot write the reference cache {self.path}: {error}. What was stored before is safe."
            ) from error
