"""Holds a folder's tensors to its architecture: first by their shapes, without memory, then as they were loaded."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdpo.errors import ConfigError
from qdpo.families.stored_form import stored_form
from qdpo.model.base.foreign import reading
from qdpo.model.base.headers import HeaderEntry

SOURCE = "Copy or download the model again."
ELEMENTS_PER_BYTE = 2  # of 4-bit weights
ROOM = 4  # a head or tables that the folder stores once, or leaves out
SMALL = 10**7  # parameters that any model may have beyond its weights, as tiny ones in tests


def check_shapes(folder: Path, stored: dict[str, HeaderEntry]) -> None:
    """Build the model without memory from config.json, and compare it with the headers.

    Names are compared where both sides have them: transformers renames, splits and joins tensors of many families at
    load, and reports then what is missing.
    Raises: ConfigError if the model cannot be built, is far larger than its weights, or a tensor has another size.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    where = f"transformers cannot build the model of {folder}/config.json (from model.path)"
    with reading(where, "Copy config.json from the model's source."):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            return  # refused later, by the verb that wants such a model
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    stored_bytes = sum(tensor.end - tensor.start for tensor in stored.values())
    if wanted > ELEMENTS_PER_BYTE * ROOM * stored_bytes + SMALL:
        raise ConfigError(
            f"{folder}/config.json (from model.path) describes a model of {wanted:,} parameters, but the weights take "
            f"only {stored_bytes:,} bytes. {SOURCE}"
        )
    form = stored_form(config.to_dict(), str(folder))
    if form is not None and not form.is_dequantised:
        return
    for name, parameter in model.state_dict().items():
        found = stored.get(name)
        if found is not None and found.elements != parameter.numel():
            raise ConfigError(
                f"{folder} (from model.path): the tensor {name!r} has the shape {list(found.shape)}, but config.json "
                f"describes {list(parameter.shape)}. Weights and config.json are of different models, or damaged. "
                f"{SOURCE}"
            )


def check_loaded(folder: Path, about: dict[str, Any]) -> None:
    """Raises: ConfigError if transformers found tensors missing or of another shape, which it fills at random."""
    for kind, what in (("missing_keys", "are missing"), ("mismatched_keys", "have another shape")):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in about.get(kind) or ())
        if names:
            raise ConfigError(
                f"The weights in {folder} (from model.path) do not fit its config.json: {len(names)} tensors {what}, "
                f"such as {', '.join(names[:3])}. {SOURCE}"
            )
    if about.get("error_msgs"):
        raise ConfigError(
            f"The weights in {folder} (from model.path) cannot be read: {about['error_msgs'][0]}. {SOURCE}"
        )
