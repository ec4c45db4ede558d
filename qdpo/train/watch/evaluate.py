"""Scores held-out pairs with the policy and compares them with the reference."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qdpo.data.tokens.pack import PairRow
from qdpo.model.policy.adapter import Policy
from qdpo.settings.schema import LossConfig
from qdpo.train.step.answer_sums import join
from qdpo.train.step.feed import Reference, ready
from qdpo.train.step.losses import pair_losses, rewards
from qdpo.train.step.measures import counts, means, pair_sums
from qdpo.train.step.step import score_row


@dataclass(frozen=True)
class Evaluation:
    """Mean metrics over the pairs, and each pair's margin."""

    values: dict[str, float]
    margins: list[float]
    """Reward of chosen minus reward of rejected of each pair, in the order of the rows' pairs."""
    rows: list[int]
    """The data row of each margin."""
    logps: list[tuple[float, float]]
    """Log-probs of each pair's chosen and rejected answer under the policy, in nats; weighted by loss.ld_alpha."""

    @property
    def perplexities(self) -> dict[str, float]:
        """exp of the mean negative log-likelihood per response token: every token counts equally, not every answer."""
        return {
            f"perplexity/{side}": math.exp(-self.values[f"logps/{side}_per_token"]) for side in ("chosen", "rejected")
        }


def evaluate(
    policy: Policy,
    rows: Sequence[PairRow],
    reference: Reference | None,
    loss: LossConfig,
    advance: Callable[[int], None],
) -> Evaluation:
    """Metrics over all pairs of `rows`, without gradients; `advance` receives the number of pairs done.

    The loss is computed over all pairs at once, so that a loss which couples pairs does not depend on the packing.
    """
    number = counts(rows)
    scored = []
    with torch.no_grad():
        for row in rows:
            mean_tokens_c = number["chosen tokens"] / number["pairs"]
            scored.append(score_row(policy, ready(row, reference), loss, mean_tokens_c=mean_tokens_c))
            advance(len(row.pairs))
        pairs = join([part.pairs for part in scored])
        sums = pair_sums(pairs, pair_losses(pairs, loss), loss)
        sums |= {name: torch.stack([part.sums[name] for part in scored]).sum() for name in scored[0].sums}
        chosen_P, rejected_P = rewards(pairs, loss)
    values = means({name: value.item() for name, value in sums.items()}, rows)
    numbers = [pair.row for row in rows for pair in row.pairs]
    logps = list(zip(pairs.c.tolist(), pairs.r.tolist(), strict=True))
    return Evaluation(values, (chosen_P - rejected_P).tolist(), numbers, logps)


def reference_offset(evaluation: Evaluation, beta: float) -> tuple[float, float]:
    """Mean and largest |margin| / β of an untouched adapter, in nats; 0 if reference and policy rows are equal."""
    gaps = np.abs(np.array(evaluation.margins)) / beta
    return float(gaps.mean()), float(gaps.max())
