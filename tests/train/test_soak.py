"""Kills at any instant, and damage to any file of a checkpoint: the run ends with the bytes it would have had."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdpo.run.folder import RunDir
from qdpo.run.metrics import read_metrics
from qdpo.run.record import Result
from qdpo.settings import layered
from qdpo.train.loop import run_training
from tests.conftest import ROOT, Quiet, arguments

pytestmark = pytest.mark.slow

Train = Callable[..., tuple[Result, Quiet]]
SAVES = {"train__steps": "6", "train__save_every": "2", "train__keep_checkpoints": "3", "train__eval_every": "3"}
FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json")


def soak(tmp_path: Path, *words: str) -> dict[str, Any]:
    """Runs scripts/soak and returns what it wrote; fails with what it printed if a run differs."""
    written = tmp_path / "soak.json"
    finished = subprocess.run(
        [sys.executable, ROOT / "scripts" / "soak", *words, "--write", written],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))
    return found


def test_killed_at_random_moments(tmp_path: Path) -> None:
    found = soak(tmp_path, "--at", "random", "--kills", "5", "--dtype", "fp32", "--seed", "1")
    assert len(found["kills"]) == 5 and found["differences"] == []
    assert {kill["at"] for kill in found["kills"]} == {"moment", "operation"}


def test_killed_at_named_instants(tmp_path: Path) -> None:
    found = soak(tmp_path, "--at", "named", "--kills", "5", "--seed", "2")
    assert len({kill["at"] for kill in found["kills"]}) == 5 and found["differences"] == []


def test_killed_at_each_stage_of_a_save(tmp_path: Path) -> None:
    found = soak(tmp_path, "--at", "save:", "--kills", "11")
    assert len(found["kills_by_instant"]) == 11 and found["differences"] == []


def test_the_trainer_loop_runs(tmp_path: Path) -> None:
    found = soak(tmp_path, "--trainer", "--kills", "1")
    assert found["between_saves"] == "equals the golden run" and sum(found["outcomes"].values()) == 1


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def empty(_content: bytes) -> bytes:
    return b""


@pytest.fixture
def finished(train: Train, settings: dict[str, str]) -> RunDir:
    """A run of 6 steps with three checkpoints."""
    train(**SAVES)
    return RunDir(Path(settings["output.dir"]) / "run")


def unfinished(finished: RunDir, name: str) -> RunDir:
    """A copy of the run as it is just before its end: no adapter/, no result.json."""
    run = RunDir(shutil.copytree(finished.path, finished.path.with_name(name)))
    run.result.unlink()
    shutil.rmtree(run.adapter)
    return run


def assert_equal(run: RunDir, finished: RunDir) -> None:
    weights = "adapter_model.safetensors"
    assert (run.adapter / weights).read_bytes() == (finished.adapter / weights).read_bytes()
    mine, its = ([record["step"] for record in read_metrics(each.metrics)] for each in (run, finished))
    assert mine == its


def test_any_damaged_file_falls_back_to_the_checkpoint_before(train: Train, finished: RunDir) -> None:
    for file in FILES:
        for damage in (half, flipped, empty, None):
            run = unfinished(finished, f"{file}-{damage.__name__ if damage else 'gone'}")
            victim = run.checkpoints / "step-000006" / file
            if damage is None:
                victim.unlink()
            else:
                victim.write_bytes(damage(victim.read_bytes()))
            _, watcher = train(output__name=run.path.name, **SAVES)
            assert "step-000006 is damaged (set aside as damaged-step-000006)" in watcher.text, run.path.name
            assert "resuming after step 4 of 6" in watcher.text, run.path.name
            assert_equal(run, finished)


def test_folders_that_are_no_checkpoints_are_not_taken_for_one(train: Train, finished: RunDir) -> None:
    """An empty folder with a higher step, one that was being written, and one without its manifest."""
    run = unfinished(finished, "odd")
    (run.checkpoints / "step-000099").mkdir()
    shutil.copytree(run.checkpoints / "step-000006", run.checkpoints / ".tmp-step-000008-1")
    (run.checkpoints / "step-000006" / "MANIFEST.json").unlink()
    _, watcher = train(output__name="odd", **SAVES)
    assert watcher.text.count("is damaged") == 2 and "resuming after step 4 of 6" in watcher.text
    assert not list(run.checkpoints.glob(".tmp*"))
    assert_equal(run, finished)


def test_without_any_whole_checkpoint_the_run_starts_over(train: Train, finished: RunDir) -> None:
    run = unfinished(finished, "over")
    for folder in run.checkpoints.iterdir():
        (folder / "state.json").unlink()
    _, watcher = train(output__name="over", **SAVES)
    assert watcher.text.count("is damaged") == 3 and "resuming" not in watcher.text
    assert_equal(run, finished)


class CountsCheckpoints(Quiet):
    """Remembers how many checkpoints there were after each step."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.counts: list[int] = []

    def step(self, record: dict[str, Any]) -> None:
        self.counts.append(len(list(self.folder.glob("*"))))


def test_fifty_saves_keep_as_many_as_asked(settings: dict[str, str]) -> None:
    run = RunDir(Path(settings["output.dir"]) / "run")
    watcher = CountsCheckpoints(run.checkpoints)
    fifty = {"train__steps": "50", "train__save_every": "1", "train__keep_checkpoints": "2"}
    run_training(layered.resolve(arguments(settings, **fifty)), watcher)
    assert max(watcher.counts) == 2 and sorted(path.name for path in run.checkpoints.iterdir()) == [
        "step-000049", "step-000050",
    ]  # fmt: skip
