"""The records of a run so far, and the means over them that rules use. Imports neither torch nor other rooms."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

# One line of metrics.jsonl: the step and the metrics by name.
Record = dict[str, float]

# Minimum number of pairs in a mean over recent steps: with fewer, accuracy is mostly noise.
WINDOW_PAIRS = 32


@dataclass(frozen=True)
class Terms:
    """Facts that the rules need about a run besides its records."""

    steps: int
    """Planned steps."""
    pairs_per_step: int
    held_out: int
    """Held-out pairs."""
    beta: float


@dataclass
class Course:
    """The records of a run so far, in the order they were written."""

    terms: Terms
    steps: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        (self.steps if "loss" in record else self.evaluations).append(record)

    @property
    def window(self) -> int:
        """Number of steps in a mean over recent steps."""
        return max(3, math.ceil(WINDOW_PAIRS / self.terms.pairs_per_step))

    @property
    def half_done(self) -> bool:
        return len(self.steps) >= max(self.terms.steps / 2, 2 * self.window)

    @property
    def first(self) -> Record | None:
        """The evaluation before the first step."""
        return self.evaluations[0] if self.evaluations and self.evaluations[0]["step"] == 0 else None

    @property
    def latest(self) -> Record | None:
        """The newest evaluation of a trained adapter."""
        return self.evaluations[-1] if self.evaluations and self.evaluations[-1]["step"] > 0 else None

    def recent(self, name: str, steps: int | None = None) -> float | None:
        """Mean over the last steps; None while there are too few."""
        last = self.steps[-(steps or self.window) :]
        return mean(last, name) if len(last) >= self.window else None

    @property
    def first_accuracy(self) -> float:
        """Accuracy on held-out pairs at the start; 0.5 by definition if the untouched adapter is its own reference."""
        return float(self.first["eval_rewards/accuracies"]) if self.first else 0.5

    def noise(self, pairs: float) -> float:
        """Standard error of an accuracy over that many pairs, if half of them are right."""
        return 0.5 / math.sqrt(max(1.0, pairs))


def mean(records: Sequence[Record], name: str) -> float:
    """Mean of a metric over records that have it."""
    return sum(float(record[name]) for record in records) / len(records)
