"""Runs that version 0.1.0 left behind, by this tree's command line: a stopped one goes on, a finished one is read.

tests/golden/make_run_0_1_0.py made them. Nothing of qdpo is imported here, so that no move of a module matters here.
"""

import contextlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "golden" / "run-0.1.0"
ABOUT: dict[str, Any] = json.loads((FIXTURE / "about.json").read_text(encoding="utf-8"))
ENTRY, HERE = "qdpo", "@HERE@"
KINDS = ("plain", "nf4")
STEPS = 9
# Columns of metrics.jsonl that two runs of the same numbers do not share.
TIMES = {"seconds", "tokens_per_s", "pairs_per_s", "peak_gib"}
# Largest difference between weights of an adapter where a CPU rounds otherwise than the fixture's. MKL's other code
# paths (MKL_CBWR) came to 5e-7 for `plain` and 2.5e-5 for `nf4`; training moved them by up to 5e-3.
TOLERANCE = 1e-4


def put_back(folder: Path) -> Path:
    """A copy of the fixture in `folder`, with that folder's name where the maker's was."""
    shutil.copytree(FIXTURE, folder)
    for path in folder.rglob("*"):
        if path.suffix in {".json", ".jsonl", ".toml", ".md"}:
            path.write_text(path.read_text(encoding="utf-8").replace(HERE, str(folder)), encoding="utf-8")
        elif path.suffix == ".sqlite":
            with contextlib.closing(sqlite3.connect(path)) as database, database:
                database.execute("UPDATE about SET description = replace(description, ?, ?)", (HERE, str(folder)))
    return folder


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return put_back(tmp_path / "here")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One copy for all that only read its finished runs."""
    return put_back(tmp_path_factory.mktemp("shared") / "here")


def qdpo(*words: str, cwd: Path, said: str = "") -> subprocess.CompletedProcess[str]:
    """The command line in the environment that the fixture was made in; it must end with exit code 0."""
    done = subprocess.run(
        [sys.executable, "-m", ENTRY, *words], cwd=cwd, input=said, capture_output=True, text=True, timeout=300,
        env={**os.environ, **ABOUT["environment"], "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode} of {words}:\n{done.stdout}\n{done.stderr}"
    return done


def command(name: str, **changes: str) -> list[str]:
    """The command that made the run `name`; `changes` are written with __ for the dot."""
    settings = ABOUT["runs"][name] | {key.replace("__", "."): value for key, value in changes.items()}
    return ["run", *(f"{key}={value}" for key, value in settings.items())]


def rounds_alike(here: Path) -> bool:
    """Whether the same settings come to the same bytes here as where the fixture was made, if no number is changed."""
    if any(metadata.version(name) != version for name, version in ABOUT["packages"].items()):
        return False
    words = [sys.executable, str(FIXTURE.parent / "rounding.py"), str(here / "base" / "model.safetensors")]
    environment = {**os.environ, **ABOUT["environment"]}
    found = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    return bool(found.strip() == ABOUT["rounding"])


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def numbers(run: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records(run)]


def trained_files(run: Path) -> dict[str, bytes]:
    """What the last step left: the adapter as it is shipped, and the last checkpoint's tensors."""
    last = run / "checkpoints" / f"step-{STEPS:06d}"
    found = [run / "adapter" / "adapter_model.safetensors", *sorted(last.glob("*.safetensors"))]
    assert len(found) == 3, found
    return {str(path.relative_to(run)): path.read_bytes() for path in found}


def largest_difference(one: Path, other: Path) -> float:
    """Between two safetensors files with the same tensors."""
    mine, its = load_file(one), load_file(other)
    assert {name: value.shape for name, value in mine.items()} == {name: value.shape for name, value in its.items()}
    return max((mine[name].float() - its[name].float()).abs().max().item() for name in mine)


def cache_rows(folder: Path) -> dict[str, dict[bytes, bytes]]:
    """The rows of each reference in the cache, by the file's name."""
    found = {}
    for path in (folder / "cache" / "reference").glob("*.sqlite"):
        with contextlib.closing(sqlite3.connect(path)) as database:
            found[path.name] = dict(database.execute("SELECT key, value FROM logps"))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_to_the_same_bytes(here: Path, kind: str) -> None:
    """Its first steps were computed by 0.1.0, the others here: the end must equal that of a run made here alone.

    Where the packages are others, or the CPU rounds otherwise, it can only be near, and a skip says so.
    """
    runs, cache, name = here / "runs", cache_rows(here), f"{kind}-stopped"
    stopped, finished, whole = runs / name, runs / f"{kind}-finished", runs / "whole"
    before, prepared = records(stopped), {path.name: path.read_bytes() for path in (stopped / "prepared").iterdir()}
    with ThreadPoolExecutor() as side:  # a core each: half of a process's time are its imports
        alone = side.submit(qdpo, *command(name, output__name="whole"), cwd=here)
        said = [qdpo(*command(name), cwd=here).stdout, alone.result().stdout]

    # Each takes the values over from the file that 0.1.0 named, or finds that the other has done so.
    assert all("reference: no pass needed" in text for text in said), said
    after = cache_rows(here)
    assert {name: after[name] for name in cache} == cache
    added = [rows for name, rows in after.items() if name not in cache]
    assert len(added) == 1 and any(added[0].items() <= rows.items() for rows in cache.values())
    assert records(stopped)[: len(before)] == before, "it began again: times of the first steps are not those of 0.1.0"
    assert [path.name for path in sorted((stopped / "checkpoints").iterdir())] == ["step-000008", "step-000009"]
    assert {path.name: path.read_bytes() for path in (stopped / "prepared").iterdir()} == prepared
    assert {path.name: path.read_bytes() for path in (whole / "prepared").iterdir()} == prepared
    assert [record["step"] for record in records(stopped)] == [record["step"] for record in records(finished)]
    weights = Path("adapter", "adapter_model.safetensors")
    for other in (finished, whole):
        assert largest_difference(stopped / weights, other / weights) <= TOLERANCE, other.name
    if not rounds_alike(here):
        pytest.skip("near, not compared by bytes: other packages or another rounding than where the fixture was made")
    assert trained_files(stopped) == trained_files(whole)
    assert trained_files(stopped) == trained_files(finished)
    assert numbers(stopped) == numbers(whole) == numbers(finished)


def test_a_finished_run_is_shown_again(shared: Path) -> None:
    run = shared / "runs" / "plain-finished"
    before = trained_files(run), records(run)
    qdpo(*command("plain-finished"), cwd=shared)
    assert (trained_files(run), records(run)) == before


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_scored_again_with_the_figures_it_has(shared: Path, kind: str) -> None:
    run = shared / "runs" / f"{kind}-finished"
    scored = json.loads(qdpo("eval", str(run), "--json", cwd=shared).stdout)
    then = json.loads((run / "result.json").read_text(encoding="utf-8"))["after"]
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert scored[name] == pytest.approx(then[name], abs=1e-3), name


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_merged(shared: Path, kind: str) -> None:
    """The merged files are compared with the trained model by the command itself: exit code 7 if they differ."""
    qdpo("merge", f"runs/{kind}-finished", f"merged-{kind}", cwd=shared)
    assert (shared / f"merged-{kind}" / "model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["report", "runs/nf4-finished", "--out", "page.html"],
        ["report", "runs/plain-finished", "runs/plain-stopped", "--out", "two.html"],
        ["sample", "prompts.txt", "--adapter", "runs/nf4-finished", "--out", "candidates.jsonl", "--n", "2",
         "--max-new-tokens", "8"],
        ["compare", "runs/nf4-finished", "--max-new-tokens", "8"],
        ["export", "runs/nf4-finished", "--to", "peft"],
        ["export", "runs/plain-finished", "--to", "gguf-adapter"],
        ["cache", "verify", "--dir", "cache"],
        ["metrics", "rewards/margins"],
    ],
    ids=lambda words: "-".join(word for word in words[:2]).replace("runs/", ""),
)  # fmt: skip
def test_a_verb_takes_it(shared: Path, words: list[str]) -> None:
    qdpo(*words, cwd=shared)


@pytest.mark.slow
def test_it_talks(shared: Path) -> None:
    done = qdpo("chat", "runs/nf4-finished", "--max-new-tokens", "8", cwd=shared, said="about rivers\n/quit\n")
    assert done.stdout.strip()


def test_all_four_are_listed(shared: Path) -> None:
    printed = qdpo("runs", "runs", cwd=shared).stdout
    for name in ABOUT["runs"]:
        assert name in printed
    assert printed.count("finished") >= 2 + 2 and printed.count("stopped") >= 2 + 2  # each by its name and its state
