"""Neither the date nor the network reaches into a run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CHATML, ROOT, arguments, tiny_tokenizer

# Runs the command line on a day of the calendar, with every outgoing connection noted and refused.
SCRIPT = """
import datetime, os, socket, sys
from transformers.utils import chat_template_utils
class Day(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 11, int(os.environ["DAY"]))
chat_template_utils.datetime = Day
def refuse(self, address):
    open(os.environ["CONNECTIONS"], "a").write(f"{address}\\n")
    raise OSError("no network here")
socket.socket.connect = socket.socket.connect_ex = refuse
from qdpo.cli.main import main
sys.argv = ["qdpo", "run", *sys.argv[1:]]
main()
"""


def run(words: list[str], cwd: Path, day: int) -> subprocess.CompletedProcess[str]:
    places = {"PYTHONPATH": str(ROOT), "DAY": str(day), "CONNECTIONS": str(cwd / "connections")}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], cwd=cwd, capture_output=True, text=True, env={**os.environ, **places}
    )


@pytest.fixture
def dated(settings: dict[str, str], tiny_base: Path, tmp_path: Path) -> dict[str, str]:
    """The tiny model with a template that prints today's date, as Llama 3.2's does."""
    base = tmp_path / "dated"
    shutil.copytree(tiny_base, base)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    tokenizer.save_pretrained(base)
    return {**settings, "model.path": str(base), "train.steps": "4", "train.save_every": "2"}


def test_a_run_makes_no_connection_and_the_date_cannot_change_it(dated: dict[str, str], tmp_path: Path) -> None:
    golden = run(arguments(dated, output__name="golden"), tmp_path, 1)
    assert golden.returncode == 0, golden.stderr
    first = run(arguments(dated), tmp_path, 1)
    assert first.returncode == 0 and not (tmp_path / "connections").exists()
    folder = Path(dated["output.dir"])
    for name in ("result.json", "checkpoints/step-000004/MANIFEST.json"):
        (folder / "run" / name).unlink()
    prepared = (folder / "run" / "prepared" / "train.safetensors").read_bytes()
    rest = run(arguments(dated), tmp_path, 2)
    assert rest.returncode == 0 and "resuming after step 2" in rest.stdout, rest.stderr
    adapters = [(folder / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("run", "golden")]
    assert adapters[0] == adapters[1]
    other = run(arguments(dated, output__name="other"), tmp_path, 2)
    assert other.returncode == 0
    assert (folder / "other" / "prepared" / "train.safetensors").read_bytes() != prepared
    assert not (tmp_path / "connections").exists()
