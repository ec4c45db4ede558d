"""A short form of scripts/break: some cases of every kind, with a fixed seed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.runner import kinds

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", kinds())
def test_damaged_inputs_are_refused_or_change_nothing(kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "scripts/break", "--seed", "18", "--each", "6", "--kind", kind],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
