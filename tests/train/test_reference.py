"""The reference cache: damage of every kind, several processes, kills, full disks, and the check of what it holds."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from qdpo.data.tokens.sieve import TokenPair
from qdpo.errors import DiskError, VerificationError
from qdpo.run import identity
from qdpo.settings import layered
from qdpo.train.keep.stop import catch_signals
from qdpo.train.policy import reference_cache
from qdpo.train.policy.reference_cache import ReferenceCache
from qdpo.train.start.open_run import Job, open_run
from tests.conftest import ROOT, Quiet, arguments, qdpo

Values = list[tuple[np.ndarray, np.ndarray]]
ALONE = {
    "memory__tokens_per_row": "0",
    "train__epochs": "1",
    "data__limit": "16",
}  # a row is a pair, so that equal values have equal bits


def some_pairs(count: int = 12) -> list[TokenPair]:
    draw = np.random.default_rng(0)
    return [
        TokenPair(*(draw.integers(0, 400, length).astype(np.int32) for length in (9, 20, 20)), row)
        for row in range(1, count + 1)
    ]


def some_values(pairs: list[TokenPair]) -> Values:
    draw = np.random.default_rng(1)
    return [tuple(-draw.random(20, dtype=np.float32) for _ in range(2)) for _ in pairs]


PAIRS = some_pairs()
VALUES = some_values(PAIRS)


def fill(cache: ReferenceCache, pairs: list[TokenPair] = PAIRS) -> None:
    """As a run does: what is absent is computed and stored."""
    for pair, (chosen, rejected) in zip(PAIRS, VALUES, strict=True):
        if pair in pairs and cache.get(pair) is None:
            cache.put([(pair, chosen, rejected)])


def wrong(cache: ReferenceCache) -> list[int]:
    """Rows whose values are not those stored; absent ones are not wrong."""
    found = [cache.get(pair) for pair in PAIRS]
    return [
        pair.row
        for pair, values, mine in zip(PAIRS, VALUES, found, strict=True)
        if mine is not None and not all(map(np.array_equal, values, mine))
    ]


def complete(cache: ReferenceCache) -> bool:
    return not wrong(cache) and all(cache.get(pair) is not None for pair in PAIRS)


@pytest.fixture
def clean(tmp_path: Path) -> bytes:
    """The bytes of a whole cache file."""
    cache = ReferenceCache(tmp_path / "clean", "name")
    fill(cache)
    cache.close()
    return cache.path.read_bytes()


def set_aside(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.corrupt-*") if not path.name.endswith("-journal")]


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def place_of(content: bytes, part: bytes, *, last: bool = False) -> int:
    """First bit of `part` in the file."""
    return 8 * (content.rindex(part) if last else content.index(part))


KEY = reference_cache.answer_keys(PAIRS[3])[0]
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "two thirds": lambda content: content[: 2 * len(content) // 3],
    "half a page": lambda content: content[:2000],
    "zero bytes": lambda content: b"",
    "garbage": lambda content: random.Random(0).randbytes(len(content)),
    "garbage after the header": lambda content: content[:100] + random.Random(0).randbytes(len(content) - 100),
    "zeros in the middle": lambda content: content[:4096] + bytes(len(content) - 4096),
    "magic": lambda content: flipped(content, 3),
    "page size": lambda content: flipped(content, 16 * 8 + 4),
    "write version": lambda content: flipped(content, 18 * 8 + 4),
    "schema format": lambda content: flipped(content, 47 * 8 + 5),
    "text encoding": lambda content: flipped(content, 59 * 8 + 1),
    "schema text": lambda content: flipped(content, place_of(content, b"value BLOB")),
    "key": lambda content: flipped(content, place_of(content, KEY)),
    "key in the index": lambda content: flipped(content, place_of(content, KEY, last=True)),
    "type of a value": lambda content: flipped(content, place_of(content, KEY) - 16),  # text, where it was a blob
    "value": lambda content: flipped(content, place_of(content, VALUES[3][0].tobytes())),
    "largest bit of a value": lambda content: flipped(content, place_of(content, VALUES[3][0].tobytes()) + 30),
}


@pytest.mark.parametrize("when", ["before", "open"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_never_gives_a_wrong_value(clean: bytes, tmp_path: Path, kind: str, when: str) -> None:
    said: list[str] = []
    path = tmp_path / "reference" / "name.sqlite"
    path.parent.mkdir()
    path.write_bytes(DAMAGE[kind](clean) if when == "before" else clean)
    cache = ReferenceCache(tmp_path, "name", say=said.append)
    if when == "open":
        assert cache.get(PAIRS[0]) is not None
        path.write_bytes(DAMAGE[kind](clean))
    for _ in range(2):  # what SQLite had read before the damage shows only to the one who opens the file next
        assert wrong(cache) == []
        fill(cache)
        assert complete(cache)
        cache.close()
        cache = ReferenceCache(tmp_path, "name", say=said.append)
    aside = set_aside(path.parent)
    assert len(said) == len(aside) <= 1 and all("is damaged" in line and "computed again" in line for line in said)
    assert complete(cache)


def test_no_flipped_bit_gives_a_wrong_value_or_an_error(clean: bytes, tmp_path: Path) -> None:
    draw = random.Random(0)
    bits = draw.sample(range(800), 60) + draw.sample(range(800, 8 * len(clean)), 60)
    for number, bit in enumerate(bits):
        folder = tmp_path / str(number)
        path = folder / "reference" / "name.sqlite"
        path.parent.mkdir(parents=True)
        path.write_bytes(flipped(clean, bit))
        cache = ReferenceCache(folder, "name")
        assert wrong(cache) == [], bit
        fill(cache)
        assert complete(cache), bit
        cache.close()


def test_a_row_under_another_key_is_not_taken(tmp_path: Path) -> None:
    """As a damaged index would lead to it: whole, with a checksum, of the same length."""
    cache = ReferenceCache(tmp_path, "name")
    fill(cache)
    keys = [key for pair in PAIRS[:2] for key in reference_cache.answer_keys(pair)]
    with sqlite3.connect(cache.path) as other:
        rows = [other.execute("SELECT value, crc FROM logps WHERE key = ?", (key,)).fetchone() for key in keys]
        for key, row in zip(keys, reversed(rows), strict=True):
            other.execute("UPDATE logps SET value = ?, crc = ? WHERE key = ?", (*row, key))
    assert cache.get(PAIRS[0]) is cache.get(PAIRS[1]) is None and cache.get(PAIRS[2]) is not None


def test_one_sets_aside_what_others_have_open(clean: bytes, tmp_path: Path) -> None:
    said: list[str] = []
    reader, writer, late = (ReferenceCache(tmp_path, "name", say=said.append) for _ in range(3))
    fill(writer, PAIRS[:6])
    assert reader.get(PAIRS[0]) is not None
    with writer.path.open("r+b") as file:
        file.write(flipped(clean, 3))
    finder = ReferenceCache(tmp_path, "name", say=said.append)
    fill(finder, PAIRS[:8])
    assert reader.get(PAIRS[7]) is not None
    fill(writer, PAIRS[6:10])
    late._set_aside(sqlite3.DatabaseError("seen before the other set the file aside"))
    assert late.get(PAIRS[9]) is not None
    fill(late)
    assert all(map(complete, (reader, writer, late, finder))) and len(said) == len(set_aside(writer.path.parent)) == 1


def test_a_cleared_file_is_begun_anew(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, "name")
    fill(cache)
    shutil.rmtree(cache.path.parent)
    assert cache.get(PAIRS[0]) is None
    fill(cache)
    assert complete(cache)


def test_a_full_disk_loses_nothing_and_is_no_damage(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, "name")
    fill(cache, PAIRS[:6])
    cache._connected().execute("PRAGMA max_page_count=1")
    with pytest.raises(DiskError, match="database or disk is full.*Rows stored earlier are safe") as full:
        for _ in range(100):
            cache.put([(pair, *values) for pair, values in zip(some_pairs(400)[12:], VALUES * 40, strict=False)])
    assert full.value.exit_code == 6 and "\n" not in str(full.value)
    assert not set_aside(cache.path.parent)
    again = ReferenceCache(tmp_path, "name")
    assert [again.get(pair) is not None for pair in PAIRS] == [True] * 6 + [False] * 6 and not wrong(again)


def test_a_busy_file_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_cache, "WAIT_S", 0.1)
    cache = ReferenceCache(tmp_path, "name")
    fill(cache)
    other = sqlite3.connect(cache.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(DiskError, match="database is locked"):
        cache.get(PAIRS[0])
    other.execute("ROLLBACK")
    assert complete(cache)


@pytest.fixture
def unprivileged() -> Iterator[Path]:
    """A folder of this test's own, and no right to write where the mode forbids it."""
    root = os.geteuid() == 0
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    if root:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o777)
        shutil.rmtree(folder)


@pytest.mark.parametrize("before", ["empty", "filled"])
def test_a_read_only_folder(unprivileged: Path, before: str) -> None:
    places = unprivileged / "cache" / "reference"
    places.mkdir(parents=True)
    if before == "filled":
        fill(ReferenceCache(unprivileged / "cache", "name"), PAIRS[:6])
        for path in places.iterdir():
            path.chmod(0o444)
    places.chmod(0o555)
    with pytest.raises(DiskError, match="Cannot use the reference cache .*`cache.dir`") as refused:
        ReferenceCache(unprivileged / "cache", "name")
    assert refused.value.exit_code == 6 and "\n" not in str(refused.value) and not set_aside(places)


@contextmanager
def opened(settings: dict[str, str], **changes: str) -> Iterator[tuple[Job, Quiet]]:
    """A run just before its reference pass."""
    watcher = Quiet()
    resolved = layered.resolve(arguments(settings, **changes))
    with catch_signals(watcher.say) as stop:
        job = open_run(resolved, identity.run_folder(resolved), watcher, stop)
        try:
            yield job, watcher
        finally:
            job.scorer.cache.close()


Known = dict[str, tuple[np.ndarray, np.ndarray]]


def scored(settings: dict[str, str], **changes: str) -> tuple[Known, Quiet, int]:
    """The reference of a run after its reference pass, what was said, and how many pairs were computed."""
    with opened(settings, **changes) as (job, watcher):
        job.scorer.fill(job.train, job.held_out)
        return job.scorer.known, watcher, dict(watcher.stages).get("reference log-probs", 0)


def equal(left: Known, right: Known) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(a, b) for name in left for a, b in zip(left[name], right[name], strict=True)
    )


def test_runs_on_a_damaged_cache_equal_those_on_a_clean_one(settings: dict[str, str]) -> None:
    golden, first, computed = scored(settings, **ALONE)
    assert computed == 16 and "recomputed" not in first.text
    path = next(Path(settings["cache.dir"]).glob("reference/*.sqlite"))
    clean = path.read_bytes()
    lost: Callable[[bytes], int] = lambda content: place_of(content, next(iter(golden.values()))[0].tobytes())  # noqa: E731
    kinds = {
        "value": (lambda content: flipped(content, lost(content)), 1),
        "two thirds": (DAMAGE["two thirds"], None),
        "magic": (DAMAGE["magic"], 16),
    }
    for kind, (damage, expected) in kinds.items():
        path.write_bytes(damage(clean))
        known, watcher, computed = scored(settings, output__name=kind, **ALONE)
        assert equal(known, golden), kind
        assert computed == (expected or computed) > 0, kind
        assert ("is damaged" in watcher.text) == (kind != "value")
        assert ("cached pairs recomputed, largest difference 0 nats" in watcher.text) == (computed < 16)
        path.with_suffix(".sqlite").write_bytes(clean)


def test_what_happens_to_the_file_later_does_not_reach_the_run(settings: dict[str, str]) -> None:
    with opened(settings, **ALONE) as (job, _):
        job.scorer.fill(job.train, job.held_out)
        before = [job.scorer.reference(pair) for pair in job.train]
        job.scorer.cache.path.write_bytes(b"")
        assert all(job.scorer.reference(pair) is mine for pair, mine in zip(job.train, before, strict=True))


def test_cached_pairs_are_checked(settings: dict[str, str], tmp_path: Path) -> None:
    _, first, _ = scored(settings, **ALONE)
    assert "recomputed" not in first.text
    _, second, computed = scored(
        settings, output__name="second", **{**ALONE, "memory__tokens_per_row": "auto"}
    )  # in rows of several pairs
    assert computed == 0 and "reference: 3 cached pairs recomputed, largest difference" in second.text
    with opened(settings, output__name="third", **ALONE) as (job, _):
        pairs = [*job.train, *job.held_out]
        for offset, accepted in ((1e-5, True), (1e-4, False)):
            job.scorer.cache.put((pair, *(part + np.float32(offset) for part in golden)) for pair, golden in (
                (pair, job.scorer._score(row)[0][1:]) for pair in pairs for row in [one_row(pair)]
            ))  # fmt: skip
            job.scorer.known.clear()
            if accepted:
                job.scorer.fill(pairs)
                continue
            with pytest.raises(VerificationError, match="does not belong to this model: .* nats a token") as refused:
                job.scorer.fill(pairs)
    message = str(refused.value)
    assert refused.value.exit_code == 7 and str(job.scorer.cache.path) in message and "0.0001 nats" in message
    command = message.split("`")[1].split()
    assert command[:3] == ["qdpo", "cache", "clear"]
    cleared = qdpo(*command[1:], cwd=tmp_path)
    assert cleared.returncode == 0 and "freed" in cleared.stdout, cleared.stderr
    assert scored(settings, output__name="fourth", **ALONE)[2] == 16


def one_row(pair: TokenPair) -> object:
    from qdpo.data.tokens.pack import PairRow

    return PairRow([pair])


def test_what_changes_the_reference_is_computed_anew_and_nothing_else(settings: dict[str, str]) -> None:
    """Beside test_whole_run.py: base weights, nf4 and tokens miss; beta, rank, learning rate and seed hit."""
    base = {**ALONE, "model__quantization": "nf4"}
    golden, _, computed = scored(settings, output__name="first", **base)
    assert computed == 16
    lengths = sorted(len(part) for parts in golden.values() for part in parts)
    misses = {
        "fp4": ({"model__quantization": "fp4"}, 16),
        "dtype": ({"model__dtype": "bf16"}, 16),
        "attention": ({"model__attention": "eager"}, 16),
        "cut": ({"data__max_tokens": "38", "data__max_drop_fraction": "1"}, None),
    }
    for name, (change, expected) in misses.items():
        known, watcher, computed = scored(settings, output__name=name, **{**base, **change})
        if expected is None:
            assert 0 < computed < 16, watcher.text
            assert max(len(part) for parts in known.values() for part in parts) < lengths[-1]
        else:
            assert computed == expected, name
    assert scored(settings, output__name="loss", **base, loss__name="ipo")[2] == 0


def with_config(base: Path, folder: Path, **values: object) -> str:
    """A copy of a model's folder with the same weights and other values in its config.json."""
    other = Path(shutil.copytree(base, folder))
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps({**config, **values}), encoding="utf-8")
    return str(other)


def test_a_config_that_changes_the_numbers_has_its_own_file(settings: dict[str, str], tmp_path: Path) -> None:
    base = Path(settings["model.path"])
    assert scored(settings, **ALONE)[2] == 16
    alike = with_config(base, tmp_path / "alike", attention_dropout=0.1, architectures=None, use_cache=False)
    assert scored(settings, output__name="alike", model__path=alike, **ALONE)[2] == 0
    other = with_config(base, tmp_path / "other", rms_norm_eps=1e-2)
    assert scored(settings, output__name="other", model__path=other, **ALONE)[2] == 16
    assert len(list(Path(settings["cache.dir"]).glob("reference/*.sqlite"))) == 2


def as_before(settings: dict[str, str], **changes: str) -> tuple[Path, Known]:
    """The run's reference under the name that version 0.1.0 gave it, and its values."""
    with opened(settings, **{**ALONE, **changes}) as (job, _):
        job.scorer.fill(job.train, job.held_out)
        path = job.scorer.cache.path
    return path.rename(path.with_name(f"{job.loaded.older_name}.sqlite")), job.scorer.known


def test_values_of_an_earlier_version_are_taken_over(settings: dict[str, str]) -> None:
    older, golden = as_before(settings)
    content = older.read_bytes()
    known, watcher, computed = scored(settings, output__name="second", **ALONE)
    assert equal(known, golden) and computed == 0 and "16 pairs taken over" in watcher.text
    assert "no pass needed (all 16 pairs" in watcher.text and older.read_bytes() == content
    (copy,) = (path for path in older.parent.glob("*.sqlite") if path != older)
    with sqlite3.connect(copy) as new, sqlite3.connect(older) as old:
        rows = [set(database.execute("SELECT key, value, crc FROM logps")) for database in (new, old)]
    new.close(), old.close()
    assert rows[0] == rows[1] and len(rows[0]) == 32


def test_values_of_another_config_are_not_taken_over(settings: dict[str, str], tmp_path: Path) -> None:
    other = with_config(Path(settings["model.path"]), tmp_path / "other", rms_norm_eps=1e-2)
    older, _ = as_before(settings, model__path=other)
    _, watcher, computed = scored(settings, output__name="second", **ALONE)
    assert computed == 16 and f"{older.name}, which an earlier version" in watcher.text
    assert "so its values are not used" in watcher.text


def test_the_longest_pairs_of_an_earlier_version_are_among_those_checked(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window that is shorter than only the longest pair shows there alone."""
    older, _ = as_before(settings)
    with opened(settings, output__name="second", **ALONE) as (job, _):
        pairs = [*job.train, *job.held_out]
        longest = max(reversed(pairs), key=lambda pair: len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)))
        cache = ReferenceCache(Path(settings["cache.dir"]), older.stem)
        values = cache.get(longest)
        assert values is not None
        cache.put([(longest, values[0] + np.float32(0.01), values[1])])
        cache.close()
        monkeypatch.setattr("qdpo.train.policy.reference_fill.CHECKED_OLDER_PAIRS", 2)
        monkeypatch.setattr(type(job.scorer), "_drawn", lambda self, count, wanted: {0})
        job.scorer.fill(pairs)
        assert job.watcher.text.count("so its values are not used") == 1
        assert not np.array_equal(job.scorer.known[longest.digest][0], values[0] + np.float32(0.01))


FILLS = """
import json, os, random, signal, sys
from pathlib import Path
from qdpo.train.policy.reference_cache import ReferenceCache
from tests.train.test_reference import scored

settings, changes, computed, kill_at, seed = json.loads(sys.argv[1])
put, calls = ReferenceCache.put, 0

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def counted(self, scored):
    global calls
    scored, calls = list(scored), calls + 1
    with Path(computed).open("a") as file:
        file.write(f"{len(scored)}\\n")
    if calls == kill_at:
        # Before the transaction, or at some instruction inside it.
        self._connected().set_progress_handler(kill, random.Random(seed).randrange(1, 60))
    put(self, scored)
    if calls == kill_at:
        kill()

ReferenceCache.put = counted
scored(settings, **changes)
"""


def fills(settings: dict[str, str], computed: Path, changes: dict[str, str], *, kill_at: int = -1, seed: int = 0):  # noqa: ANN201
    """A process that makes a run's reference pass, and is killed in its `kill_at`-th `put`."""
    job = json.dumps([settings, changes, str(computed), kill_at, seed])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-c", FILLS, job], env=environment, stderr=subprocess.PIPE, text=True)


def test_a_killed_pass_computes_at_most_one_row_again(settings: dict[str, str], tmp_path: Path) -> None:
    golden, _, _ = scored({**settings, "cache.dir": str(tmp_path / "golden")}, output__name="golden", **ALONE)
    draw = random.Random(0)
    for kill in range(2):
        process = fills(settings, tmp_path / "computed", ALONE, kill_at=draw.randrange(2, 5), seed=kill)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == -signal.SIGKILL, errors
    before = sum(map(int, (tmp_path / "computed").read_text().split()))
    known, _, rest = scored(settings, **ALONE)
    assert equal(known, golden) and before > 0 and before + rest <= 16 + 2, (before, rest)


def test_two_processes_share_a_cache(settings: dict[str, str], tmp_path: Path) -> None:
    golden, _, _ = scored({**settings, "cache.dir": str(tmp_path / "golden")}, output__name="golden", **ALONE)
    both = [fills(settings, tmp_path / name, {**ALONE, "output__name": name}) for name in ("one", "two")]
    for process in both:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    known, _, computed = scored(settings, output__name="third", **ALONE)
    assert computed == 0 and equal(known, golden)
