"""Compares a faster forward with a module's own on random input: output, gradients, and that it overwrites nothing."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qdpo.model.fast import linear

Forward = Callable[..., Tensor]
TOKENS = 24
# Norm of the difference over the norm of the plain result, for the output and each gradient.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def random_input(
    width: int, dtype: torch.dtype, device: torch.device, *, seed: int = 0, heads: int | None = None
) -> Tensor:
    """Numbers of one sequence (1, T, width), or (1, T, heads, width)."""
    shape = (1, TOKENS, width) if heads is None else (1, TOKENS, heads, width)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device, dtype).requires_grad_()


def difference(
    plain: Forward, fast: Forward, inputs: Sequence[Tensor], layers: Sequence[linear.AdaptedLinear] = ()
) -> float | str:
    """The largest relative difference between both forwards' outputs and gradients of inputs, A and B; or a fault.

    Neither may change its inputs or the gradient that it receives: other modules read the same tensors. A module of
    another library may raise anything on input that it was not made for, which is a fault like any other.
    """
    leaves = [*inputs, *(part for layer in layers for part in (layer.a_RK, layer.b_NR))]
    untouched = [layer.b_NR.detach().clone() for layer in layers]
    generator, given = torch.Generator().manual_seed(1), [one.detach().clone() for one in inputs]
    results: list[list[Any]] = []
    try:
        for layer in layers:  # B is 0 in a new adapter: a wrong scale would not show
            noise = torch.randn(layer.b_NR.shape, generator=generator).mul_(0.02)
            layer.b_NR.data.copy_(layer.b_NR.data + noise.to(layer.b_NR.device))
        for forward in (plain, fast):
            output = forward(*inputs)
            slope = torch.randn(output.shape, generator=generator.manual_seed(2)).to(output)
            before = slope.clone()
            results.append([output.detach(), *torch.autograd.grad(output, leaves, slope)])
            same = all(torch.equal(one, was) for one, was in zip(inputs, given, strict=True))
            if not (same and torch.equal(slope, before)):
                return "it overwrites its input or the gradient that it receives"
    except Exception as error:
        return f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:100]}"
    finally:
        for layer, was in zip(layers, untouched, strict=True):
            layer.b_NR.data.copy_(was)
    if results[0][0].dtype != results[1][0].dtype:
        return f"its output is {results[0][0].dtype}"
    return max(apart(expected, found) for expected, found in zip(*results, strict=True))


def apart(expected: Tensor, found: Tensor) -> float:
    """Norm of the difference over the norm of the expected; infinite where that is not finite."""
    error = ((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def verdict(found: float | str, dtype: torch.dtype) -> str | None:
    """None if the difference is within rounding; else the reason to keep the module's own forward."""
    if isinstance(found, str):
        return found
    return None if found <= TOLERANCE[dtype] else f"differs by {found:.2g} of its norm"
