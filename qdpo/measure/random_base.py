"""Builds a policy of an architecture's true shape with random weights, or without weights, to measure it undownloaded.

The base never exists in 16 bits: its linear layers are quantised one by one on the device, or are fake tensors.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import CONFIG_MAPPING

from qdpo.families import shapes
from qdpo.families.shapes import FAMILY_OF, KNOWN
from qdpo.model.base import quant
from qdpo.model.base.load import model_config
from qdpo.model.base.text_model import text_model_of
from qdpo.model.fast import attention


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


def random_base(config: Any, *, quantization: str, double_quant: bool, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a transformers config on `device`, frozen, as `base.load_base` would load one of that shape.

    Inside FakeTensorMode everything that costs memory is fake; norms and position tables stay real.
    """
    attention.register()
    with no_fake(), init_empty_weights():
        text = text_model_of(config)
        model = text.cls._from_config(text.config, dtype=dtype)
    head = model.get_output_embeddings()
    if quantization != "none":
        for name, layer in list(model.named_modules()):
            if type(layer) is nn.Linear and layer is not head:
                parent, _, child = name.rpartition(".")
                four_bit = quant.random_four_bit(layer, quantization, double_quant, dtype, device)
                setattr(model.get_submodule(parent), child, four_bit)
        model.is_loaded_in_4bit = True
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(_values(parameter, device), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.to(device), persistent=name not in module._non_persistent_buffers_set)
    model.tie_weights()
    model.requires_grad_(False)
    quant.settle(model, dtype)
    return model.eval()


def _values(parameter: nn.Parameter, device: torch.device) -> torch.Tensor:
    if parameter.dim() == 1:
        with no_fake():
            return torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
    return torch.empty(parameter.shape, dtype=parameter.dtype, device=device).normal_(std=0.02)


def no_fake() -> Any:
    """Real tensors inside FakeTensorMode."""
    return unset_fake_temporarily()
