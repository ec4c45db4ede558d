"""Does every fast part equal its plain twin on the loaded model? Asked once, at the start, on two real pairs.

Letters: T tokens of the row · N response tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qdpo.errors import VerificationError
from qdpo.model.adapter import Policy
from qdpo.model.attention import SpanLike
from qdpo.model.forward import row_scores
from qdpo.model.logps import plain_logps

# Root mean square difference of a response token's log-prob, in nats. float32 reassociation stays under 1e-4 on real
# models; bf16 and fp16 activations move a token's log-prob by 0.03-0.1 whenever the shape of a product changes.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
# The shapes are the same in both passes, so that a row without a leak gives the same bits.
LEAK_TOLERANCE = 1e-3
# What a foreign attention function or module raises when it cannot take the row's layout.
CANNOT = (TypeError, KeyError, ValueError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class RowTensors:
    """One row on the device: what `row_scores` takes."""

    token_T: Tensor
    position_T: Tensor
    source_N: Tensor
    label_N: Tensor
    spans: Sequence[SpanLike]


@dataclass(frozen=True)
class Refusal:
    """Why prompts are not shared, and the attention function that is exact for separate sequences."""

    reason: str
    attention: str


def check_shared_prompt(policy: Policy, row: RowTensors) -> Refusal | None:
    """None if shared-prompt rows are exact on this model, else the reason why they are not.

    Two questions: do packed log-probs equal those of separate sequences, and does an answer stay exactly as it was
    when every other token of the row that it must not see is changed? The second finds a leak at any precision.
    """
    with torch.no_grad():
        try:
            packed = _logps(policy, row, shared=True)
            other = _logps(policy, _with_other_chosen(row), shared=True)
        except CANNOT as error:
            what = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            # SDPA ignores soft-caps and sinks without a word: only the architecture's own code is exact.
            return Refusal(f"its attention does not take the layout ({what})", "eager")
        separate = _logps(policy, row, shared=False)
    difference = (packed - separate).square().mean().sqrt().item()
    tolerance = TOLERANCE[policy.head.weight_VD.dtype]
    leak = (_rejected(other, row) - _rejected(packed, row)).abs().max().item()
    if leak > LEAK_TOLERANCE:
        return Refusal(f"the rejected answer sees the chosen one (its log-probs move by {leak:.3g} nats)", "sdpa")
    if not difference <= tolerance:
        what = f"packed and separate log-probs differ by {difference:.3g} nats a token (bound {tolerance:g})"
        return Refusal(what, "sdpa")
    return None


def check_head(policy: Policy, causal_lm: Any, row: RowTensors) -> float:
    """Largest difference, in nats, between our response log-probs and those of the model's own logits.

    Raises: VerificationError if it is beyond rounding: the model changes its logits in a way that is not known here.
    """
    span = row.spans[0]
    answer = slice(span.start, span.start + span.prompt + span.chosen)
    with torch.no_grad():
        logit_TV = causal_lm(input_ids=row.token_T[answer][None], use_cache=False).logits[0]
        expected = plain_logps(logit_TV[span.prompt - 1 : -1], row.label_N[: span.chosen])
        found = _logps(policy, row, shared=False)[: span.chosen]
    difference = (found - expected).square().mean().sqrt().item()
    if not difference <= TOLERANCE[policy.head.weight_VD.dtype]:
        raise VerificationError(
            f"The output head of {type(causal_lm).__name__} is not understood: log-probs differ from the "
            "model's own by "
            f"{difference:.3g} nats a token. This architecture is not supported; please report it."
        )
    return difference


def _logps(policy: Policy, row: RowTensors, *, shared: bool) -> Tensor:
    view = replace(policy, shared=shared)
    return row_scores(view, row.token_T, row.position_T, row.source_N, row.label_N, row.spans, metrics=False).logp


def _rejected(logp_N: Tensor, row: RowTensors) -> Tensor:
    parts, offset = [], 0
    for span in row.spans:
        parts.append(logp_N[offset + span.chosen : offset + span.chosen + span.rejected])
        offset += span.chosen + span.rejected
    return torch.cat(parts)


def _with_other_chosen(row: RowTensors) -> RowTensors:
    token_T = row.token_T.clone()
    for span in row.spans:
        chosen = slice(span.start + span.prompt, span.start + span.prompt + span.chosen)
        token_T[chosen] = token_T[chosen].flip(0).roll(1)
    return replace(row, token_T=token_T)
