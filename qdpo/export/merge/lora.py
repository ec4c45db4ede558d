"""Reads a LoRA adapter as tensors: each layer's A and B, with the scale folded into B, so that W' = W + B·A.

Shapes: R rank · K inputs of the layer · N outputs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdpo.errors import ConfigError
from qdpo.export.merge.rounding import rounded
from qdpo.model.policy.adapter import CONFIG, WEIGHTS, check_adapter_folder
from qdpo.model.policy.lora_file import A_SUFFIX, B_SUFFIX, PREFIX, module_of, read_tensors
from qdpo.model.policy.lora_fit import scale_of


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
    """An adapter's layers by module name, as in the base's checkpoint, all of the same rank; and its config.

    The config holds the fields that give the adapter its meaning.
    """

    layers: dict[str, LoraLayer]
    config: dict[str, Any]

    @property
    def rank(self) -> int:
        return max(len(layer.a_RK) for layer in self.layers.values())


def read_lora(folder: Path) -> Lora:
    """The adapter in `folder`. Layers of a smaller rank are padded with zeros, which add nothing.

    Raises: ConfigError if it is not a plain LoRA adapter of linear layers.
    """
    config = check_adapter_folder(folder)
    tensors = read_tensors(folder)
    modules = sorted({module_of(name) for name in tensors})
    # A linear layer may be named by its weight, see `peft_names`.
    weights = [f".{module}.weight" for module in modules]
    named = config.get("target_parameters") or []
    stacked = [one for one in named if not any(weight.endswith(f".{one}") for weight in weights)]
    if stacked:
        raise ConfigError(
            f"The adapter in {folder} adapts stacked experts (target_parameters={stacked}), which exports do not "
            "support. Serve the adapter with the base."
        )
    layers: dict[str, LoraLayer] = {}
    for module in modules:
        a_RK, b_NR = (tensors[f"{PREFIX}{module}{suffix}"] for suffix in (A_SUFFIX, B_SUFFIX))
        layers[module] = LoraLayer(a_RK, b_NR * scale_of(config, module, len(a_RK)))
    rank = max(len(layer.a_RK) for layer in layers.values())
    return Lora({name: _padded(layer, rank) for name, layer in layers.items()}, config)


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


__all__ = ["A_SUFFIX", "B_SUFFIX", "CONFIG", "PREFIX", "WEIGHTS", "Lora", "LoraLayer", "is_plain", "read_lora"]
