"""Scores held-out pairs with the policy and compares them with the reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qdpo.config import LossConfig
from qdpo.data.pack import PairRow
from qdpo.model.adapter import Policy
from qdpo.train.step import Reference, row_loss


@dataclass(frozen=True)
class Evaluation:
    """Mean metrics over the pairs, and every pair's margin."""

    values: dict[str, float]
    margins: list[float]
    """β · (a − b) of each pair, in nats, in the order of the rows' pairs."""
    rows: list[int]
    """The data row of each margin."""


def evaluate(
    policy: Policy, rows: Sequence[PairRow], reference: Reference, loss: LossConfig, advance: Callable[[int], None]
) -> Evaluation:
    """Metrics over all pairs of `rows`, without gradients; `advance` is told the pairs done. Ties are half right."""
    totals: dict[str, float] = {}
    margins: list[float] = []
    with torch.no_grad():
        for row in rows:
            part = row_loss(policy, row, reference, loss)
            for name, value in part.sums.items():
                totals[name] = totals.get(name, 0.0) + value.item()
            margins += part.margins_P.tolist()
            advance(len(row.pairs))
    count = len(margins)
    return Evaluation(
        {name: total / count for name, total in totals.items()}, margins, [p.row for r in rows for p in r.pairs]
    )


def reference_offset(evaluation: Evaluation, beta: float) -> tuple[float, float]:
    """Mean and largest |margin| / β of an untouched adapter, in nats: 0 where reference and policy rows are one."""
    gaps = np.abs(np.array(evaluation.margins)) / beta
    return float(gaps.mean()), float(gaps.max())
