"""Reads the fields of a transformers config whose names differ by family: head, windows, experts, tied tables.

A config is a config.json (a mapping) or a transformers object; `field` reads both. No torch.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from qdpo.families.family import FAMILIES, Family

FULL, SLIDING = "full_attention", "sliding_attention"
# A value above 1 in any of these means experts, whose weights are not linear layers and stay in 16 bits.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Modules that hold experts, as checkpoints name them.
_EXPERT_MODULES = (".experts.", ".block_sparse_moe.")


def field(config: Any, name: str) -> Any:
    """The value of a config's field, or None."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def family_of(config: Any) -> Family | None:
    """The family that the config's model_type names, or None."""
    return FAMILIES.get(str(field(config, "model_type")))


def head_scale(config: Any) -> float:
    """The factor by which the logits are multiplied.

    Cohere multiplies by logit_scale, Granite divides by logits_scaling, Falcon-H1 multiplies by lm_head_multiplier.
    """
    scale: float = field(config, "logit_scale") or field(config, "lm_head_multiplier") or 1.0
    return scale / (field(config, "logits_scaling") or 1.0)


def head_softcap(config: Any) -> float | None:
    """The bound z of logits = z · tanh(logits / z), or None."""
    cap: float | None = field(config, "final_logit_softcapping")
    return cap


def attention_softcap(config: Any) -> float | None:
    """The same bound for attention scores, or None."""
    cap: float | None = field(config, "attn_logit_softcapping")
    return cap


def layer_windows(config: Any) -> dict[str, int | None]:
    """The kinds of attention layers in the model, each with its sliding window."""
    window = field(config, "sliding_window")
    kinds = field(config, "layer_types") or [SLIDING if window else FULL]
    return {kind: window if kind == SLIDING else None for kind in sorted(set(kinds))}


def experts_field(config: Any) -> str | None:
    """The name of the config field that describes a mixture of experts, or None."""
    counts = {name: field(config, name) for name in EXPERTS}
    return next((name for name, count in counts.items() if isinstance(count, int) and count > 1), None)


def names_experts(weights: Iterable[str]) -> bool:
    """True if any of a checkpoint's weights belongs to experts."""
    return any(part in name for name in weights for part in _EXPERT_MODULES)


def is_tied(config: Any, family: Family | None) -> bool:
    """True if head and embedding share one table; a config.json omits this where it is the family's default."""
    stated = field(config, "tie_word_embeddings")
    return bool(stated if stated is not None else family is not None and family.tied)
