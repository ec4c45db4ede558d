"""Builds a small MLP with numbers in place of one whose layers have none, as in a trace, to check a fast form on."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qdpo.model.fast.mlp import MlpParts

WIDTH, INNER, RANK = 16, 24, 4


def small_mlp(module: nn.Module, parts: MlpParts, dtype: torch.dtype) -> nn.Module:
    """The same module, with its own forward and settings, over small linear layers with random numbers."""
    twin = copy.copy(module)
    wide = 2 * INNER if parts.kind == "fused" else INNER
    with torch.random.fork_rng(devices=[]):
        layers: dict[str, nn.Module | None] = {name: _linear(WIDTH, wide, dtype) for name in parts.first}
        twin._modules = {**module._modules, **layers, parts.down: SmallAdapted(INNER, WIDTH, dtype)}
    return twin


class SmallAdapted(nn.Module):
    """A linear layer with an adapter, as PEFT writes it."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype):
        super().__init__()
        self.base_layer = _linear(inputs, outputs, dtype)
        self.lora_A = nn.ModuleDict({"twin": nn.Linear(inputs, RANK, bias=False)})
        self.lora_B = nn.ModuleDict({"twin": nn.Linear(RANK, outputs, bias=False)})
        self.lora_dropout = nn.ModuleDict({"twin": nn.Identity()})
        self.scaling, self.active_adapters = {"twin": 1.0}, ["twin"]
        self.disable_adapters = self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        low: Any = self.lora_A["twin"].weight.to(x.dtype)
        high: Any = self.lora_B["twin"].weight.to(x.dtype)
        output: Tensor = self.base_layer(x) + x @ low.T @ high.T
        return output


def _linear(inputs: int, outputs: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False).to(dtype).requires_grad_(False)
