"""A linear layer of the policy, frozen base + LoRA, y = x Wᵀ + s (x Aᵀ) Bᵀ, that keeps only its input.

The adapter branch comes first and holds every saved tensor; the base product saves nothing. The recompute of a
checkpointed layer stops at the last saved tensor, so the base product of its last linear layer is never recomputed.
A and B are float32; products are in the compute type, and their gradients are summed in float32.

Letters: T tokens · K inputs · N outputs · R rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdpo.model.base import quant
from qdpo.model.fast import products


@dataclass(frozen=True)
class AdaptedLinear:
    """The parts of one PEFT layer that a forward pass needs."""

    base: nn.Linear
    a_RK: nn.Parameter
    b_NR: nn.Parameter
    scale: float


class _Shrink(torch.autograd.Function):
    """x Aᵀ. Keeps x and its own result, which the next product needs."""

    @staticmethod
    def forward(ctx: Any, x_TK: Tensor, a_RK: Tensor) -> Tensor:
        low_TR = x_TK @ a_RK.to(x_TK.dtype).T
        ctx.save_for_backward(x_TK, a_RK, low_TR)
        return low_TR

    @staticmethod
    def take(ctx: Any) -> Tensor:
        """Unpacks the saved tensors, once (a checkpoint does not allow a second time), and returns x Aᵀ."""
        x_TK, a_RK, low_TR = ctx.saved_tensors
        ctx.taken = (x_TK, a_RK)
        result: Tensor = low_TR
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor]:
        (grad_TR,) = gradients
        x_TK, a_RK = ctx.taken
        del ctx.taken
        grad_x = grad_TR @ a_RK.to(grad_TR.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, products.mm_fp32(grad_TR.T, x_TK)


class Expand(torch.autograd.Function):
    """x Wᵀ + s (x Aᵀ) Bᵀ from x and x Aᵀ. Saves nothing: `shrink`, the node that computed x Aᵀ, holds it."""

    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, low_TR: Tensor, b_NR: Tensor, base: nn.Linear, scale: float, shrink: Any, take: Any
    ) -> Tensor:
        ctx.base, ctx.scale, ctx.shrink, ctx.take, ctx.b_NR = base, scale, shrink, take, b_NR
        output_TN = quant.frozen_product(base, x_TK)
        return output_TN.addmm_(low_TR, b_NR.to(low_TR.dtype).T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (grad_TN,) = gradients
        low_TR = ctx.take(ctx.shrink)
        grad_b = products.mm_fp32(grad_TN.T, low_TR).mul_(ctx.scale)
        grad_low = (grad_TN @ ctx.b_NR.to(grad_TN.dtype)).mul_(ctx.scale)
        grad_x = grad_TN @ quant.dense_weight(ctx.base, grad_TN.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grad_low, grad_b, None, None, None, None


def adapted_linear(x: Tensor, layer: AdaptedLinear) -> Tensor:
    """The layer's output (…, N) for x (…, K)."""
    x_TK = x.reshape(-1, x.shape[-1])
    low_TR = _Shrink.apply(x_TK, layer.a_RK)  # type: ignore[no-untyped-call]
    output: Tensor = Expand.apply(  # type: ignore[no-untyped-call]
        x_TK, low_TR, layer.b_NR, layer.base, layer.scale, low_TR.grad_fn, _Shrink.take
    )
    return output.view(*x.shape[:-1], output.shape[-1])


def adapted(module: Any) -> AdaptedLinear | None:
    """The parts of a PEFT LoRA layer for the fast function; None unless it is plain LoRA on a linear layer."""
    base = getattr(module, "base_layer", None)
    if not isinstance(base, nn.Linear) or not hasattr(module, "lora_A"):
        return None
    active = list(module.active_adapters)
    if len(active) != 1 or active[0] not in module.lora_A:
        return None
    name = active[0]
    down, up = module.lora_A[name], module.lora_B[name]
    dropout = module.lora_dropout[name]
    if getattr(module, "lora_variant", {}).get(name) or getattr(dropout, "p", 0.0) > 0 or up.bias is not None:
        return None
    return AdaptedLinear(base, down.weight, up.weight, module.scaling[name])


def fast_forward(module: Any) -> Callable[..., Tensor]:
    """A forward for this PEFT layer: the fast function while its adapter is on, else the module's own."""
    plain = module.forward
    layer = adapted(module)
    assert layer is not None

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if module.disable_adapters or module.merged or args or kwargs or x.dtype != compute_dtype(layer.base):
            result: Tensor = plain(x, *args, **kwargs)
            return result
        return adapted_linear(x, layer)

    return forward


def compute_dtype(base: nn.Linear) -> torch.dtype:
    """The compute type of the layer's product."""
    dtype: torch.dtype = getattr(base, "compute_dtype", None) or base.weight.dtype
    return dtype
