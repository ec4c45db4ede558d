"""Finds adapted layers that learn nothing: those that the gradients of a run's first steps do not reach."""

from collections.abc import Mapping

import torch
from torch import nn

from qdpo.errors import VerificationError

A, B = ".lora_A.", ".lora_B."


def check_reach(parameters: Mapping[str, nn.Parameter], *, steps_before: int, last: bool) -> list[str]:
    """Checks the adapter's gradients after a step whose gradient is finite and not 0 as a whole.

    A B without a gradient, or with one of exactly 0, is of a layer that the output does not depend on. One case is
    sound: behind a layer of the base whose weights are all 0, as of added blocks, a gradient comes with the second
    step. `steps_before` are the steps before this one. Returns layers with a gradient of 0 that the next step decides.
    Raises: VerificationError naming the layers that learn nothing, before they are saved as trained.
    """
    dead = {layer_of(name) for name, parameter in parameters.items() if parameter.grad is None}
    if dead:
        raise VerificationError(_message(sorted(dead), "no gradient reaches them"))
    slopes = {name: parameter.grad for name, parameter in parameters.items() if B in name}
    counts = torch.stack([torch.count_nonzero(slope) for slope in slopes.values() if slope is not None]).tolist()
    zero = sorted(layer_of(name) for name, count in zip(slopes, counts, strict=True) if count == 0)
    if zero and (steps_before > 0 or last):
        raise VerificationError(_message(zero, f"their gradient in step {steps_before + 1} is exactly 0"))
    return zero


def layer_of(name: str) -> str:
    """The layer of the model that a parameter of the adapter belongs to."""
    return name.partition(A)[0].partition(B)[0].removeprefix("base_model.model.")


def _message(layers: list[str], why: str) -> str:
    shown = ", ".join(layers[:3]) + (", …" if len(layers) > 3 else "")
    leaves = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
    return (
        f"{len(layers)} adapted layers learn nothing, since {why}: {shown}. The model's output does not depend on "
        f"their LoRA, and they would be saved as trained. Nothing was saved. Give adapter.targets without {leaves}; "
        "with adapter.start, merge that adapter into its base, and give the merged model as model.path."
    )
