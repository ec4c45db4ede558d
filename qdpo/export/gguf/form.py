"""The families whose weights can be written as GGUF, and the config settings that llama.cpp computes exactly.

For some families (llama, mistral) llama.cpp applies the rotary angle to neighbouring pairs of a head's rows, where
transformers pairs row i with row i + half; the rows of q and k are reordered for them. Gemma's norms multiply by 1 + w
in transformers and by w in llama.cpp.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from qdpo.errors import ConfigError
from qdpo.families.config_fields import family_of
from qdpo.families.family import WITH_GGUF, GgufForm
from qdpo.families.serving import LLAMA_CPP, LLAMA_CPP_RELEASE, serving_of
from qdpo.model.base.folder import read_json

Array = NDArray[Any]


def other_writer(folder: Path, words: str) -> str:
    """The remedy where qdpo writes no GGUF file: `words`, a command of llama.cpp, if it knows the architecture."""
    serving = serving_of(read_json(folder / "config.json"))
    if serving is None or serving.architecture in LLAMA_CPP:
        return f"Try llama.cpp's converter:\n  {words}"
    served = "`qdpo export RUN --to vllm`" if serving.vllm else "transformers"
    return (
        f"llama.cpp's converter does not know {serving.architecture} either (read in {LLAMA_CPP_RELEASE}; a later "
        f"release may). Serve the merged folder by {served} instead."
    )


def form_of(config: Any, otherwise: str) -> GgufForm:
    """The family's GGUF form. Raises: ConfigError naming the family, with the remedy `otherwise`."""
    family = family_of(config)
    if family is None or family.gguf is None:
        known = ", ".join(WITH_GGUF)
        raise ConfigError(f"qdpo cannot write GGUF for the family {config.model_type!r} (only {known}). {otherwise}")
    return family.gguf


def require_exact(form: GgufForm, config: Any, otherwise: str) -> None:
    """Raises: ConfigError naming a model setting that llama.cpp does not compute as transformers does."""
    reason = _inexact(form, config)
    if reason:
        raise ConfigError(f"This {config.model_type} model has {reason}, which qdpo cannot write as GGUF. {otherwise}")


def _inexact(form: GgufForm, config: Any) -> str | None:
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    rope = full_rope(config)
    head_dim = head_size(config)
    layers = getattr(config, "layer_types", None) or []
    checks = {
        f"the activation {activation}": activation != form.activation,
        f"rotary scaling of type {rope['rope_type']}": rope["rope_type"] not in form.ropes,
        "a partial rotary embedding": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "attention biases": not form.has_biases and bool(getattr(config, "attention_bias", False)),
        "MLP biases": bool(getattr(config, "mlp_bias", False)),
        "an untied output head": form.always_tied and not config.tie_word_embeddings,
        "attention in both directions": bool(getattr(config, "use_bidirectional_attention", False)),
        "sliding windows": bool(getattr(config, "use_sliding_window", False)),
        "a query scale of its own": getattr(config, "query_pre_attn_scalar", head_dim) != head_dim,
        "heads that do not fill the hidden size": form.heads_fill_hidden
        and head_dim * config.num_attention_heads != config.hidden_size,
        "an unusual order of windowed layers": form.window_pattern is not None
        and any(
            (kind == "full_attention") != (index % form.window_pattern == form.window_pattern - 1)
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


def context_length(form: GgufForm, config: Any) -> int:
    """Positions that llama.cpp may use; where it supports no window, only those within the model's window."""
    window = getattr(config, "sliding_window", None) if form.window_pattern is None else None
    return int(min(config.max_position_embeddings, window or config.max_position_embeddings))


def row_order(form: GgufForm, config: Any, name: str) -> Array | None:
    """The row order of weight or layer `name` in GGUF: `gguf[i] = ours[order[i]]`. None: unchanged."""
    layer = name.removesuffix(".weight").removesuffix(".bias")
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(layer.rpartition(".")[2])
    if heads is None or not form.is_interleaved:
        return None
    rows = heads * head_size(config)
    order: Array = np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).ravel()
    return order


class Names:
    """GGUF's names for a checkpoint's weights."""

    def __init__(self, form: GgufForm, config: Any, folder: Path):
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == form.arch)
        self._map = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        self._folder = folder

    def of(self, name: str) -> str:
        """GGUF's name for a weight. Raises: ConfigError for a weight that the family should not have."""
        found = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(f"{self._folder} holds the weight {name}, for which GGUF has no name in this family.")
        return str(found)
