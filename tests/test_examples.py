"""The scripts in examples/, run as a user runs them, with a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import AS_USER, ROOT

pytestmark = pytest.mark.slow
SCRIPTS = ("judge.sh", "merge_and_serve.sh", "own_pairs.sh")


@pytest.fixture
def words(tiny_base: Path, tmp_path: Path) -> list[str]:
    """The settings a user would give: a small model and a short run."""
    return [
        f"model.path={tiny_base}", "model.device=cpu", "model.dtype=fp32", f"cache.dir={tmp_path / 'cache'}",
        "train.steps=3", "train.pairs_per_step=2", "samples.count=0",
    ]  # fmt: skip


def example(name: str, *words: str, cwd: Path, **environment: str) -> str:
    """Runs a script in `cwd`, where `qdpo` is this source; returns what it printed."""
    shim = cwd / "bin" / "qdpo"
    shim.parent.mkdir(exist_ok=True)
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m qdpo "$@"\n', encoding="utf-8")
    shim.chmod(0o755)
    path = f"{shim.parent}{os.pathsep}{os.environ['PATH']}"
    finished = subprocess.run(
        [str(ROOT / "examples" / name), *words],
        cwd=cwd, env={**AS_USER, "PATH": path, **environment}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_own_pairs_are_trained_on_merged_and_served(words: list[str], tmp_path: Path) -> None:
    said = example("own_pairs.sh", *words, cwd=tmp_path)
    run = tmp_path / "own-pairs" / "run"
    assert "verdict: fit to train" in said and "FITS" in said
    assert json.loads((run / "result.json").read_text(encoding="utf-8"))["steps"] == 3
    assert (run / "report.html").is_file()
    said = example("merge_and_serve.sh", cwd=tmp_path)
    assert "This is the model that was trained" in said
    assert (run / "export" / "ollama" / "Modelfile").is_file()
    assert "ollama create run" in said and "vllm serve" in said
    assert "vllm serve" in example("merge_and_serve.sh", cwd=tmp_path)  # a second time over what is there


def test_judged_answers_are_trained_on(words: list[str], tmp_path: Path) -> None:
    example("judge.sh", *words, cwd=tmp_path, TOKENS="8", FOLDER="mine")
    pairs = (tmp_path / "mine" / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(pairs) >= 2 and (tmp_path / "mine" / "run" / "adapter" / "adapter_config.json").is_file()


def test_every_example_is_run_here_and_on_the_page() -> None:
    assert tuple(sorted(path.name for path in (ROOT / "examples").glob("*.sh"))) == SCRIPTS
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    assert all(f"({name})" in page for name in SCRIPTS)
