"""The sums over each answer's tokens that a loss uses.

N response tokens · P pairs. c, r: the chosen and the rejected answer; a, b: their log-ratios to the reference. In nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from qdpo.model.fast.transfer import to_device
from qdpo.settings.schema import LossConfig


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """All inputs of a loss: per pair, shape (P,). Fields that need a reference are None without one."""

    c: Tensor
    r: Tensor
    a: Tensor | None
    b: Tensor | None
    reference_c: Tensor | None
    reference_r: Tensor | None
    nll_c: Tensor
    """−log π of the chosen answer; unlike c, never weighted by ld_alpha."""
    tokens_c: Tensor
    tokens_r: Tensor
    mean_tokens_c: Tensor
    """Chosen tokens per pair, averaged over the whole step: normalises token means independently of packing."""
    wpo_weight: Tensor | None


def sum_pairs(
    logp_N: Tensor,
    reference_N: Tensor | None,
    lengths: Sequence[int],
    loss: LossConfig,
    *,
    mean_tokens_c: float,
    log_square_N: Tensor | None = None,
) -> Pairs:
    """Sums the log-probs of N response tokens over each answer.

    `lengths` are the tokens of chosen 0, rejected 0, chosen 1, …; shape (2P,). Policy and reference are subtracted
    token by token, so that equal log-probs give log-ratios of exactly 0. loss.ld_alpha weights the tokens beyond the
    shorter answer's length (LD-DPO, arXiv 2409.06411). `log_square_N` is log Σ_v π(v)² of each token, for WPO.
    The sums are in float64 for every input type.
    """
    logp_N = logp_N.double()
    ratio_N = None if reference_N is None else logp_N - reference_N.double()

    def over_answers(value_N: Tensor, tail: float | None = None) -> tuple[Tensor, Tensor]:
        parts = torch.split(value_N, list(lengths))
        if tail is None:
            sums = torch.stack([part.sum() for part in parts])
        else:
            shorter = [min(lengths[i - i % 2], lengths[i - i % 2 + 1]) for i in range(len(lengths))]
            sums = torch.stack([p[:n].sum() + tail * p[n:].sum() for p, n in zip(parts, shorter, strict=True)])
        return sums[0::2], sums[1::2]

    c, r = over_answers(logp_N, loss.ld_alpha)
    a, b = (None, None) if ratio_N is None else over_answers(ratio_N, loss.ld_alpha)
    reference_c, reference_r = (
        (None, None) if reference_N is None else over_answers(reference_N.double(), loss.ld_alpha)
    )
    tokens = to_device(torch.tensor(lengths, dtype=logp_N.dtype), logp_N.device)
    weight = None
    if log_square_N is not None:
        # WPO, arXiv 2406.11827 eq. 2: the answer's probability relative to sampling it, a geometric mean over tokens.
        aligned_c, aligned_r = over_answers(logp_N.detach() - log_square_N.double())
        weight = (aligned_c / tokens[0::2] + aligned_r / tokens[1::2]).exp()
    nll_c = -c if loss.ld_alpha is None else -over_answers(logp_N)[0]
    mean = torch.full_like(tokens[0::2], mean_tokens_c)
    return Pairs(
        c=c,
        r=r,
        a=a,
        b=b,
        reference_c=reference_c,
        reference_r=reference_r,
        nll_c=nll_c,
        tokens_c=tokens[0::2],
        tokens_r=tokens[1::2],
        mean_tokens_c=mean,
        wpo_weight=weight,
    )


def join(parts: Sequence[Pairs]) -> Pairs:
    """Concatenates `parts` into one Pairs, in order."""
    columns = {field.name: [getattr(part, field.name) for part in parts] for field in fields(Pairs)}
    joined: dict[str, Any] = {name: None if part[0] is None else torch.cat(part) for name, part in columns.items()}
    return Pairs(**joined)
