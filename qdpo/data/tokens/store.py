"""Stores prepared pairs on disk: token ids in a memory-mapped file, which is never read whole."""

import json
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import IO, Any, overload

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from qdpo.errors import DataError, DiskError
from qdpo.run import disk, places

Ids = npt.NDArray[np.int32]
MOST_HEADER = 2**20
"""Bytes of the header of a file of pairs: three tensors need some 200."""


@dataclass(frozen=True, eq=False)
class TokenPair:
    """One prompt and two responses as ids; prompt + response is what the model reads."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    row: int
    """Row of the data set, counted from 1."""

    @property
    def tokens(self) -> int:
        """Tokens of prompt + chosen + rejected, as in a shared-prompt row."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over lengths and ids; independent of the pair's place in the data."""
        return digest_of(self.prompt, self.chosen, self.rejected).hex()


def digest_of(*arrays: Ids) -> bytes:
    """SHA-256 over the lengths and the ids of several arrays."""
    lengths = np.array([len(ids) for ids in arrays], np.int32)
    return sha256(b"".join(ids.astype("<i4").tobytes() for ids in (lengths, *arrays))).digest()


class PairStore(Sequence[TokenPair]):
    """Pairs whose ids are stored in one array, usually mapped from a file; each pair is made when it is indexed."""

    def __init__(self, ids: Ids, starts: npt.NDArray[np.int64], lengths: Ids, rows: npt.NDArray[np.int64]):
        self._ids, self._starts, self.lengths, self.rows = ids, starts, lengths, rows

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, place: int) -> TokenPair: ...
    @overload
    def __getitem__(self, place: slice) -> "PairStore": ...
    def __getitem__(self, place: int | slice) -> "TokenPair | PairStore":
        if isinstance(place, slice):
            return self.select(np.arange(len(self))[place])
        start = int(self._starts[place])
        prompt, chosen, rejected = map(int, self.lengths[place])
        ids = self._ids[start : start + prompt + chosen + rejected]
        return TokenPair(ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :], int(self.rows[place]))

    def are_within(self, vocab_size: int) -> bool:
        """True if no id of the file is outside the vocabulary; other pairs of the same file count too."""
        return not self._ids.size or (int(self._ids.min()) >= 0 and int(self._ids.max()) < vocab_size)

    def select(self, places: Sequence[int] | npt.NDArray[Any]) -> "PairStore":
        """The pairs at these places, in this order; a place may occur several times."""
        at = np.asarray(places, np.int64)
        return PairStore(self._ids, self._starts[at], self.lengths[at], self.rows[at])


class Spool:
    """Writes pairs, as they are found, to a temporary file in `folder`; their rows are kept in memory."""

    def __init__(self, folder: Path | None = None):
        self._place = folder or Path(tempfile.gettempdir())
        with _disk_errors(self._place):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, prefix="qdpo-")
        weakref.finalize(self, _close, self._file)  # a mapping of the file outlives it
        self._starts, self._lengths, self.rows, self._end = array("q"), array("i"), array("q"), 0

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, pair: TokenPair) -> int:
        """Append a pair; return its index. Raises: DiskError."""
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            with _disk_errors(self._place):
                self._file.write(ids.tobytes())
            self._lengths.append(len(ids))
        self._starts.append(self._end)
        self.rows.append(pair.row)
        self._end += pair.tokens
        return len(self.rows) - 1

    def store(self, order: Iterable[int]) -> PairStore:
        """The pairs with these indices. Raises: DiskError."""
        with _disk_errors(self._place):
            self._file.flush()
        ids = np.memmap(self._file, np.int32, "r", shape=(self._end,)) if self._end else np.zeros(0, np.int32)
        lengths = np.array(self._lengths, np.int32).reshape(-1, 3)
        starts, rows = np.array(self._starts, np.int64), np.array(self.rows, np.int64)
        return PairStore(ids, starts, lengths, rows).select(list(order))


def _close(file: IO[bytes]) -> None:
    with suppress(OSError):  # what a full disk has refused is refused again
        file.close()


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise disk.disk_error(error, folder) from error


def save_pairs(path: Path, pairs: Sequence[TokenPair]) -> None:
    """Write the pairs into one safetensors file, atomically, one pair at a time. Raises: DiskError."""
    lengths = np.array([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs], "<i4").reshape(len(pairs), 3)
    rows = np.array([pair.row for pair in pairs], "<i8")
    header, end = {}, 0
    parts = (("rows", "I64", rows.shape), ("lengths", "I32", lengths.shape), ("ids", "I32", (int(lengths.sum()),)))
    for name, kind, shape in parts:
        start, end = end, end + int(np.prod(shape)) * int(kind[1:]) // 8
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def fill(file: IO[bytes]) -> None:
        file.write(len(text).to_bytes(8, "little") + text + rows.tobytes() + lengths.tobytes())
        for pair in pairs:
            for ids in (pair.prompt, pair.chosen, pair.rejected):
                file.write(ids.astype("<i4").tobytes())

    disk.write_stream(path, fill)


def load_pairs(path: Path) -> PairStore:
    """The pairs of `save_pairs`, byte for byte. Raises: DataError if the file is missing, damaged or another kind."""
    return load_checked(path, None)


def load_checked(path: Path, sha256: str | None) -> PairStore:
    """As load_pairs. Raises: DataError also if the file's digest is not the given one."""
    try:
        places.check_file(path, may_link=True)
        with path.open("rb") as raw:
            if sha256 is not None and file_digest(raw, "sha256").hexdigest() != sha256:
                raise damaged_pairs(path, "its contents do not match the sha256 in run.json")
            raw.seek(0)
            size = int.from_bytes(raw.read(8), "little")
            if size > MOST_HEADER:
                raise ValueError(f"its header claims {size:,} bytes")
            header = disk.parse(raw.read(size).decode())
        with safe_open(path, "numpy") as file:  # checks the header against the size of the file
            lengths, rows = file.get_tensor("lengths"), file.get_tensor("rows")
        kinds = {name: (header[name]["dtype"], len(header[name]["shape"])) for name in ("lengths", "rows", "ids")}
        if kinds != {"lengths": ("I32", 2), "rows": ("I64", 1), "ids": ("I32", 1)}:
            raise ValueError(f"its tensors are {kinds}")
        count = int(header["ids"]["shape"][0])
        if lengths.shape != (len(rows), 3) or (lengths < 0).any() or int(lengths.sum(dtype=np.int64)) != count:
            raise ValueError("its lengths do not fit its ids")
        place = 8 + size + header["ids"]["data_offsets"][0]
        ids = np.memmap(path, np.int32, "r", place, (count,)) if count else np.zeros(0, np.int32)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, IndexError, DiskError) as error:
        raise damaged_pairs(path, f"it is not a file of prepared pairs ({error})") from error
    totals = lengths.sum(1, dtype=np.int64)
    return PairStore(ids, totals.cumsum() - totals, lengths, rows)


def damaged_pairs(path: Path, problem: str) -> DataError:
    """The error for a file of prepared pairs that is not as it was written."""
    return DataError(
        f"{path} cannot be used: {problem}. Put the file back from a copy, or start the run again with `--fresh` (the "
        "old run is kept aside)."
    )
