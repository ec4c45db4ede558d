"""MLPs with the same results as transformers' own, but less memory kept for the backward pass.

An MLP keeps the outputs of its first matrices, gate and up; the input of its last matrix is recomputed. Float32 work
runs on slices of rows, since whole-tensor temporaries would undo the saving.

Letters: T tokens · I intermediate width · R rank.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qdpo.model.fast import products
from qdpo.model.fast.activation import Activation
from qdpo.model.fast.linear import AdaptedLinear, Expand
from qdpo.model.fast.slices import slices

Kind = Literal["gated", "fused", "ungated"]
"""f(gate) · up from two matrices; the same from one matrix, gate first; f(up)."""


@dataclass(frozen=True)
class MlpParts:
    """Names of an MLP's linear layers by kind: gate and up, or both in one, or up alone; and its last layer."""

    kind: Kind
    first: tuple[str, ...]
    down: str


MLPS = (
    MlpParts("gated", ("gate_proj", "up_proj"), "down_proj"),
    MlpParts("gated", ("w1", "w3"), "w2"),  # LFM2
    MlpParts("fused", ("gate_up_proj",), "down_proj"),  # Phi-3, GLM-4
    MlpParts("fused", ("input_linear",), "output_linear"),  # Granite's shared MLP
    MlpParts("ungated", ("up_proj",), "down_proj"),  # Arcee, Apertus, Nemotron
    MlpParts("ungated", ("c_fc",), "c_proj"),  # Starcoder2
    MlpParts("ungated", ("fc1",), "fc2"),  # Phi, nanochat
    MlpParts("ungated", ("dense_h_to_4h",), "dense_4h_to_h"),  # GPT-NeoX
)


class _MlpShrink(torch.autograd.Function):
    """h = f(gate) · up, or f(gate), and h Aᵀ. Keeps gate, up and h Aᵀ; h itself is recomputed."""

    @staticmethod
    def forward(
        ctx: Any, gate_TI: Tensor, up_TI: Tensor | None, a_RI: Tensor, act: Activation, is_fused: bool
    ) -> tuple[Tensor, Tensor]:
        gate, up = gate_TI.chunk(2, -1) if is_fused else (gate_TI, up_TI)
        hidden_TI = act.function(gate)
        if up is not None:
            hidden_TI = hidden_TI * up if hidden_TI is gate else hidden_TI.mul_(up)
        low_TR = hidden_TI @ a_RI.to(hidden_TI.dtype).T
        ctx.save_for_backward(gate_TI, up_TI, a_RI, low_TR)
        ctx.act, ctx.is_fused = act, is_fused
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
        gates, ups = gate_TI.chunk(2, -1) if ctx.is_fused else (gate_TI, up_TI)
        low = a_RI.to(grad_TR.dtype)
        grad_a = torch.zeros_like(a_RI)
        for rows in slices(gates):
            gate, up = gates[rows], None if ups is None else ups[rows]
            grad_hidden = torch.addmm(grad_hidden_TI[rows], grad_TR[rows], low)
            # Gradients overwrite gate and up, which are not read again.
            if up is None:
                value, slope = ctx.act.with_slope(gate)
                grad_a += products.mm_fp32(grad_TR[rows].T, value.to(gate.dtype))
                gate.copy_(slope.mul_(grad_hidden))
                continue
            active = ctx.act.function(gate)
            grad_a += products.mm_fp32(grad_TR[rows].T, active * up)
            gate.copy_(ctx.act.slope(gate).mul_(grad_hidden).mul_(up))
            torch.mul(grad_hidden, active, out=up)
        return gate_TI, up_TI, grad_a, None, None


def lean_mlp(x: Tensor, first: list[nn.Module], down: AdaptedLinear, act: Activation, *, kind: Kind) -> Tensor:
    """down(h), h as `kind` says, from the outputs of the layers `first`; shape of x."""
    parts = [rows_of(layer(x)) for layer in first]
    up_TI = parts[1] if kind == "gated" else None
    hidden_TI, low_TR = _MlpShrink.apply(parts[0], up_TI, down.a_RK, act, kind == "fused")  # type: ignore[no-untyped-call]
    output: Tensor = Expand.apply(  # type: ignore[no-untyped-call]
        hidden_TI, low_TR, down.b_NR, down.base, down.scale, low_TR.grad_fn, _MlpShrink.take
    )
    return output.view(*x.shape[:-1], output.shape[-1])


def rows_of(x: Tensor) -> Tensor:
    """(…, N) as a matrix (T, N)."""
    return x.reshape(-1, x.shape[-1])
