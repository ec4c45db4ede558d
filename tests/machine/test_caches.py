"""`qdpo cache` as a user types it, on a folder with references, converted bases and damaged files."""

import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from qdpo.errors import ConfigError
from qdpo.machine.caches import clear_lines, list_lines
from qdpo.train.policy.reference_cache import ReferenceCache, answer_keys, identity
from tests.conftest import ROOT, qdpo
from tests.train.test_reference import PAIRS, VALUES, fill, flipped, place_of

PATH = {"dtype": "bf16", "attention": "spans, two SDPA calls", "device": "cuda"}
NAMES = [identity("first weights", None, PATH), identity("second weights", "0123456789abcdef", PATH)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two references, one file set aside, one converted base, traced layers, and a file that is not ours."""
    folder = tmp_path / "cache"
    for name, base, count in zip(NAMES, ("org/first", "org/second"), (12, 5), strict=True):
        one = ReferenceCache(folder, name, base=base)
        fill(one, PAIRS[:count])
        one.close()
    (folder / "reference" / "old.corrupt-17").write_bytes(bytes(5000))
    (folder / "bases" / "llama").mkdir(parents=True)
    (folder / "bases" / "llama" / "model.safetensors").write_bytes(bytes(3 * 2**20))
    (folder / "bases" / "llama.lock").touch()
    (folder / "forecast").mkdir()
    (folder / "forecast" / "0123.json").write_bytes(bytes(2048))
    (folder / "notes.txt").write_text("mine")
    return folder


def command(*words: str, cache: Path) -> subprocess.CompletedProcess[str]:
    return qdpo("cache", *words, cwd=cache.parent, QDPO_CACHE=str(cache))


def left(cache: Path) -> set[str]:
    return {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()}


def file_of(cache: Path, name: str) -> Path:
    return cache / "reference" / f"{name}.sqlite"


def test_ls_says_what_belongs_to_what(cache: Path) -> None:
    listed = command("ls", cache=cache)
    assert listed.returncode == 0, listed.stderr
    lines = {line.split()[0]: line for line in listed.stdout.splitlines() if line}
    for name, base, answers in zip(NAMES, ("org/first", "org/second"), ("24", "10"), strict=True):
        line = lines[name[:12]]
        assert base in line and line.split()[1] == answers and "bf16, spans, two SDPA calls, cuda" in line
    assert "adapter 0123456789ab" in lines[NAMES[1][:12]] and "adapter" not in lines[NAMES[0][:12]]
    assert "3.0 MiB" in lines["llama"] and "4.9 KiB" in lines["old.corrupt-17"]
    assert lines["forecast/"].split() == ["forecast/", "1", "2.0", "KiB"] and "notes" not in listed.stdout
    file_of(cache, NAMES[0]).write_bytes(b"not a database, and long enough to be none" * 100)
    assert "unreadable" in command("ls", "--dir", str(cache), cache=cache.parent).stdout
    assert "has no reference" in command("ls", "--dir", str(cache / "nowhere"), cache=cache).stdout


@pytest.mark.parametrize("kind", ["value", "key", "index", "header", "truncated"])
def test_verify_names_what_is_damaged_and_the_way_out(cache: Path, kind: str) -> None:
    whole = command("verify", cache=cache)
    assert whole.returncode == 0 and "24 answers, intact" in whole.stdout and "2 references" in whole.stdout
    path = file_of(cache, NAMES[0])
    content, key = path.read_bytes(), answer_keys(PAIRS[3])[0]
    damaged = {
        "value": flipped(content, place_of(content, VALUES[3][0].tobytes())),
        "key": flipped(content, place_of(content, key)),
        "index": flipped(content, place_of(content, key, last=True)),
        "header": flipped(content, 3),
        "truncated": content[: 2 * len(content) // 3],
    }
    path.write_bytes(damaged[kind])
    found = command("verify", cache=cache)
    assert found.returncode == 7 and "Traceback" not in found.stderr, found.stderr
    assert f"Damaged in {cache}: {NAMES[0][:12]}." in found.stderr and f"{NAMES[1][:12]}: 10 answers" in found.stdout
    cleared = command(*found.stderr.split("`qdpo cache ")[1].split("`")[0].split(), cache=cache)
    assert cleared.returncode == 0 and not path.exists() and file_of(cache, NAMES[1]).exists()


def test_clear_removes_what_is_named_and_nothing_else(cache: Path) -> None:
    before = left(cache)
    removed = list(clear_lines(cache, [NAMES[0][:4]], corrupt=False, everything=False))
    assert removed[0].startswith(f"removed reference {NAMES[0][:12]}: ") and "freed" in removed[-1]
    assert before - left(cache) == {f"reference/{NAMES[0]}.sqlite{ending}" for ending in ("", "-journal", ".lock")}
    list(clear_lines(cache, [], corrupt=True, everything=False))
    assert "reference/old.corrupt-17" not in left(cache) and file_of(cache, NAMES[1]).exists()
    everything = command("clear", "--all", cache=cache)
    assert everything.returncode == 0 and "freed 3." in everything.stdout, everything.stderr
    assert left(cache) == {"notes.txt"}


def test_clear_refuses_names_that_fit_none_or_several(cache: Path) -> None:
    before = left(cache)
    wrong = NAMES[0][:7] + ("0" if NAMES[0][7] != "0" else "1")
    unknown = command("clear", NAMES[1], wrong, cache=cache)
    assert unknown.returncode == 2 and f"Did you mean {NAMES[0][:12]!r}?" in unknown.stderr
    twin = ReferenceCache(cache, NAMES[0][:8] + "f" * 24)
    twin.close()
    several = command("clear", NAMES[0][:8], cache=cache)
    assert several.returncode == 2 and "matches 2 references" in several.stderr
    for name in ("", "../notes.txt", "old.corrupt-17", "*"):
        with pytest.raises(ConfigError, match="There is no reference"):
            list(clear_lines(cache, [name], corrupt=False, everything=False))
    with pytest.raises(ConfigError, match="Nothing to clear is named"):
        list(clear_lines(cache, [], corrupt=False, everything=False))
    assert before <= left(cache)


def test_nothing_outside_the_folder_is_deleted(cache: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "weights").write_text("dear")
    (cache / "bases" / "linked").symlink_to(outside)
    file_of(cache, "linked").symlink_to(outside / "weights")
    list(clear_lines(cache, [], corrupt=False, everything=True))
    assert left(cache) == {"notes.txt"} and (outside / "weights").read_text() == "dear"
    (cache / "bases").rmdir()
    (cache / "bases").symlink_to(outside)
    with pytest.raises(ConfigError, match="outside the cache folder, so nothing is deleted"):
        list(clear_lines(cache, [], corrupt=False, everything=True))
    assert (outside / "weights").read_text() == "dear"


def test_no_torch_is_imported() -> None:
    code = "import sys, qdpo.machine.caches; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("about", ["[" * 50_000, "[]", "7", '{"adapter": 7, "base": [], "dtype": null}'])
def test_an_odd_description_hides_no_reference(about: str, cache: Path) -> None:
    with sqlite3.connect(file_of(cache, NAMES[0])) as database:
        database.execute("UPDATE about SET description = ?", (about,))
    database.close()
    listed = "\n".join(list_lines(cache))
    assert NAMES[0][:12] in listed and NAMES[1][:12] in listed
