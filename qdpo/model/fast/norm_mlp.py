"""RMS norm and gated MLP with the same results, but less memory kept for the backward pass.

A norm keeps its input and one number per token. A gated MLP keeps the outputs of gate and up; their product is
recomputed. Float32 work runs on slices of rows, since whole-tensor temporaries would undo the saving.

Letters: T tokens · D hidden width · I intermediate width · R rank.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from qdpo.model.fast import products
from qdpo.model.fast.linear import AdaptedLinear, Expand

# Numbers per slice: 16 MB in float32.
SLICE = 2**22
Weigh = Callable[[Tensor, Tensor], Tensor]


def _weigh_after_cast(unit: Tensor, weight: Tensor) -> Tensor:
    return weight * unit.to(weight.dtype)


def _weigh_before_cast(unit: Tensor, weight: Tensor) -> Tensor:
    return (weight * unit).to(weight.dtype)


def _weigh_plus_one(unit: Tensor, weight: Tensor) -> Tensor:
    return (unit * (1.0 + weight.float())).to(weight.dtype)


# The ways in which families scale the normalised input: Llama and most others; OLMo 2; Gemma.
WEIGHINGS: tuple[Weigh, ...] = (_weigh_after_cast, _weigh_before_cast, _weigh_plus_one)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_D: Tensor, eps: float, weigh: Weigh) -> Tensor:
        output_TD = torch.empty_like(x_TD)
        inverse_T1 = torch.empty(len(x_TD), 1, dtype=torch.float32, device=x_TD.device)
        for rows in slices(x_TD):
            wide = x_TD[rows].float()
            inverse_T1[rows] = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            output_TD[rows] = weigh(wide * inverse_T1[rows], weight_D)
        ctx.save_for_backward(x_TD, inverse_T1)
        ctx.weight_D, ctx.weigh = weight_D, weigh
        return output_TD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x_TD, inverse_T1 = ctx.saved_tensors
        weight_D = ctx.weight_D.float()
        if ctx.weigh is _weigh_plus_one:
            weight_D = 1.0 + weight_D
        grad_TD = torch.empty_like(x_TD)
        for rows in slices(x_TD):
            unit = x_TD[rows].float() * inverse_T1[rows]  # not in place: in float32, .float() is the saved input
            slope = gradients[0][rows].float() * weight_D
            slope -= unit * torch.linalg.vecdot(slope, unit).div_(x_TD.shape[1])[:, None]
            grad_TD[rows] = slope.mul_(inverse_T1[rows])
        return grad_TD, None, None, None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, weigh: Weigh) -> Tensor:
    """x / rms(x), scaled by a frozen weight as `weigh` does; shape of x."""
    output: Tensor = _RmsNorm.apply(rows_of(x), weight_D, eps, weigh)  # type: ignore[no-untyped-call]
    return output.view(x.shape)


class Activation:
    """An activation and its derivative, both of a tensor in the compute type."""

    def __init__(self, name: str, function: Callable[[Tensor], Tensor]):
        self.name, self.function = name, function

    def slope(self, x: Tensor) -> Tensor:
        """f′(x), in float32."""
        with torch.enable_grad():
            leaf = x.detach().float().requires_grad_()
            (slope,) = torch.autograd.grad(self.function(leaf).sum(), leaf)
        return slope


ACTIVATIONS = (
    Activation("silu", silu),
    Activation("gelu_tanh", lambda x: gelu(x, approximate="tanh")),
    Activation("gelu", gelu),
)


class _GatedShrink(torch.autograd.Function):
    """h = f(gate) · up and h Aᵀ. Keeps gate, up and h Aᵀ; h itself is recomputed."""

    @staticmethod
    def forward(ctx: Any, gate_TI: Tensor, up_TI: Tensor, a_RI: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
        hidden_TI = act.function(gate_TI).mul_(up_TI)
        low_TR = hidden_TI @ a_RI.to(hidden_TI.dtype).T
        ctx.save_for_backward(gate_TI, up_TI, a_RI, low_TR)
        ctx.act = act
        return hidden_TI, low_TR

    @staticmethod
    def take(ctx: Any) -> Tensor:
        gate_TI, up_TI, a_RI, low_TR = ctx.saved_tensors
        ctx.taken = (gate_TI, up_TI, a_RI)
        result: Tensor = low_TR
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        grad_hidden_TI, grad_TR = gradients
        gate_TI, up_TI, a_RI = ctx.taken
        del ctx.taken
        low = a_RI.to(grad_TR.dtype)
        grad_a = torch.zeros_like(a_RI)
        for rows in slices(gate_TI):
            gate, up = gate_TI[rows], up_TI[rows]
            active = ctx.act.function(gate)
            grad_a += products.mm_fp32(grad_TR[rows].T, active * up)
            grad_hidden = torch.addmm(grad_hidden_TI[rows], grad_TR[rows], low)
            # Gradients overwrite gate and up, which are not read again.
            gate.copy_(ctx.act.slope(gate).mul_(grad_hidden).mul_(up))
            torch.mul(grad_hidden, active, out=up)
        return gate_TI, up_TI, grad_a, None


def gated_mlp(x: Tensor, gate: nn.Module, up: nn.Module, down: AdaptedLinear, act: Activation) -> Tensor:
    """down(f(gate(x)) · up(x)); shape of x."""
    gate_TI, up_TI = (rows_of(layer(x)) for layer in (gate, up))
    hidden_TI, low_TR = _GatedShrink.apply(gate_TI, up_TI, down.a_RK, act)  # type: ignore[no-untyped-call]
    output: Tensor = Expand.apply(  # type: ignore[no-untyped-call]
        hidden_TI, low_TR, down.b_NR, down.base, down.scale, low_TR.grad_fn, _GatedShrink.take
    )
    return output.view(*x.shape[:-1], output.shape[-1])


def rows_of(x: Tensor) -> Tensor:
    """(…, N) as a matrix (T, N)."""
    return x.reshape(-1, x.shape[-1])


def slices(x: Tensor) -> Iterator[slice]:
    """The rows of a matrix, in slices of about SLICE numbers."""
    rows = max(1, SLICE // x.shape[1])
    for start in range(0, len(x), rows):
        yield slice(start, start + rows)
