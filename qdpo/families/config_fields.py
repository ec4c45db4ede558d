"""Reads the fields of a transformers config whose names differ by family: head, windows, experts, tied tables.

A config is a config.json (a mapping) or a transformers object; `field` reads both. No torch.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.errors import ConfigError
from qdpo.families.family import FAMILIES, Family

FULL, SLIDING = "full_attention", "sliding_attention"
# Kinds of layers in which nothing attends.
WITHOUT_ATTENTION = {"linear_attention", "conv", "mamba", "mlp", "moe"}
# A value above 1 in any of these means experts, whose weights are not linear layers and stay in 16 bits.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# The names of the number of positions; transformers' objects know them all by the first.
_POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx")
# Models that look positions up in a table of that many rows: beyond it they fail.
_TABLES = {"biogpt", "codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "imagegpt", "openai-gpt", "opt"}
# Models whose attention falls with the distance (ALiBi), which has no end.
_ENDLESS = {"bloom", "mpt"}
# Modules that hold experts, as checkpoints name them.
_EXPERT_MODULES = (".experts.", ".block_sparse_moe.")


@dataclass(frozen=True)
class Positions:
    """The longest text that a model is made for."""

    count: int
    """Tokens of prompt and answer."""
    has_table: bool
    """True if the model fails beyond them; rotary models go on, but were not trained there."""


def json_object(path: Path, advice: str) -> dict[str, object]:
    """The object in a JSON file of model.path. Raises: ConfigError, ending with `advice`, if it holds none."""
    try:
        content: object = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} (from model.path) is not JSON: {error}. {advice}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} (from model.path) holds no JSON object. {advice}")
    return content


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


def positions(config: Any) -> Positions | None:
    """The model's positions, scaled as its rotary embedding is; None for a model without a limit, or not stated."""
    text = field(config, "text_config")
    config = config if text is None else text
    kind = str(field(config, "model_type"))
    stated = next((value for name in _POSITIONS if (value := field(config, name)) is not None), None)
    if stated is None and (family := family_of(config)) is not None:
        stated = family.defaults.get(_POSITIONS[0])
    if kind in _ENDLESS or field(config, "alibi") is True:
        return None
    if not isinstance(stated, int) or isinstance(stated, bool) or stated < 1:
        return None
    if kind in _TABLES or field(config, "position_embedding_type") == "absolute":
        return Positions(stated, has_table=True)
    return Positions(max(stated, int(_scaled(config, stated))), has_table=False)


def positions_of(folder: Path) -> Positions | None:
    """The positions that a folder's config.json states; None where it has none that can be read."""
    try:
        return positions(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def _scaled(config: Any, stated: int) -> float:
    """Positions after rope scaling: the length that it starts from, times its factor."""
    rope = field(config, "rope_scaling") or field(config, "rope_parameters")
    if not isinstance(rope, Mapping):
        return stated
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if (
        not isinstance(factor, int | float)
        or not math.isfinite(factor)
        or kind not in ("linear", "dynamic", "yarn", "llama3")
    ):
        return stated
    original = rope.get("original_max_position_embeddings") or field(config, "original_max_position_embeddings")
    if isinstance(original, int):
        return original * factor
    # Gemma 3 states the scaled length, and llama3's always stands beside its original.
    return stated if kind == "llama3" or str(field(config, "model_type")).startswith("gemma3") else stated * factor


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
