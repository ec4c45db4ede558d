"""Ctrl-C before the first step: the run ends at the next safe point, and the same command continues it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdpo.errors import Interrupted
from qdpo.review.score import rescore
from qdpo.run.record import Result
from qdpo.settings import layered
from qdpo.train.keep.stop import catch_signals
from qdpo.train.loop import run_training
from tests.conftest import Quiet, arguments

Train = Callable[..., tuple[Result, Quiet]]
SETTINGS = {
    "train__steps": "2", "samples__count": "3", "samples__max_new_tokens": "30", "data__eval_limit": "4",
    "memory__tokens_per_row": "0",
}  # fmt: skip


class StopsWhen(Quiet):
    """Sends Ctrl-C to this process at the first event that begins with the given words."""

    def __init__(self, words: str):
        super().__init__()
        self.words, self.after = words, list[str]()

    def note(self, event: str) -> None:
        if self.words and event.startswith(self.words):
            self.words = ""
            os.kill(os.getpid(), signal.SIGINT)
        elif not self.words and not event.startswith("stopping"):
            self.after.append(event)

    def say(self, line: str) -> None:
        super().say(line)
        self.note(line)

    def begin(self, what: str, total: int, unit: str) -> None:
        super().begin(what, total, unit)
        self.note(what)

    def step(self, record: dict[str, Any]) -> None:
        super().step(record)
        self.note("a record")


# The event, where the run then says that it stopped, and what still happened after the signal.
PLACES = [
    ("tokenising", "while the data was prepared", []),
    ("pairs:", "before the memory was planned", ["warning:"]),
    ("run folder:", "before the model was loaded", []),
    ("loading the model", "after the model was loaded", ["attention:", "fast parts:", "memory:"]),
    ("plan:", "before the reference was scored", []),
    ("evaluating", "in the evaluation before step 1", []),
    ("completing", "in the evaluation before step 1", []),
]


def test_each_phase_ends_at_its_next_safe_point_and_the_run_continues_to_the_same_bytes(
    settings: dict[str, str], train: Train
) -> None:
    for event, where, meanwhile in PLACES:
        watcher = StopsWhen(event)
        with pytest.raises(Interrupted, match=rf"Stopped {where}\..*the same command continues") as stopped:
            run_training(layered.resolve(arguments(settings, **SETTINGS)), watcher)
        assert stopped.value.exit_code == 130
        late = [line for line in watcher.after if not line.startswith(tuple(meanwhile))]
        assert not late, (event, late)
    train(**SETTINGS)
    train(**SETTINGS, output__name="undisturbed")
    runs = Path(settings["output.dir"])
    for name in ("adapter/adapter_model.safetensors", "samples.jsonl", "eval_pairs.jsonl"):
        assert (runs / "run" / name).read_bytes() == (runs / "undisturbed" / name).read_bytes(), name


def test_no_further_token_is_generated_after_the_signal(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qdpo.model.generate import generate

    tokens, look = [], generate._Look.__call__

    def counted(self: Any, *given: Any, **named: Any) -> Any:
        tokens.append(1)
        return look(self, *given, **named)

    monkeypatch.setattr(generate._Look, "__call__", counted)
    with pytest.raises(Interrupted, match="before step 1"):
        run_training(layered.resolve(arguments(settings, **SETTINGS)), StopsWhen("completing"))
    assert len(tokens) == 1


def test_eval_ends_while_it_scores(settings: dict[str, str], train: Train) -> None:
    train(**SETTINGS)
    with pytest.raises(Interrupted, match="Stopped while scoring"):
        rescore(Path(settings["output.dir"]) / "run", [], StopsWhen("scoring"))


def test_what_is_said_is_true_in_any_phase() -> None:
    said: list[str] = []
    with catch_signals(said.append):
        os.kill(os.getpid(), signal.SIGINT)
    assert len(said) == 1 and "next safe point" in said[0] and "step" not in said[0]
