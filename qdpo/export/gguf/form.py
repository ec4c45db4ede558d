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
from qdpo.families.gguf_exact import head_size, inexact
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
    reason = inexact(form, config)
    if reason:
        raise ConfigError(f"This {config.model_type} model has {reason}, which qdpo cannot write as GGUF. {otherwise}")


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
