"""Finds the transformers config of a model that is measured without its weights."""

from pathlib import Path
from typing import Any

from qdpo.families import known, shapes
from qdpo.model.base.load import model_config
from qdpo.model.base.text_model import config_of_json, text_model_of
from qdpo.model.trace.fake_base import random_base as random_base


def config_of(name: str, *, layers: int | None = None) -> Any:
    """The transformers config of a known model's text model, with fewer layers if asked for."""
    content = known.config_of(name)
    text = text_model_of(config_of_json(content)).config
    if layers is not None:
        if getattr(text, "layer_types", None) is not None:
            text.layer_types = text.layer_types[:layers]
        text.num_hidden_layers = layers
    return text


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
    name = known.known_name(path)
    if name is None:
        shapes.of_model(path)  # raises an error that names what is missing
    return config_of(str(name))
