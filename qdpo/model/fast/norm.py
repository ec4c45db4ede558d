"""Norms with the same results as transformers' own, but less memory kept for the backward pass.

A norm keeps its input, its gate if it has one, and one number per group. Float32 work runs on slices of rows, since
whole-tensor temporaries would undo the saving.

Letters: T tokens · G groups with statistics of their own (heads, or 1) · D width of a group.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdpo.model.fast.activation import ACTIVATIONS, Activation
from qdpo.model.fast.slices import slices

Weigh = Callable[[Tensor, Tensor], Tensor]


def weigh_after_cast(unit: Tensor, weight: Tensor) -> Tensor:
    """Llama and most others."""
    return weight * unit.to(weight.dtype)


def weigh_before_cast(unit: Tensor, weight: Tensor) -> Tensor:
    """OLMo 2 and 3, gpt-oss, Gemma 4, Cohere."""
    return weight * unit


def weigh_plus_one(unit: Tensor, weight: Tensor) -> Tensor:
    """Gemma 1 to 3, Qwen3-Next, Qwen3.5."""
    return unit * (1.0 + weight.float())


# The ways in which families scale the normalised input, which is in float32.
WEIGHINGS: tuple[Weigh, ...] = (weigh_after_cast, weigh_before_cast, weigh_plus_one)


@dataclass(frozen=True)
class NormForm:
    """A norm as its family writes it: x / rms(x), or (x - mean(x)) / std(x) if centred; scaled, perhaps gated."""

    weigh: Weigh | None
    """None: without a weight."""
    is_centred: bool = False
    gate: Activation | None = None
    """The activation of a second input that multiplies the norm."""
    gates_first: bool = False
    """Mamba: the gate multiplies the norm's input, not its output."""


def forms(*, has_weight: bool, has_gate: bool) -> list[NormForm]:
    """All known forms, the most common first."""
    weighings: list[Weigh | None] = list(WEIGHINGS) if has_weight else [None]
    if has_gate:
        return [
            NormForm(weigh, False, act, first) for act in ACTIVATIONS for first in (False, True) for weigh in weighings
        ]
    return [NormForm(weigh, centred) for centred in (False, True) for weigh in weighings]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TGD: Tensor, gate_TGD: Tensor | None, weight_GD: Tensor | None, eps: float, form: NormForm
    ) -> Tensor:
        output = torch.empty_like(x_TGD)
        inverse_TG1 = torch.empty(*x_TGD.shape[:2], 1, dtype=torch.float32, device=x_TGD.device)
        for rows in slices(x_TGD):
            gate = None if gate_TGD is None else gate_TGD[rows]
            wide = _normalised_input(x_TGD[rows], gate, form)
            inverse_TG1[rows] = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
            output[rows] = _gated(_weighed(wide * inverse_TG1[rows], weight_GD, form), gate, form)
        ctx.save_for_backward(x_TGD, gate_TGD, inverse_TG1)
        ctx.weight_GD, ctx.form = weight_GD, form
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x_TGD, gate_TGD, inverse_TG1 = ctx.saved_tensors
        form: NormForm = ctx.form
        grad_x = torch.empty_like(x_TGD)
        grad_gate = None if gate_TGD is None else torch.empty_like(gate_TGD)
        for rows in slices(x_TGD):
            gate = None if gate_TGD is None else gate_TGD[rows]
            inverse = inverse_TG1[rows]
            # Not in place: in float32 this may be the saved input itself.
            unit = _normalised_input(x_TGD[rows], gate, form) * inverse
            slope = gradients[0][rows].float()
            if grad_gate is not None and form.gate is not None and not form.gates_first:
                scaled = _weighed(unit, ctx.weight_GD, form).float()
                grad_gate[rows] = form.gate.slope(gate_TGD[rows]).mul_(scaled).mul_(slope)
                slope = slope * form.gate.function(gate_TGD[rows].float())
            slope = slope * _factor(ctx.weight_GD, form)  # a new tensor: in float32 this is the incoming gradient
            if form.is_centred:
                slope -= slope.mean(-1, keepdim=True)
            slope -= unit * torch.linalg.vecdot(slope, unit).div_(x_TGD.shape[2])[..., None]
            slope *= inverse
            if grad_gate is not None and form.gate is not None and form.gates_first:
                grad_gate[rows] = form.gate.slope(gate_TGD[rows]).mul_(slope).mul_(x_TGD[rows])
                slope *= form.gate.function(gate_TGD[rows].float())
            grad_x[rows] = slope
        return grad_x, grad_gate, None, None, None


def _normalised_input(x: Tensor, gate: Tensor | None, form: NormForm) -> Tensor:
    """The input in float32, after a gate that comes first, without its mean if the norm is centred."""
    wide = x.float()
    if gate is not None and form.gate is not None and form.gates_first:
        wide = wide * form.gate.function(gate.float())
    return wide - wide.mean(-1, keepdim=True) if form.is_centred else wide


def _weighed(unit: Tensor, weight_GD: Tensor | None, form: NormForm) -> Tensor:
    return unit if form.weigh is None or weight_GD is None else form.weigh(unit, weight_GD)


def _gated(scaled: Tensor, gate: Tensor | None, form: NormForm) -> Tensor:
    if gate is None or form.gate is None or form.gates_first:
        return scaled
    return scaled * form.gate.function(gate.float())


def _factor(weight_GD: Tensor | None, form: NormForm) -> Tensor | float:
    """d scaled / d unit."""
    if form.weigh is None or weight_GD is None:
        return 1.0
    weight = weight_GD.float()
    return 1.0 + weight if form.weigh is weigh_plus_one else weight


def norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    form: NormForm,
    *,
    gate: Tensor | None = None,
    group: int | None = None,
) -> Tensor:
    """The norm of x with a frozen weight; shape and type of x.

    Statistics are those of the last `group` numbers each: by default of the weight's last dimension, or x's.
    """
    width = x.shape[-1] if weight is None else weight.numel()
    size = group or (x.shape[-1] if weight is None else weight.shape[-1])
    shape = (-1, width // size, size)
    weight_GD = None if weight is None else weight.reshape(shape[1:])
    gate_TGD = None if gate is None else gate.reshape(shape)
    output: Tensor = _Norm.apply(x.reshape(shape), gate_TGD, weight_GD, eps, form)  # type: ignore[no-untyped-call]
    return output.view(x.shape)
