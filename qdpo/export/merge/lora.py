"""Reads a LoRA adapter as tensors: each layer's A and B, with the scale folded into B, so that W' = W + B·A.

Shapes: R rank · K inputs of the layer · N outputs.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from qdpo.errors import ConfigError
from qdpo.export.merge.rounding import rounded
from qdpo.model.policy.adapter import CONFIG, WEIGHTS, check_adapter_folder

PREFIX, A_SUFFIX, B_SUFFIX = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
# Fields of newer PEFT versions that change the meaning of A and B; `model.adapter` refuses the others.
CHANGE_MEANING = (
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "alora_invocation_tokens",
    "target_parameters",
    "arrow_config",
)


@dataclass(frozen=True)
class LoraLayer:
    """One adapted layer, in float32; its delta is B·A."""

    a_RK: Tensor
    b_NR: Tensor

    @property
    def delta_NK(self) -> Tensor:
        return self.b_NR @ self.a_RK

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.b_NR.shape[0], self.a_RK.shape[1]

    def added_to(self, weight_NK: Tensor, dtype: torch.dtype, tile: int = 2**18) -> Iterator[Tensor]:
        """weight + delta in `dtype`, a few rows at a time; the sum is in float32 and rounded once (see `rounding`)."""
        rows, first = max(1, tile // weight_NK.shape[1]), 0
        for weight, b in zip(torch.split(weight_NK, rows), torch.split(self.b_NR, rows), strict=True):
            yield rounded(torch.addmm(weight.float(), b, self.a_RK), dtype, first)
            first += weight.numel()


@dataclass(frozen=True)
class Lora:
    """An adapter's layers by module name, as in the base's checkpoint, all of the same rank; and its config as read."""

    layers: dict[str, LoraLayer]
    config: dict[str, Any]

    @property
    def rank(self) -> int:
        return max(len(layer.a_RK) for layer in self.layers.values())


def read_lora(folder: Path) -> Lora:
    """The adapter in `folder`. Layers of a smaller rank are padded with zeros, which add nothing.

    Raises: ConfigError if it is not a plain LoRA adapter.
    """
    config = check_adapter_folder(folder)
    for field in CHANGE_MEANING:
        if config.get(field):
            raise ConfigError(f"The adapter in {folder} uses {field}={config[field]}, which exports do not support.")
    tensors = load_file(folder / WEIGHTS)
    modules = sorted({_module(name, folder) for name in tensors})
    layers: dict[str, LoraLayer] = {}
    for module in modules:
        try:
            a_RK, b_NR = (tensors[f"{PREFIX}{module}{suffix}"].float() for suffix in (A_SUFFIX, B_SUFFIX))
        except KeyError as error:
            raise ConfigError(f"The adapter in {folder} lacks the tensor {error}. Save or copy it again.") from error
        layers[module] = LoraLayer(a_RK, b_NR * _scale(config, module, len(a_RK)))
    if not layers:
        raise ConfigError(f"The adapter in {folder} has no layers.")
    rank = max(len(layer.a_RK) for layer in layers.values())
    return Lora({name: _padded(layer, rank) for name, layer in layers.items()}, config)


def _module(name: str, folder: Path) -> str:
    for suffix in (A_SUFFIX, B_SUFFIX):
        if name.startswith(PREFIX) and name.endswith(suffix):
            return name.removeprefix(PREFIX).removesuffix(suffix)
    raise ConfigError(
        f"The adapter in {folder} holds {name}, which is not the A or B of a linear layer. Only those can be merged or "
        "exported."
    )


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / √rank with rsLoRA (arXiv 2312.03732); a pattern's alpha applies to its layers."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), module), config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _padded(layer: LoraLayer, rank: int) -> LoraLayer:
    missing = rank - len(layer.a_RK)
    if missing == 0:
        return LoraLayer(layer.a_RK.contiguous(), layer.b_NR.contiguous())
    return LoraLayer(
        torch.nn.functional.pad(layer.a_RK, (0, 0, 0, missing)), torch.nn.functional.pad(layer.b_NR, (0, missing))
    )


def is_plain(config: dict[str, Any]) -> bool:
    """True if every loader reads this config in the same way: alpha / rank, the same for all layers."""
    return not (config.get("use_rslora") or config.get("rank_pattern") or config.get("alpha_pattern"))


__all__ = ["CONFIG", "WEIGHTS", "LoraLayer", "Lora", "is_plain", "read_lora"]
