"""Finds the transformers config of a model that is measured without its weights."""

from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from qdpo.families import shapes
from qdpo.families.shapes import FAMILY_OF, KNOWN
from qdpo.model.base.load import model_config
from qdpo.model.trace.fake_base import random_base as random_base


def config_of(name: str, *, layers: int | None = None) -> Any:
    """A transformers config of a known model's shape, with fewer layers if asked for."""
    shape = KNOWN[name]
    numbers = {
        "num_hidden_layers": layers or shape.layers, "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads, "head_dim": shape.head_width, "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied, "pad_token_id": 0,
    }  # fmt: skip
    return CONFIG_MAPPING[FAMILY_OF[name]](**numbers)


def config_for(path: str, revision: str | None) -> Any:
    """The transformers config of model.path: from its config.json if that is on this machine, else the known shape.

    Raises: ConfigError if neither describes it.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return model_config(folder)
    cached = shapes.cached_file(path, "config.json", revision)
    if cached is not None:
        return model_config(cached.parent)
    name = shapes.known_name(path)
    if name is None:
        shapes.of_model(path)  # raises an error that names what is missing
    return config_of(str(name))
