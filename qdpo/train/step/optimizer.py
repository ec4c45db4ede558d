"""Optimizers of the adapter, the learning-rate schedule, and their state as plain tensors and numbers."""

import math
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn


def choose_optimizer(wanted: str, device: torch.device, say: Callable[[str], None]) -> str:
    """Name of the optimizer to use on this device; a change from `wanted` is reported."""
    if wanted == "auto":
        return "paged_adamw8bit" if device.type == "cuda" else "adamw8bit"
    if wanted == "paged_adamw8bit" and device.type == "cpu":
        say("optimizer: adamw8bit (the CPU has nothing to page to)")
        return "adamw8bit"
    return wanted


def make_optimizer(name: str, parameters: list[nn.Parameter], *, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW with betas 0.9, 0.999: 8-bit states in blocks of 256 (arXiv 2110.02861), paged to host memory, or fp32."""
    kinds: dict[str, Any] = {
        "adamw": torch.optim.AdamW,
        "adamw8bit": bnb.optim.AdamW8bit,
        "paged_adamw8bit": bnb.optim.PagedAdamW8bit,
    }
    optimizer: torch.optim.Optimizer = kinds[name](
        parameters, lr=0.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay
    )
    return optimizer


def learning_rate(step: int, *, steps: int, warmup_steps: int, peak: float, schedule: str) -> float:
    """Rate of optimizer step `step` (from 0): linear warm-up, then cosine or linear decay to 0, or constant."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (1 - progress) if schedule == "linear" else peak * 0.5 * (1 + math.cos(math.pi * progress))


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The optimizer's state as flat tensors `parameter|key`, and its scalars; neither needs pickle."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for name, parameter in names.items():
        for key, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor):
                # 8-bit states share their code tables, and safetensors does not store shared memory.
                tensors[f"{name}|{key}"] = value.detach().cpu().clone().contiguous()
            else:
                scalars[f"{name}|{key}"] = value
    return tensors, scalars


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: dict[str, nn.Parameter],
    tensors: dict[str, Tensor],
    scalars: dict[str, Any],
) -> None:
    """Restores a saved state, on each parameter's device."""
    values: dict[str, Any] = {**tensors, **scalars}
    for place, value in values.items():
        name, _, key = place.rpartition("|")
        parameter = names[name]
        # torch keeps AdamW's step counter on the CPU; every other tensor is on its parameter's device.
        stays = key == "step" or not isinstance(value, Tensor)
        optimizer.state[parameter][key] = value if stays else value.to(parameter.device)
