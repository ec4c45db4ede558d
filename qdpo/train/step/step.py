"""One optimizer step from rows to a report: score, compare with the reference, differentiate, update.

Letters: N response tokens of a row · P pairs of a row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from qdpo.data.tokens.pack import PairRow
from qdpo.errors import NonFiniteError
from qdpo.model.fast.logps import TokenScores
from qdpo.model.policy.adapter import Policy
from qdpo.model.policy.forward import row_scores
from qdpo.model.policy.row import RowTensors
from qdpo.settings.loss_rules import couples_pairs
from qdpo.settings.schema import LossConfig
from qdpo.train.step.answer_sums import Pairs, sum_pairs
from qdpo.train.step.feed import ReadyRow, row_tensors
from qdpo.train.step.losses import loss_slopes, pair_losses
from qdpo.train.step.measures import counts, means, pair_sums, token_sums


def score(policy: Policy, row: PairRow, *, metrics: bool) -> TokenScores:
    """Scores of the row's response tokens; inside `policy.reference()`, those of the reference."""
    return _score(policy, row_tensors(row, policy.device), metrics=metrics, squares=False)


def _score(policy: Policy, tensors: RowTensors, *, metrics: bool, squares: bool) -> TokenScores:
    return row_scores(
        policy, tensors.token_T, tensors.position_T, tensors.source_N, tensors.label_N, tensors.spans,
        metrics=metrics, squares=squares,
    )  # fmt: skip


@dataclass(frozen=True)
class ScoredRow:
    """A row's pairs, with gradient, and its metrics summed over tokens, both on the device."""

    pairs: Pairs
    sums: dict[str, Tensor]


def score_row(policy: Policy, ready: ReadyRow, loss: LossConfig, *, mean_tokens_c: float) -> ScoredRow:
    """Log-probs of the row's answers, with their reference; `mean_tokens_c`: the step's chosen tokens per pair."""
    tensors, reference_N = ready.on(policy.device)
    scores = _score(policy, tensors, metrics=True, squares=loss.wpo)
    pairs = sum_pairs(
        scores.logp, reference_N, ready.row.lengths, loss, mean_tokens_c=mean_tokens_c, log_square_N=scores.log_square
    )
    with torch.no_grad():
        return ScoredRow(pairs, token_sums(scores, reference_N, ready.row))


@dataclass
class StepReport:
    """One optimizer step, as plain numbers."""

    values: dict[str, float]
    """Metric name → mean over the step, with the denominator in metrics.MEAN_OVER."""
    grad_norm: float
    """Norm of the adapter's gradient before clipping."""
    tokens: int
    pairs: int
    overflow: bool = False
    """True if fp16 gradients overflowed and the update was skipped."""


def train_step(
    policy: Policy,
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    rows: Sequence[ReadyRow],
    loss: LossConfig,
    *,
    max_grad_norm: float,
    sided: bool = False,
) -> StepReport:
    """Updates the adapter with the gradient of the mean loss over the rows' pairs, independently of their packing.

    Losses that couple pairs cover the whole step: every row is scored once without gradient, then again with gradient.
    `sided`: each row is first scored without gradient, then each answer separately: the same gradient, least memory.
    Raises: NonFiniteError before the update if a loss or the gradient norm is NaN or infinite. With fp16 an infinite
    gradient is an overflow of the scaled loss: the update is skipped, the scale is lowered, and the report records it.
    RowTooLarge if the gradient does not fit in the device's memory; the adapter is unchanged.
    """
    optimizer.zero_grad(set_to_none=True)
    backward = _backward_coupled if couples_pairs(loss.name) else backward_by_row
    try:
        totals, row_losses = backward(policy, rows, loss, scaler.scale, sided=sided)
    except torch.cuda.OutOfMemoryError as error:
        optimizer.zero_grad(set_to_none=True)
        raise RowTooLarge(str(error).splitlines()[0]) from None
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    # The only synchronisation of the step.
    numbers = torch.stack([*totals.values(), norm, *row_losses]).tolist()
    laid_out = [ready.row for ready in rows]
    values = means(dict(zip(totals, numbers, strict=False)), laid_out)
    grad_norm, losses = numbers[len(totals)], numbers[len(totals) + 1 :]
    tokens, pairs = sum(row.tokens for row in laid_out), sum(len(row.pairs) for row in laid_out)
    if not all(np.isfinite(losses)) or not (np.isfinite(grad_norm) or scaler.is_enabled()):
        raise NonFiniteError(_name_rows(laid_out, losses, grad_norm))
    scaler.step(optimizer)
    scaler.update()
    return StepReport(values, grad_norm, tokens, pairs, overflow=not np.isfinite(grad_norm))


class RowTooLarge(Exception):
    """A step's gradient did not fit; the step can be retried with smaller rows."""


Scale = Callable[[Tensor], Tensor]


def backward_by_row(
    policy: Policy, rows: Sequence[ReadyRow], loss: LossConfig, scale: Scale, *, sided: bool = False
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Adds the step's gradient to the adapter row by row; returns metrics summed over the step, and each row's loss."""
    number = counts([ready.row for ready in rows])
    mean_tokens_c = number["chosen tokens"] / number["pairs"]
    totals: dict[str, Tensor] = {}
    row_losses = []
    for row in rows:
        losses: list[Tensor] = []

        def share(pairs: Pairs, losses: list[Tensor] = losses) -> Tensor:
            losses.append(pair_losses(pairs, loss))
            return scale(losses[0].sum() / number["pairs"])

        scored = _backward_row(policy, row, loss, share, mean_tokens_c=mean_tokens_c, sided=sided)
        with torch.no_grad():
            _add(totals, {**pair_sums(scored.pairs, losses[0], loss), **scored.sums})
        row_losses.append(losses[0].detach().sum())
    return totals, row_losses


def _backward_coupled(
    policy: Policy, rows: Sequence[ReadyRow], loss: LossConfig, scale: Scale, *, sided: bool = False
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """As backward_by_row, for a loss that couples pairs: first its slopes by each log-prob, then rows with these."""
    number = counts([ready.row for ready in rows])
    mean_tokens_c = number["chosen tokens"] / number["pairs"]
    with torch.no_grad():
        scored = [score_row(policy, row, loss, mean_tokens_c=mean_tokens_c) for row in rows]
    losses_P, slopes = loss_slopes([part.pairs for part in scored], loss)
    for row, slope in zip(rows, slopes, strict=True):

        def share(pairs: Pairs, slope: dict[str, Tensor] = slope) -> Tensor:
            parts = [(getattr(pairs, name) * scale(value)).sum() for name, value in slope.items()]
            return torch.stack(parts).sum()

        _backward_row(policy, row, loss, share, mean_tokens_c=mean_tokens_c, sided=sided)
    totals: dict[str, Tensor] = {}
    row_losses = torch.split(losses_P, [len(part.pairs.c) for part in scored])
    for part, part_losses in zip(scored, row_losses, strict=True):
        _add(totals, {**pair_sums(part.pairs, part_losses, loss), **part.sums})
    return totals, [part.sum() for part in row_losses]


def _backward_row(
    policy: Policy, row: ReadyRow, loss: LossConfig, share: Callable[[Pairs], Tensor], *, mean_tokens_c: float,
    sided: bool,
) -> ScoredRow:  # fmt: skip
    """Adds the gradient of a row's share of the step's loss to the adapter."""
    if not sided:
        scored = score_row(policy, row, loss, mean_tokens_c=mean_tokens_c)
        torch.autograd.backward(share(scored.pairs))
        return scored
    tensors, reference_N = row.on(policy.device)
    with torch.no_grad():
        scores = _score(policy, tensors, metrics=True, squares=loss.wpo)
        sums = token_sums(scores, reference_N, row.row)
    logp_N = scores.logp.requires_grad_()
    pairs = sum_pairs(
        logp_N, reference_N, row.row.lengths, loss, mean_tokens_c=mean_tokens_c, log_square_N=scores.log_square
    )
    (slope_N,) = torch.autograd.grad(share(pairs), logp_N)
    for side, inside, whole in sides(row.row):
        torch.autograd.backward(score(policy, side, metrics=False).logp[inside], slope_N[whole])
    return ScoredRow(pairs, sums)


def sides(row: PairRow) -> Iterator[tuple[PairRow, slice, slice]]:
    """Each answer of a row separately: a row of its own, and its response tokens in that row and in the whole row.

    The other answer is cut to one token, which the answer cannot attend to and whose slope is unused.
    """
    start = 0
    for pair in row.pairs:
        chosen, rejected = len(pair.chosen), len(pair.rejected)
        yield PairRow([replace(pair, rejected=pair.rejected[:1])]), slice(0, chosen), slice(start, start + chosen)
        place = slice(start + chosen, start + chosen + rejected)
        yield PairRow([replace(pair, chosen=pair.chosen[:1])]), slice(1, 1 + rejected), place
        start += chosen + rejected


def _add(totals: dict[str, Tensor], sums: dict[str, Tensor]) -> None:
    for name, value in sums.items():
        totals[name] = totals[name] + value if name in totals else value


def _name_rows(rows: Sequence[PairRow], losses: Sequence[float], grad_norm: float) -> str:
    bad = [row for row, value in zip(rows, losses, strict=True) if not np.isfinite(value)] or rows
    numbers = sorted(pair.row for row in bad for pair in row.pairs)
    what = "The loss is not finite" if bad is not rows else f"The gradient norm is {grad_norm}"
    return (
        f"{what} at data rows {', '.join(map(str, numbers[:16]))}. The adapter is unchanged since the previous step. "
        "Look at these rows in the data, lower train.learning_rate, or compute with model.dtype=bf16 or fp32."
    )
