"""What a plain PEFT LoRA adapter adds to each weight, computed from its file alone.

Letters: N outputs · K inputs of a linear layer · R rank.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdpo.errors import ConfigError
from qdpo.export.rounding import rounded
from qdpo.export.shards import Stored, stored_in
from qdpo.model.adapter import WEIGHTS, check_adapter_folder

KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class Delta:
    """scale · B·A, in float32."""

    a_RK: Tensor
    b_NR: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        return self.b_NR.shape[0], self.a_RK.shape[1]

    def added_to(self, weight_NK: Tensor, dtype: torch.dtype, tile: int = 2**18) -> Iterator[Tensor]:
        """weight + delta in `dtype`, some rows at a time; the sum is in float32 and rounded once (see `rounding`)."""
        rows, first = max(1, tile // weight_NK.shape[1]), 0
        for weight, b in zip(torch.split(weight_NK, rows), torch.split(self.b_NR, rows), strict=True):
            yield rounded(torch.addmm(weight.float(), b, self.a_RK, alpha=self.scale), dtype, first)
            first += weight.numel()


def load_deltas(folder: Path) -> dict[str, Delta]:
    """The adapter's deltas by the name of the module.

    Raises: ConfigError for an adapter that is more than LoRA on linear layers.
    """
    config = check_adapter_folder(folder)
    sides: dict[str, dict[str, Stored]] = {}
    for stored in stored_in(folder / WEIGHTS):
        match = KEY.fullmatch(stored.name)
        if match is None:
            raise ConfigError(
                f"The adapter in {folder} holds {stored.name!r}, which is not LoRA on a linear layer; only that can be "
                "merged."
            )
        sides.setdefault(match["module"], {})[match["side"]] = stored
    deltas = {}
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"}:
            raise ConfigError(f"The adapter in {folder} is incomplete: {module} has only lora_{'+'.join(pair)}.")
        a_RK, b_NR = pair["A"].whole().float(), pair["B"].whole().float()
        deltas[module] = Delta(a_RK, b_NR, scale(config, module, rank=a_RK.shape[0]))
    if not deltas:
        raise ConfigError(f"The adapter in {folder} holds no tensors. Train it first.")
    return deltas


def scale(config: dict[str, Any], module: str, *, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rsLoRA; alpha_pattern goes before lora_alpha."""
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    fitting = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = next(fitting, config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)
