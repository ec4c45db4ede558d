"""The demo's model, trained, merged and proved, as a user does it."""

import json
from pathlib import Path

import pytest

from tests.conftest import qdpo

pytestmark = pytest.mark.slow


def test_the_demo_is_merged_within_the_bounds(tmp_path: Path) -> None:
    """SmolLM2-135M in NF4, 12 steps, merged in bf16, reloaded and compared, beside the original base."""
    settings = ["train.steps=12", "train.learning_rate=2e-4", "samples.count=0", "data.eval_limit=12"]
    trained = qdpo("run", "preset=demo", *settings, "output.name=run", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    merged = qdpo("merge", "runs/run", "--compare", "--pairs", "12", "--json", cwd=tmp_path)
    assert merged.returncode == 0, merged.stderr
    result = json.loads(merged.stdout)
    assert result["merged"]["proved"] == 210 and result["merged"]["dtype"] == "bf16"
    ours, original = result["verification"]
    assert ours["distance"]["kl"] < 0.002 and ours["distance"]["top1"] >= 0.99
    assert ours["distance"]["share"] == pytest.approx(1, abs=0.05)
    assert ours["merged"]["margin"] == pytest.approx(ours["trained"]["margin"], rel=0.05)
    assert (
        original["distance"]["kl"] > 10 * ours["distance"]["kl"]
        and "not the model that was trained" in original["verdict"]
    )
    again = qdpo("merge", "runs/run", cwd=tmp_path)
    assert again.returncode == 2 and "exists already" in again.stderr
