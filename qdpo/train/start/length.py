"""The length of a run: steps, pairs and warm-up, from epochs, steps or hours."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qdpo.data.tokens.pack import pack_rows, step_indices
from qdpo.data.tokens.sieve import TokenPair
from qdpo.model.policy.adapter import Policy
from qdpo.settings.schema import DataConfig, TrainConfig
from qdpo.train.step.step import score

# Pairs timed for train.hours, and the share of the hours that is planned for: the rest is for saving and samples.
TIMED_PAIRS, PLANNED_SHARE = 8, 0.95
# Held-out pairs below which an accuracy is noise: two standard errors of 50 are 14 %.
ENOUGH_HELD_OUT = 50


@dataclass(frozen=True)
class RunLength:
    """Chosen at the first start and recorded, so that a resumed run has the same schedule."""

    steps: int
    total_pairs: int
    warmup_steps: int

    def indices(self, step: int, train: TrainConfig, pairs: int) -> list[int]:
        """Indices of the training pairs, out of `pairs`, that make up step `step` (from 0)."""
        return step_indices(
            step, pairs=pairs, pairs_per_step=train.pairs_per_step, total_pairs=self.total_pairs, seed=train.seed
        )


def plan_steps(train: TrainConfig, pairs: int, at_most: int | None = None) -> RunLength:
    """Steps that cover `train.epochs` over `pairs` pairs (or train.steps), up to `at_most`."""
    total = train.steps * train.pairs_per_step if train.steps else max(1, round(train.epochs * pairs))
    if at_most is not None:
        total = min(total, at_most * train.pairs_per_step)
    steps = math.ceil(total / train.pairs_per_step)
    warmup = math.ceil(steps / 10) if train.warmup_steps is None else min(train.warmup_steps, steps)
    return RunLength(steps, total, warmup)


def few_held_out(data: DataConfig, train: int, held_out: int) -> str | None:
    """The warning that figures on so few held-out pairs mean nothing, with a remedy; None where there are enough."""
    if held_out >= ENOUGH_HELD_OUT:
        return None
    noise = 1 / math.sqrt(max(1, held_out))  # two standard errors of a share near a half
    if data.eval_path or data.eval_split:
        limited = data.eval_limit is not None and data.eval_limit <= held_out
        remedy = (
            "raise data.eval_limit"
            if limited
            else f"give more pairs in data.eval_{'path' if data.eval_path else 'split'}"
        )
    elif data.eval_limit is not None and data.eval_limit < ENOUGH_HELD_OUT:
        remedy = f"raise data.eval_limit={data.eval_limit}"
    elif ENOUGH_HELD_OUT <= (train + held_out) / 2:
        share = math.ceil(100 * ENOUGH_HELD_OUT / (train + held_out)) / 100
        remedy = f"data.eval_fraction={share:g} holds {ENOUGH_HELD_OUT} out"
    else:
        remedy = f"data.eval_fraction (now {data.eval_fraction:g}) holds out more; so few pairs in all are the cause"
    return (
        f"warning: {held_out} held-out pair{'s' * (held_out != 1)}: accuracy will mean nothing below "
        f"{ENOUGH_HELD_OUT} (chance alone: ±{min(0.5, noise):.0%}); {remedy}"
    )


@dataclass(frozen=True)
class Speed:
    """Measured seconds per pair: one reference or held-out pass, and one training pass."""

    score_s: float
    step_s: float


@dataclass(frozen=True)
class Passes:
    """The passes that a loss needs in addition to the training pass."""

    reference: bool
    """Each pair once with the adapter off."""
    coupled: bool
    """Each step is scored before it is trained."""

    def pair_s(self, speed: Speed) -> float:
        """Total seconds per training pair."""
        return speed.step_s + speed.score_s * (self.reference + self.coupled)


def measure_speed(policy: Policy, pairs: Sequence[TokenPair], *, tokens_per_row: int, seed: int) -> Speed:
    """Times a few of the run's own pairs, drawn by seed; gradients are discarded, nothing is trained."""
    places = np.random.default_rng(seed).permutation(len(pairs))[:TIMED_PAIRS]
    rows = pack_rows([pairs[place] for place in places], tokens_per_row)
    best = Speed(math.inf, math.inf)
    for _attempt in range(2):  # the first attempt also warms caches and kernels
        begun = time.monotonic()
        with torch.no_grad():
            for row in rows:
                score(policy, row, metrics=False).logp.sum().item()
        middle = time.monotonic()
        for row in rows:
            total = score(policy, row, metrics=True).logp.sum()
            torch.autograd.backward(total)
            total.item()
        now = time.monotonic()
        best = Speed(min(best.score_s, (middle - begun) / len(places)), min(best.step_s, (now - middle) / len(places)))
    policy.peft.zero_grad(set_to_none=True)
    return best


def within_hours(
    train: TrainConfig, pairs: int, held_out: int, speed: Speed, passes: Passes, spent_s: float
) -> RunLength:
    """The plan of `train`, shortened to fit into train.hours; `spent_s` is the time already spent.

    The estimate counts all passes of every training pair, and three evaluations in addition to the regular ones.
    """
    assert train.hours is not None
    evaluation_s = held_out * speed.score_s
    step_s = train.pairs_per_step * passes.pair_s(speed) + evaluation_s / train.eval_every
    left_s = train.hours * 3600 * PLANNED_SHARE - spent_s - 3 * evaluation_s
    return plan_steps(train, pairs, at_most=max(1, int(left_s / step_s)))
