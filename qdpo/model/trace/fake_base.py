"""Builds a base of an architecture's true shape with random weights, or without weights on fake tensors.

It never exists in 16 bits: its linear layers are quantised one by one on the device, or are fake tensors.
"""

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from qdpo.model.base import experts, quant
from qdpo.model.base.text_model import TextModel, text_model_of
from qdpo.model.fast import attention


def random_base(config: Any, *, quantization: str, double_quant: bool, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a transformers config on `device`, frozen, as `base.load_base` would load one of that shape.

    Inside FakeTensorMode everything that costs memory is fake; norms and position tables stay real.
    """
    with no_fake():
        text = text_model_of(config)
    model = bare_base(text, dtype)
    return filled_base(model, quantization=quantization, double_quant=double_quant, dtype=dtype, device=device)


def bare_base(text: TextModel, dtype: torch.dtype) -> Any:
    """A text model with its parameters on meta; position tables are real."""
    attention.register()
    with no_fake(), init_empty_weights():
        return text.cls._from_config(copy.deepcopy(text.config), dtype=dtype)


def filled_base(model: Any, *, quantization: str, double_quant: bool, dtype: torch.dtype, device: torch.device) -> Any:
    """A bare base with its weights on `device`, quantised and frozen."""
    head = model.get_output_embeddings()
    if quantization != "none":
        for name, layer in list(model.named_modules()):
            if type(layer) is nn.Linear and layer is not head:
                parent, _, child = name.rpartition(".")
                four_bit = quant.random_four_bit(layer, quantization, double_quant, dtype, device)
                setattr(model.get_submodule(parent), child, four_bit)
        experts.put_random(model, quant.FourBit(quantization, double_quant, dtype), device)
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
