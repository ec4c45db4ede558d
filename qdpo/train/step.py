"""One optimizer step from rows to a report: score, weigh against the reference, differentiate, update.

Letters: N response tokens of a row · P pairs of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from qdpo.config import LossConfig
from qdpo.data.pack import PairRow
from qdpo.data.tokens import TokenPair
from qdpo.errors import NonFiniteError
from qdpo.model.adapter import Policy
from qdpo.model.forward import row_scores
from qdpo.model.logps import TokenScores
from qdpo.model.probe import RowTensors
from qdpo.train.loss import sigmoid_loss

# Reference log-probs of a pair's chosen and rejected tokens, float32.
Reference = Callable[[TokenPair], tuple[np.ndarray, np.ndarray]]

METRICS = (
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected",
    "logits/chosen", "logits/rejected", "entropy",
)  # fmt: skip


def row_tensors(row: PairRow, device: torch.device) -> RowTensors:
    """The row's arrays as int64 tensors on the device."""

    def place(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(device)

    return RowTensors(place(row.token_T), place(row.position_T), place(row.source_N), place(row.label_N), row.spans)


def score(policy: Policy, row: PairRow, *, metrics: bool) -> TokenScores:
    """Scores of the row's response tokens; with `policy.reference()` around it, the reference's."""
    tensors = row_tensors(row, policy.device)
    return row_scores(
        policy, tensors.token_T, tensors.position_T, tensors.source_N, tensors.label_N, tensors.spans, metrics=metrics
    )


@dataclass(frozen=True)
class RowLoss:
    """What a row contributes: the sum of its pairs' losses, and metrics summed over pairs, both on the device."""

    loss: Tensor
    sums: dict[str, Tensor]
    margins_P: Tensor


def row_loss(policy: Policy, row: PairRow, reference: Reference, loss: LossConfig) -> RowLoss:
    """Loss and metrics of one row; the reference is subtracted token by token, so that equal is exactly 0."""
    scores = score(policy, row, metrics=True)
    reference_N = np.concatenate([part for pair in row.pairs for part in reference(pair)])
    ratio_N = scores.logp - torch.from_numpy(reference_N).to(policy.device)
    a_P, b_P = _per_answer(ratio_N, row)
    loss_P = sigmoid_loss(a_P, b_P, beta=loss.beta, label_smoothing=loss.label_smoothing)
    with torch.no_grad():
        sums = _metric_sums(loss_P, loss.beta * a_P, loss.beta * b_P, scores, row)
    return RowLoss(loss_P.sum(), sums, (loss.beta * (a_P - b_P)).detach())


def _metric_sums(
    loss_P: Tensor, chosen_P: Tensor, rejected_P: Tensor, scores: TokenScores, row: PairRow
) -> dict[str, Tensor]:
    """Metric values summed over the row's pairs, keyed by metric name; the step divides by its number of pairs."""
    assert scores.mean_logit is not None and scores.entropy is not None
    margin_P = chosen_P - rejected_P
    logp_chosen_P, logp_rejected_P = _per_answer(scores.logp, row)
    logit_chosen_P, logit_rejected_P = _per_answer(scores.mean_logit, row, mean=True)
    entropy_chosen_P, entropy_rejected_P = _per_answer(scores.entropy, row, mean=True)
    values = (
        loss_P, chosen_P, rejected_P, margin_P, (margin_P > 0).float() + 0.5 * (margin_P == 0).float(), logp_chosen_P,
        logp_rejected_P, logit_chosen_P, logit_rejected_P, (entropy_chosen_P + entropy_rejected_P) / 2,
    )  # fmt: skip
    return {name: value.sum() for name, value in zip(METRICS, values, strict=True)}


def _per_answer(value_N: Tensor, row: PairRow, *, mean: bool = False) -> tuple[Tensor, Tensor]:
    """Sums (or means) over each answer's tokens: chosen (P,), rejected (P,). Split and summed: the order is fixed."""
    parts = torch.split(value_N, row.lengths)
    total = torch.stack([part.mean() if mean else part.sum() for part in parts])
    return total[0::2], total[1::2]


@dataclass
class StepReport:
    """One optimizer step, as plain numbers."""

    values: dict[str, float]
    """Metric name → mean over the step's pairs."""
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
    rows: Sequence[PairRow],
    reference: Reference,
    loss: LossConfig,
    *,
    max_grad_norm: float,
) -> StepReport:
    """Updates the adapter with the mean gradient over exactly the rows' pairs, however they are packed.

    Raises: NonFiniteError before the update if a loss or the gradient norm is NaN or infinite; with fp16 an infinite
    gradient is an overflow of the scaled loss: the update is skipped, the scale is lowered, and the report says so.
    """
    pairs = sum(len(row.pairs) for row in rows)
    optimizer.zero_grad(set_to_none=True)
    totals: dict[str, Tensor] = {}
    row_losses = []
    for row in rows:
        part = row_loss(policy, row, reference, loss)
        torch.autograd.backward(scaler.scale(part.loss / pairs))
        row_losses.append(part.loss.detach())
        for name, value in part.sums.items():
            totals[name] = totals[name] + value if name in totals else value
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    # The one synchronisation of the step.
    numbers = torch.stack([*totals.values(), norm, *row_losses]).tolist()
    values = {name: number / pairs for name, number in zip(totals, numbers, strict=False)}
    grad_norm, losses = numbers[len(totals)], numbers[len(totals) + 1 :]
    tokens = sum(row.tokens for row in rows)
    if not all(np.isfinite(losses)) or not (np.isfinite(grad_norm) or scaler.is_enabled()):
        raise NonFiniteError(_name_rows(rows, losses, grad_norm))
    scaler.step(optimizer)
    scaler.update()
    return StepReport(values, grad_norm, tokens, pairs, overflow=not np.isfinite(grad_norm))


def _name_rows(rows: Sequence[PairRow], losses: Sequence[float], grad_norm: float) -> str:
    bad = [row for row, value in zip(rows, losses, strict=True) if not np.isfinite(value)] or rows
    numbers = sorted(pair.row for row in bad for pair in row.pairs)
    what = "The loss is not finite" if bad is not rows else f"The gradient norm is {grad_norm}"
    return (
        f"{what} at data rows {', '.join(map(str, numbers[:16]))}. The adapter is as it was before this step. "
        "Look at these rows in the data, lower train.learning_rate, or compute with model.dtype=bf16 or fp32."
    )
