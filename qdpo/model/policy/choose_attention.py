"""Selects the fastest attention path that is exact on the loaded model, and reports why faster paths were refused."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers.utils import logging

from qdpo.errors import ConfigError, VerificationError
from qdpo.families.config_fields import attention_softcap
from qdpo.model.fast import attention
from qdpo.model.fast.attention import PairSpans
from qdpo.model.policy import probe, recurrent_rows
from qdpo.model.policy.adapter import Policy, RowLayout
from qdpo.model.policy.row import RowTensors

# Fastest first: the row layout, and the attention function.
CANDIDATES: list[tuple[RowLayout, str]] = [
    ("spans", attention.NAME),
    ("mask", "sdpa"),
    ("mask", "eager"),
    ("separate", "sdpa"),
    ("separate", "eager"),
]
# Rotary types whose frequencies depend on the longest position of the call: one long pair would change its whole row.
LENGTH_DEPENDENT = ("dynamic", "longrope")


def choose_path(policy: Policy, row: RowTensors, wanted: str, *, longest: int, say: Callable[[str], None]) -> str:
    """Sets the policy's layout and attention function to the first exact on `row`; returns the path's name.

    A path is exact if it equals separate sequences by the architecture's own code. `wanted` is model.attention: "sdpa"
    and "eager" mean separate sequences by that function. `longest` is the largest number of tokens of a prompt and its
    answer.

    Raises: ConfigError if the wanted function is not exact, VerificationError if no path is.
    """
    attention.register()
    truth_N = _truth(policy, row)
    candidates = CANDIDATES if wanted == "auto" else [c for c in CANDIDATES if c == ("separate", wanted)]
    refused: list[str] = []
    if wanted == "auto":
        stateful = recurrent_rows.install(policy.backbone, policy.head.weight_VD.dtype, policy.device)
        why = sharing_obstacle(policy, longest, stateful)
    else:
        why = None
    if why is not None:
        candidates = [candidate for candidate in CANDIDATES if candidate[0] == "separate"]
        refused.append(why)
    for layout, name in candidates:
        policy.layout, spans = layout, PairSpans(row.spans)
        why = _refusal(policy, name, row, truth_N, spans)
        if why is None:
            paths = sorted(spans.paths) or [name]
            say(f"attention: {_announcement(policy, ' and '.join(paths), refused)}")
            return ", ".join([layout, *(path.partition(" (")[0] for path in paths)])
        refused.append(f"{_label(layout, name)}: {why}")
    if wanted != "auto":
        raise ConfigError(f"model.attention={wanted} is not exact on this model ({refused[-1]}). Use `auto`.")
    raise VerificationError("No attention path is exact on this model: " + "; ".join(refused))


def choose_unseen(policy: Policy) -> None:
    """Sets the path that the architecture allows, for a model without weights, on which nothing can be checked."""
    attention.register()
    dtype = policy.head.weight_VD.dtype
    recurrent_rows.install(policy.backbone, dtype, policy.device, weightless=True)
    policy.layout = "spans"
    if sharing_obstacle(policy, 0) is None and switch_attention(policy, attention.NAME):
        return
    policy.layout = "separate"
    if is_beyond_sdpa(policy) or not switch_attention(policy, "sdpa"):
        switch_attention(policy, "eager")


def switch_attention(policy: Policy, name: str) -> bool:
    """Switches the attention function to `name`. True if it took effect; transformers skips unregistered models."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        policy.backbone.set_attn_implementation(name)
    except (ValueError, ImportError):
        return False
    finally:
        logging.set_verbosity(verbosity)
    found: str = policy.backbone.config.get_text_config()._attn_implementation
    return found == name


def _truth(policy: Policy, row: RowTensors) -> Tensor:
    """Log-probs of separate sequences by the architecture's own code: "eager", if the model can be switched to it."""
    switch_attention(policy, "eager")
    truth_N = probe.separate_logps(policy, row)
    if truth_N.isfinite().all() or is_beyond_sdpa(policy):
        return truth_N
    # Eager scores overflow in fp16 before they are scaled (Qwen2); SDPA's do not.
    switch_attention(policy, "sdpa")
    return probe.separate_logps(policy, row)


def _refusal(policy: Policy, name: str, row: RowTensors, truth_N: Tensor, spans: PairSpans) -> str | None:
    if name == "sdpa" and is_beyond_sdpa(policy):
        return "it has neither soft-caps nor sinks"
    if not switch_attention(policy, name):
        return f"{type(policy.backbone).__name__} does not take it"
    return probe.fault(policy, row, truth_N, spans)


def is_beyond_sdpa(policy: Policy) -> bool:
    """True with soft-capped scores or attention sinks; before 5.18, transformers' SDPA silently ignores a soft-cap."""
    softcap = attention_softcap(policy.backbone.config.get_text_config())
    return softcap is not None or any(name.endswith("sinks") for name, _ in policy.backbone.named_parameters())


def sharing_obstacle(policy: Policy, longest: int, stateful: Mapping[str, str] | None = None) -> str | None:
    """The reason why the architecture forbids shared rows that a short row in bf16 would not show, or None.

    `stateful` are kinds of recurrent layers that compute no rows, each with its reason.
    """
    config = policy.backbone.config.get_text_config()
    if getattr(config, "alibi", False):
        return "its attention is biased by distance in the row (ALiBi)"
    if "position_ids" not in inspect.signature(policy.backbone.forward).parameters:
        return "the model takes no position ids (ALiBi, or a state instead of attention)"
    if "local" in getattr(config, "attention_layers", []):
        return "the model has layers of local attention"
    if (why := recurrent_rows.obstacle(policy.backbone, stateful or {})) is not None:
        return why
    for rope in _rope_parameters(config):
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if rope.get("rope_type") in LENGTH_DEPENDENT and longest > original:
            return f"its rotary positions change beyond {original} tokens, and data.max_tokens is {longest}"
    return None


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    """The rotary settings of the whole model, or of each kind of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    return [found] if "rope_type" in found else [rope for rope in found.values() if isinstance(rope, dict)]


def _label(layout: RowLayout, name: str) -> str:
    return {"spans": "qdpo's own function", "mask": f"{name} with a mask", "separate": f"{name}"}[layout]


def _announcement(policy: Policy, path: str, refused: list[str]) -> str:
    why = f"; refused: {'; '.join(refused)}" if refused else ""
    if policy.layout == "separate":
        return f"each answer is computed with its own copy of the prompt, by {path}{why}"
    how = path if policy.layout == "spans" else f"{path} and a mask of T×T elements for a row of T tokens"
    return f"each prompt is computed once for both of its answers, by {how} (checked against separate sequences){why}"
