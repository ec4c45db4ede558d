"""The distance of a merged model from the trained model, measured over the tokens of answers, tile by tile.

Letters: N response tokens · R rows of one tile · V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qdpo.settings.schema import LossConfig
from qdpo.train.step.answer_sums import sum_pairs
from qdpo.train.step.losses import rewards

# Nats between two tokens that 16-bit inference cannot tell apart: a bf16 logit between 4 and 8 has steps of 0.03.
TIE = 0.02


@dataclass(frozen=True)
class Side:
    """One model's scores on the pairs: mean reward margin, share of pairs with a positive margin, answer perplexity."""

    margin: float
    accuracy: float
    perplexity_chosen: float
    perplexity_rejected: float


@dataclass(frozen=True)
class Distance:
    """Means over response tokens. `kl`: of the merged model's distribution from the trained model's, in nats.

    `top1_exact`: the share of tokens at which both models have the same most likely token; `top1` also counts ties
    within `TIE`.
    `share` is the share of the adapter's effect in the merged model: the regression of (merged − base) on (trained −
    base) over the log-probs of response tokens, 1 for the trained model and 0 for the base with its adapter off;
    `share_error` is its standard error.
    """

    kl: float
    top1_exact: float
    top1: float
    share: float
    share_error: float


@dataclass
class DistanceTally:
    """Sums over the tiles."""

    logps: list[Tensor]
    kl: float = 0.0
    exact: int = 0
    hits: int = 0

    def add(self, trained_RV: Tensor, merged_RV: Tensor, label_R: Tensor) -> None:
        """Adds the two models' logits of the same tokens; overwrites both."""
        top_R1 = merged_RV.argmax(-1, keepdim=True)
        self.exact += int((trained_RV.argmax(-1) == top_R1[:, 0]).sum())
        self.hits += int((trained_RV.gather(1, top_R1)[:, 0] >= trained_RV.amax(-1) - TIE).sum())
        trained_RV -= trained_RV.logsumexp(-1, keepdim=True)
        merged_RV -= merged_RV.logsumexp(-1, keepdim=True)
        self.logps.append(merged_RV.gather(1, label_R[:, None])[:, 0].cpu())
        self.kl += float(torch.linalg.vecdot(trained_RV.exp(), trained_RV - merged_RV).double().sum())


def distance(tally: DistanceTally, base_N: Tensor, trained_N: Tensor) -> Distance:
    """The distance over all tiles added; `base_N` and `trained_N` are log-probs of the same tokens.

    The error allows for a spread that differs from token to token (White, 1980).
    """
    merged_N = torch.cat(tally.logps).double()
    effect_N, found_N = trained_N.double() - base_N.double(), merged_N - base_N.double()
    square, count = float(effect_N @ effect_N), len(merged_N)
    means = tally.kl / count, tally.exact / count, tally.hits / count
    if square == 0:
        return Distance(*means, math.nan, math.nan)
    share = float(effect_N @ found_N) / square
    error = float(((found_N - share * effect_N) * effect_N).norm()) / square
    return Distance(*means, share, error)


def side(logp_N: Tensor, reference_N: Tensor | None, lengths: Sequence[int], loss: LossConfig) -> Side:
    """A model's scores on the pairs; `lengths` are the tokens of chosen 0, rejected 0, chosen 1, …"""
    pairs = sum_pairs(logp_N, reference_N, lengths, loss, mean_tokens_c=sum(lengths[0::2]) / (len(lengths) // 2))
    chosen_P, rejected_P = rewards(pairs, loss)
    margin_P = chosen_P - rejected_P
    sums = torch.stack([part.double().sum() for part in torch.split(logp_N, list(lengths))])
    chosen, rejected = (math.exp(-float(sums[first::2].sum()) / sum(lengths[first::2])) for first in (0, 1))
    accuracy = float((margin_P > 0).double().mean() + (margin_P == 0).double().mean() / 2)
    return Side(float(margin_P.mean()), accuracy, chosen, rejected)


def tiles(lengths: Sequence[int], rows: int) -> Iterator[slice]:
    """The slice of N of each tile; no tile holds tokens of two answers."""
    start = 0
    for length in lengths:
        for first in range(start, start + length, rows):
            yield slice(first, min(first + rows, start + length))
        start += length
