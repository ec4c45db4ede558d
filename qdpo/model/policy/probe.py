"""Checks once, at the start, on two real pairs, that every fast part equals its plain version on the loaded model.

Letters: T tokens of the row · N response tokens · D hidden width.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qdpo.errors import VerificationError
from qdpo.families.config_fields import WITHOUT_ATTENTION, layer_windows
from qdpo.model.fast.attention import PairSpans
from qdpo.model.fast.logps import plain_logps
from qdpo.model.policy.adapter import Policy
from qdpo.model.policy.forward import row_scores
from qdpo.model.policy.row import RowTensors

# Root mean square difference of a response token's log-prob, in nats. float32 reassociation stays under 1e-4 on real
# models; with bf16 and fp16 activations a token's log-prob moves by 0.03-0.1 whenever the shape of a product changes.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
# Exceptions that a foreign attention function or module raises if it does not accept the row's layout.
CANNOT = (TypeError, KeyError, ValueError, RuntimeError, NotImplementedError, AttributeError, IndexError)


def separate_logps(policy: Policy, row: RowTensors) -> Tensor:
    """Log-probs (N,) of the row's answers, each computed alone with its own copy of the prompt."""
    with torch.no_grad():
        return row_logps(replace(policy, layout="separate"), row)


def fault(policy: Policy, row: RowTensors, truth_N: Tensor, spans: PairSpans) -> str | None:
    """The reason why the policy's layout is not exact on this model, or None; `spans` record what the layers request.

    Log-probs must equal `truth_N`, those of separate sequences by the architecture's own code. In a shared row an
    answer's gradient must also be exactly 0 for every token it may not see, which shows a leak at any precision. The
    sliding windows that layers request must be those of the config, since the probe is shorter than most windows.
    """
    try:
        with torch.no_grad():
            found_N = row_logps(policy, replace(row, spans=spans))
        leak = _leak(policy, row) if policy.shared else None
    except CANNOT as error:
        return f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:120]}"
    if policy.layout == "spans" and not spans.paths:
        return "the model does not pass the row's layout to its attention"
    if leak is not None:
        return leak
    difference = (found_N - truth_N).square().mean().sqrt().item()
    tolerance = TOLERANCE[policy.head.weight_VD.dtype]
    if not difference <= tolerance:
        return f"log-probs differ from separate sequences by {difference:.3g} nats a token (bound {tolerance:g})"
    kinds = layer_windows(policy.backbone.config.get_text_config())
    windows = {window for kind, window in kinds.items() if kind not in WITHOUT_ATTENTION}
    if policy.layout == "spans" and spans.windows != windows:
        return f"layers request sliding windows {_listed(spans.windows)}, but the config names {_listed(windows)}"
    return None


def _listed(windows: set[int | None]) -> str:
    return "+".join(sorted("none" if window is None else str(window) for window in windows)) or "nothing"


def _leak(policy: Policy, row: RowTensors) -> str | None:
    """A description of tokens that an answer's log-probs depend on although it must not see them, or None."""
    embedded: list[Tensor] = []
    hook = policy.backbone.get_input_embeddings().register_forward_hook(
        lambda _module, _inputs, output: embedded.append(output.requires_grad_())
    )
    try:
        with torch.enable_grad():
            logp_N = row_logps(policy, row)
    finally:
        hook.remove()

    def seen_T(part_N: Tensor) -> Tensor:
        (slope_BTD,) = torch.autograd.grad(part_N.sum(), embedded[0], retain_graph=True)
        return (slope_BTD[0] != 0).any(-1)

    logps = torch.split(logp_N, [length for span in row.spans for length in (span.chosen, span.rejected)])
    token_T = torch.arange(len(row.token_T), device=logp_N.device)
    chosen_T, rejected_T = torch.zeros_like(token_T, dtype=torch.bool), torch.zeros_like(token_T, dtype=torch.bool)
    for span in row.spans:
        middle = span.start + span.prompt + span.chosen
        chosen_T |= (token_T >= span.start + span.prompt) & (token_T < middle)
        rejected_T |= (token_T >= middle) & (token_T < middle + span.rejected)
    if (seen_T(torch.cat(logps[1::2])) & chosen_T).any():
        return "the rejected answer sees the chosen one"
    if (seen_T(torch.cat(logps[0::2])) & rejected_T).any():
        return "the chosen answer sees the rejected one"
    if (seen_T(torch.cat(logps[-2:])) & (token_T < row.spans[-1].start)).any():
        return "a pair sees the pair before it"
    return None


def check_head(policy: Policy, causal_lm: Any, row: RowTensors) -> float:
    """The largest difference, in nats, between our response log-probs and those from the model's own logits.

    Raises: VerificationError if it exceeds rounding: the model changes its logits in an unknown way.
    """
    span = row.spans[0]
    answer = slice(span.start, span.start + span.prompt + span.chosen)
    with torch.no_grad():
        logit_TV = causal_lm(input_ids=row.token_T[answer][None], use_cache=False).logits[0]
        expected = plain_logps(logit_TV[span.prompt - 1 : -1], row.label_N[: span.chosen])
        found = row_logps(replace(policy, layout="separate"), row)[: span.chosen]
    difference = (found - expected).square().mean().sqrt().item()
    if not difference <= TOLERANCE[policy.head.weight_VD.dtype]:
        raise VerificationError(
            f"The output head of {type(causal_lm).__name__} is not supported: log-probs differ from the model's own by "
            f"{difference:.3g} nats a token. Please report this architecture."
        )
    return difference


def row_logps(policy: Policy, row: RowTensors) -> Tensor:
    return row_scores(policy, row.token_T, row.position_T, row.source_N, row.label_N, row.spans, metrics=False).logp
