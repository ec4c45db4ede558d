"""What is on screen: plain lines without a terminal, and text that is shown as it is."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from qdpo.report.screen.live import Terminal, print_result
from qdpo.run.folder import RunDir
from qdpo.run.record import Result

VALUES = {"rewards/accuracies": 0.5, "rewards/margins": 0.0, "loss": 0.6931}
RESULT = Result(
    before=VALUES, after={**VALUES, "rewards/accuracies": 0.9}, samples=None, steps=3, pairs=12, seconds=60.0,
    training_seconds=50.0, peak_gib=1.5, overflows=0, adapter="adapter",
)  # fmt: skip


def test_answers_are_shown_as_they_are(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    line = {"prompt": "<|im_start|>user\nwhy [/b]?<|im_end|>\n", "before": "[/INST] first", "after": "[bold]second"}
    run.samples.write_text(json.dumps(line) + "\n")
    console = Console(width=100, record=True)
    print_result(run, RESULT, console, held_out=1)
    text = console.export_text()
    assert "0.900 (n=1)" in text and "0.9000" not in text
    assert "why [/b]?" in text and "[/INST] first" in text and "[bold]second" in text
    assert "0.500" in text and "0.900" in text and f"qdpo eval {tmp_path}" in text.replace("\n", "")


def test_a_line_is_said_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    Terminal().say("openai:m: [bold]1 pairs")
    assert capsys.readouterr().out == "openai:m: [bold]1 pairs\n"


def test_without_a_terminal_every_step_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.begin("training", 4, "step")
    numbers = {"loss": 0.5, **VALUES, "tokens_per_s": 1234.5, "pairs_per_s": 2.0, "peak_gib": 1.0}
    terminal.step({"step": 2, **numbers})
    terminal.step({"step": 2, **{f"eval_{name}": value for name, value in VALUES.items()}, "pairs": 7})
    shown = capsys.readouterr().out
    assert "step 2/4: loss 0.6931 · accuracy 0.50" in shown and "1,234 tokens/s" in shown
    assert "held out after step 2: loss 0.6931 · accuracy 0.500 (n=7)" in shown


def test_trends_are_shown_at_an_evaluation_and_live(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = {**VALUES, "tokens_per_s": 1.0, "pairs_per_s": 2.0, "peak_gib": 1.0, "logps/chosen_per_token": -1.5}
    for is_live in (False, True):
        terminal = Terminal()
        terminal.console = Console(force_terminal=is_live, width=100)
        terminal.begin("training", 4, "step")
        for step in range(1, 5):
            terminal.step({"step": step, **numbers, "loss": 1.0 / step})
        if is_live:
            assert "loss           0.2500  █▃▁▁" in terminal._newest.plain
        terminal.step({"step": 4, **{f"eval_{name}": value for name, value in VALUES.items()}})
        terminal.finish()
        shown = capsys.readouterr().out
        assert is_live or "loss           0.2500  █▃▁▁" in shown and "chosen/token   -1.500  ▁▁▁▁" in shown
