"""TRL's trainer and ours, from one start to the same numbers; and the scripts that measure, on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, save_tiny_base

pytestmark = pytest.mark.slow


def script(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs a script; skips if TRL cannot be installed, for want of a package index."""
    command = [sys.executable, ROOT / "scripts" / name, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a tiny model gains nothing from a second one
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "pip could not install" in finished.stderr:
        pytest.skip(finished.stderr.splitlines()[-1])
    return finished


@pytest.mark.parametrize("model", ["--tiny", "--hybrid"])
def test_trl_and_qdpo_take_the_same_steps(model: str, tmp_path: Path) -> None:
    """The script's own limit is 1e-3; in fp32 a tiny model stays far below."""
    finished = script("compare_trl", model, "--write", str(tmp_path / "found.json"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["token_ids_differ"] == 0 and len(found["qdpo"]) == len(found["TRL"]) == 20
    assert found["qdpo"][0]["loss"] != found["qdpo"][19]["loss"]
    assert 0 < max(found["worst"].values()) < 1e-4


def test_a_difference_is_an_exit_code() -> None:
    assert script("compare_trl", "--tiny", "--steps", "1", "--limit", "1e-12").returncode == 1


def test_speed_is_compared_in_turns(tmp_path: Path) -> None:
    words = ["--tiny", "--speed", "--rounds", "1", "--steps-per-round", "1", "--write", str(tmp_path / "found.json")]
    finished = script("compare_trl", *words)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    sides = json.loads((tmp_path / "found.json").read_text())["sides"]
    assert all(side["pairs_per_s"][0] > 0 and side["first_grad_norm"] > 0 for side in sides.values())
    ours = {side["computed_tokens_per_pair"] for name, side in sides.items() if name.startswith("qdpo")}
    theirs = {side["computed_tokens_per_pair"] for name, side in sides.items() if name.startswith("TRL")}
    assert max(ours) < min(theirs)


def test_a_step_is_measured(tmp_path: Path) -> None:
    folder = save_tiny_base(tmp_path / "base")
    finished = script("bench_step", f"model.path={folder}", "--steps", "1", "--write", str(tmp_path / "found.json"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert sum(found["shares"].values()) == pytest.approx(1) and min(found["shares"].values()) >= 0
    assert str(tmp_path) not in json.dumps(found)
