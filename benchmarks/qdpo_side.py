"""A real qdpo run in rounds of steps: the side of scripts/compare_trl that is this project's.

The job: `settings`, the words after `qdpo run` · `rounds`, the number of steps of each.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.rounds import Parent
from qdpo.model.device import peak_gib
from qdpo.settings import layered
from qdpo.train.loop import run_training


class Rounds:
    """A Watcher that holds the run before each round; `rounds` are the numbers of steps of each.

    `before` is called before a round (the first time with everything loaded, and no step done) and once more after the
    last; `after` gets the metrics of the round's steps, the seconds it took and the tokens it computed.
    """

    def __init__(
        self, rounds: list[int], before: Callable[[], None], after: Callable[[list[dict[str, Any]], float, int], None]
    ) -> None:
        self.left, self.before, self.after = [*rounds], before, after
        self.records: list[dict[str, Any]] = []
        self.reference_s = self.begun = 0.0
        self.stage, self.tokens = "", 0
        self.started = False

    def say(self, line: str) -> None:
        print(line, flush=True)

    def begin(self, what: str, total: int, unit: str) -> None:
        self.stage = what
        if what == "training" and not self.started:
            self.started = True
            self._next_round()
        elif what.startswith("reference"):
            self.begun = time.monotonic()

    def advance(self, units: int) -> None:
        pass

    def finish(self) -> None:
        if self.stage.startswith("reference"):
            self.reference_s = time.monotonic() - self.begun

    def step(self, record: dict[str, Any]) -> None:
        if "loss" not in record:
            return
        self.records.append(record)
        if len(self.records) == self.left[0]:
            seconds = _now() - self.begun
            self.after(self.records, seconds, record["num_tokens"] - self.tokens)
            self.tokens = record["num_tokens"]
            self.left.pop(0)
            self._next_round()

    def _next_round(self) -> None:
        self.records = []
        self.before()
        self.begun = _now()


def _now() -> float:
    """Monotonic seconds, once the device has finished what it was given."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.monotonic()


def main() -> None:
    parent = Parent()

    def before() -> None:
        if len(rounds.left) == len(parent.job["rounds"]):
            parent.answer(reference_s=rounds.reference_s)
        parent.wait()

    def after(records: list[dict[str, Any]], seconds: float, tokens: int) -> None:
        parent.answer(seconds=seconds, positions=tokens, records=records, peak_gib=peak_gib(torch.device("cpu")))

    rounds = Rounds(parent.job["rounds"], before, after)
    run_training(layered.resolve(parent.job["settings"]), rounds)


if __name__ == "__main__":
    main()
