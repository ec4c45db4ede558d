"""Recovers from a step that runs out of memory: retries it, then uses smaller rows, then stops without any loss."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from qdpo.data.tokens.pack import PairRow
from qdpo.errors import OutOfMemoryError
from qdpo.model.device import release_memory
from qdpo.train.step.feed import ReadyRow, ready
from qdpo.train.step.step import RowTooLarge, StepReport

# Ways to compute a step's rows, from the usual way to the one that takes the least memory.
WHOLE, HALVES, SINGLE, SIDED = range(4)
NAMES = ("whole rows", "rows of half the pairs", "rows of one pair", "one answer at a time")
ComputeStep = Callable[[Sequence[ReadyRow], bool], StepReport]


class Recovery:
    """Runs steps at the current level; a lowered level applies from that step on."""

    def __init__(
        self, found: dict[str, int], device: torch.device, say: Callable[[str], None],
        record: Callable[[dict[str, int]], None],
    ):  # fmt: skip
        """`found` maps the first step of each lowered level, as text, to the level; `record` stores it for resume."""
        self.found, self._device, self._say, self._record = dict(found), device, say, record

    def level(self, step: int) -> int:
        """The level of a step; the same in a resumed run, which replays the splits."""
        return max((level for first, level in self.found.items() if int(first) <= step), default=WHOLE)

    def run_step(self, step: int, rows: Sequence[ReadyRow], compute: ComputeStep) -> StepReport:
        """Runs the step and returns its report. The gradient is the same at every level, up to rounding.

        `compute` receives rows and a flag (one answer at a time), and raises RowTooLarge.
        Raises: OutOfMemoryError if the step does not fit at the last level.
        """
        again = True
        while True:
            level = self.level(step)
            try:
                return compute(split(rows, level), level == SIDED)
            except RowTooLarge as error:
                reason = str(error)
            release_memory(self._device)
            if again:
                again = False
                self._say(f"step {step + 1}: trying once more with the cache emptied (out of memory: {reason})")
                continue
            if level == SIDED:
                raise OutOfMemoryError(f"Step {step + 1} does not fit even one answer at a time: {reason}")
            self.found[str(step)] = level + 1
            self._say(f"step {step + 1}: from here on {NAMES[level + 1]} at a time, same gradient (out of memory)")
            self._record(self.found)


def split(rows: Sequence[ReadyRow], level: int) -> list[ReadyRow]:
    """The same pairs in smaller rows: halves, or one pair each."""
    if level == WHOLE:
        return list(rows)
    parts = []
    for row in rows:
        pairs = row.row.pairs
        size = -(-len(pairs) // 2) if level == HALVES else 1
        parts += [_part(row, place, min(place + size, len(pairs))) for place in range(0, len(pairs), size)]
    return parts


def _part(row: ReadyRow, first: int, last: int) -> ReadyRow:
    pairs, pin = row.row.pairs[first:last], row.tensors.token_T.is_pinned()
    if row.reference_N is None:
        return ready(PairRow(pairs), None, pin=pin)
    lengths = row.row.lengths
    answers = np.split(row.reference_N.numpy(), np.cumsum(lengths)[:-1])
    known = {id(pair): (answers[2 * n], answers[2 * n + 1]) for n, pair in enumerate(row.row.pairs)}
    return ready(PairRow(pairs), lambda pair: known[id(pair)], pin=pin)
