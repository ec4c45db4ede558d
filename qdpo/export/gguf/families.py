"""The families whose weights can be written as GGUF, and what of a config llama.cpp computes exactly as transformers.

llama.cpp turns neighbouring pairs of a head's rows by the rotary angle where its graph of a family says so (llama,
mistral); transformers turns row i with row i + half. The rows of q and k are reordered for those. Gemma's norms
multiply by 1 + w in transformers and by w in llama.cpp.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from qdpo.errors import ConfigError

Array = NDArray[Any]


@dataclass(frozen=True)
class Family:
    """How a model_type of transformers is written as GGUF."""

    arch: str
    is_interleaved: bool = False
    norm_shift: float = 0.0
    activation: str = "silu"
    has_biases: bool = False
    always_tied: bool = False
    # Rotary scalings that llama.cpp computes alike.
    ropes: tuple[str, ...] = ("default", "linear", "llama3")
    # Every n-th layer attends to all positions, the others within a window; None: llama.cpp knows no window here.
    window_pattern: int | None = None


GEMMA_ACTIVATION = "gelu_pytorch_tanh"
FAMILIES = {
    "llama": Family("llama", is_interleaved=True),
    "mistral": Family("llama", is_interleaved=True),
    "qwen2": Family("qwen2", has_biases=True, ropes=("default", "linear")),
    "qwen3": Family("qwen3", ropes=("default", "linear")),
    "gemma": Family("gemma", norm_shift=1.0, activation=GEMMA_ACTIVATION, always_tied=True, ropes=("default",)),
    "gemma2": Family(
        "gemma2", norm_shift=1.0, activation=GEMMA_ACTIVATION, always_tied=True, ropes=("default",), window_pattern=2
    ),
    "gemma3_text": Family(
        "gemma3", norm_shift=1.0, activation=GEMMA_ACTIVATION, ropes=("default", "linear"), window_pattern=6
    ),
    "phi3": Family("phi3", ropes=("default",)),
}


def family_of(config: Any, otherwise: str) -> Family:
    """The family of a transformers config. Raises: ConfigError naming it, with the command that helps: `otherwise`."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        known = ", ".join(FAMILIES)
        raise ConfigError(
            f"qdpo writes no GGUF of the family {config.model_type!r} (only {known}). llama.cpp's own converter may:\n"
            f"  {otherwise}"
        )
    return family


def require_exact(family: Family, config: Any, otherwise: str) -> None:
    """Raises: ConfigError naming a setting of the model that llama.cpp would not compute as transformers does."""
    reason = _inexact(family, config)
    if reason:
        raise ConfigError(
            f"This {config.model_type} model has {reason}, which qdpo cannot write as GGUF. llama.cpp's own converter "
            f"may:\n  {otherwise}"
        )


def _inexact(family: Family, config: Any) -> str | None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    rope = full_rope(config)
    head_dim = head_size(config)
    layers = getattr(config, "layer_types", None) or []
    checks = {
        f"the activation {activation}": activation != family.activation,
        f"rotary scaling of type {rope['rope_type']}": rope["rope_type"] not in family.ropes,
        "a partial rotary embedding": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "attention biases": not family.has_biases and bool(getattr(config, "attention_bias", False)),
        "MLP biases": bool(getattr(config, "mlp_bias", False)),
        "an untied output head": family.always_tied and not config.tie_word_embeddings,
        "attention in both directions": bool(getattr(config, "use_bidirectional_attention", False)),
        "sliding windows": bool(getattr(config, "use_sliding_window", False)),
        "a query scale of its own": getattr(config, "query_pre_attn_scalar", head_dim) != head_dim,
        "heads that do not fill the hidden size": config.model_type == "phi3"
        and head_dim * config.num_attention_heads != config.hidden_size,
        "an unusual order of windowed layers": family.window_pattern is not None
        and any(
            (kind == "full_attention") != (index % family.window_pattern == family.window_pattern - 1)
            for index, kind in enumerate(layers)
        ),
    }
    return next((reason for reason, applies in checks.items() if applies), None)


def full_rope(config: Any) -> dict[str, Any]:
    """Rotary settings of the layers that attend to all positions."""
    rope: dict[str, Any] = config.rope_parameters
    full: dict[str, Any] = rope.get("full_attention", rope)
    return full


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def context_length(family: Family, config: Any) -> int:
    """Positions that llama.cpp may use: where it knows no window, those within the model's window."""
    window = getattr(config, "sliding_window", None) if family.window_pattern is None else None
    return int(min(config.max_position_embeddings, window or config.max_position_embeddings))


def row_order(family: Family, config: Any, name: str) -> Array | None:
    """The order in which GGUF has the rows of weight or layer `name`: `gguf[i] = ours[order[i]]`. None: unchanged."""
    layer = name.removesuffix(".weight").removesuffix(".bias")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer.rpartition(".")[2])
    if heads is None or not family.is_interleaved:
        return None
    rows = heads * head_size(config)
    order: Array = np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).ravel()
    return order


class Names:
    """The names that GGUF has for a checkpoint's weights."""

    def __init__(self, family: Family, config: Any, folder: Path):
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
        self._map = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self._folder = folder

    def of(self, name: str) -> str:
        """GGUF's name of a weight. Raises: ConfigError for one that the family should not have."""
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(f"{self._folder} holds the weight {name}, for which GGUF has no name in its family.")
        return str(found)
