"""Activations with their derivatives, computed from the input that a fast part keeps."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu


class Activation:
    """An activation of single numbers, and its derivative."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]):
        self.name, self.function = name, function

    def slope(self, x: Tensor) -> Tensor:
        """f′(x), in float32."""
        return self.with_slope(x)[1]

    def with_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """f(x) and f′(x), in float32."""
        with torch.enable_grad():
            leaf = x.detach().float().requires_grad_()
            value = self.function(leaf)
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope


ACTIVATIONS = (
    Activation("silu", silu),
    Activation("gelu_tanh", lambda x: gelu(x, approximate="tanh")),
    Activation("gelu", gelu),
    Activation("sigmoid", torch.sigmoid),
)
