"""What ends a command is one paragraph; its traceback is in debug.log, without secrets."""

import os
import subprocess
import sys
from pathlib import Path

from qdpo.machine.debug_log import note, redact
from tests.conftest import ROOT, arguments

# Runs the command line with one function broken.
BROKEN = """
import importlib, sys
from qdpo.cli.main import main
def broken(*arguments, **more):
    raise RuntimeError("something odd\\nwith hf_abcdefghijklmnop in it")
importlib.import_module("qdpo.train.{module}").{name} = broken
sys.argv = ["qdpo", *sys.argv[1:]]
main()
"""


def broken(words: list[str], cwd: Path, module: str, name: str, *first: str) -> subprocess.CompletedProcess[str]:
    script = BROKEN.format(module=module, name=name)
    return subprocess.run(
        [sys.executable, "-c", script, *first, "run", *words], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(cwd), "QDPO_CACHE": str(cwd / "cache")},
    )  # fmt: skip


def test_a_bug_is_one_paragraph_and_its_traceback_a_file(settings: dict[str, str], tmp_path: Path) -> None:
    answer = broken(arguments(settings, train__steps="2"), tmp_path, "loop", "train_step")
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    assert "unexpected RuntimeError: something odd." in answer.stderr and "debug.log" in answer.stderr
    text = (Path(settings["output.dir"]) / "run" / "debug.log").read_text()
    assert "Traceback" in text and "something odd" in text and "hf_abc" not in text and "[token]" in text
    assert str(tmp_path) not in text and "~/" in text
    early = broken(arguments(settings, output__name="other"), tmp_path, "start.open_run", "_first_start", "-v")
    assert early.returncode == 1 and "Traceback" in early.stderr
    assert "something odd" in (tmp_path / "cache" / "debug.log").read_text()


def test_errors_of_a_run_are_noted_there(settings: dict[str, str], tmp_path: Path) -> None:
    words = arguments(settings, train__steps="2")
    broken(words, tmp_path, "loop", "train_step")
    again = broken([*words, "loss.beta=0.5"], tmp_path, "loop", "train_step")
    assert again.returncode == 2 and "was 0.1, now 0.5" in again.stderr
    assert "ConfigError" in (Path(settings["output.dir"]) / "run" / "debug.log").read_text()


def test_redacted() -> None:
    home = Path.home()
    assert redact(f"{home}/x Bearer abc.def hf_1234567890ab") == "~/x Bearer [token] [token]"
    assert note(Path("/proc/none"), ValueError("x"), []) is None
