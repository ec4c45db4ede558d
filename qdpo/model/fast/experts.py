"""The experts of a layer, computed from stacked weights that may be in 4 bits; only the input and the routing are kept.

Tokens are sorted by expert once a layer. A block of experts at a time becomes dense, in the forward pass and again in
the backward pass, which computes the input of its second product again. Experts without a token are left out.

Letters: T tokens · K experts of a token · E experts · S = T·K, sorted by expert · D width · I intermediate width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qdpo.model.base.expert_files import LAST, first_of
from qdpo.model.fast.slices import slices

# Bytes of dense weights at a time on a GPU, where a block of experts is one grouped product. A CPU takes one expert.
BLOCK_BYTES = 2**27


class Stack(Protocol):
    """A weight matrix for each of a layer's experts, (E, …), which may be stored in another form."""

    @property
    def shape(self) -> torch.Size:
        """(E, …)."""

    def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """The matrices of the experts from `first` to before `end`."""


@dataclass(frozen=True)
class PlainStack:
    """A stack in the form of transformers."""

    weight: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
        """A view of the matrices, where their type is asked for."""
        return self.weight[first:end].to(dtype)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The parts of a module of experts in transformers: see `use_experts_implementation` there."""

    module: Any
    """Has the activation between the two products."""
    first: Stack
    """Gate and up, (E, 2I, D), or up alone."""
    last: Stack
    """Down, (E, D, I)."""
    first_bias: Tensor | None = None
    last_bias: Tensor | None = None
    is_transposed: bool = False
    """Each matrix has inputs before outputs."""
    has_gate: bool = True

    @property
    def number(self) -> int:
        return int(self.first.shape[0])

    def between(self, first_SI: Tensor) -> Tensor:
        """The input of the second product."""
        inner: Tensor = self.module._apply_gate(first_SI) if self.has_gate else self.module.act_fn(first_SI)
        return inner

    def weights(self, stack: Stack, block: "Block", dtype: torch.dtype) -> Tensor:
        """Dense (experts, inputs, outputs) of a block."""
        dense = stack.dense(block.first, block.end, dtype)
        return dense if self.is_transposed else dense.transpose(1, 2)


@dataclass(frozen=True)
class Block:
    """Neighbouring experts and their tokens."""

    first: int
    end: int
    counts: tuple[int, ...]
    """Tokens of each."""
    rows: slice
    """Their place in the sorted tokens."""
    ends: Tensor
    """The number of tokens up to the end of each, int32 on the tokens' device."""


class Sorted:
    """Tokens in the order of their experts."""

    def __init__(self, place_TK: Tensor, number: int):
        place_S, order_S = torch.sort(place_TK.reshape(-1), stable=True)
        self.expert_S, self.token_S = place_S, order_S // place_TK.shape[1]
        self.back_S = torch.empty_like(order_S)
        self.back_S[order_S] = torch.arange(len(order_S), device=order_S.device)
        counts_E = torch.zeros(number, dtype=torch.int64, device=place_S.device)
        counts_E.scatter_add_(0, place_S, torch.ones_like(place_S))
        self.order_S, self.counts, self.ends_E = order_S, as_numbers(counts_E, len(place_S)), counts_E.cumsum(0)

    def blocks(self, per_block: int) -> Iterator[Block]:
        """The experts that have tokens, in blocks of at most `per_block` neighbours."""
        start, number = 0, len(self.counts)
        for first in range(0, number, per_block):
            counts = self.counts[first : first + per_block]
            before = next((place for place, count in enumerate(counts) if count), len(counts))
            behind = next((place for place, count in enumerate(reversed(counts)) if count), 0)
            rows = slice(start, start + sum(counts))
            start = rows.stop
            if rows.stop > rows.start:
                met = tuple(counts[before : len(counts) - behind])
                ends = (self.ends_E[first + before : first + before + len(met)] - rows.start).to(torch.int32)
                yield Block(first + before, first + before + len(met), met, rows, ends)


def as_numbers(counts_E: Tensor, total: int) -> list[int]:
    """Tokens of each expert, of `total`. Fake ones have no numbers, and are spread evenly."""
    if isinstance(counts_E, FakeTensor):
        share, more = divmod(total, len(counts_E))
        return [share + (place < more) for place in range(len(counts_E))]
    found: list[int] = counts_E.tolist()
    return found


def grouped_product(x_SK: Tensor, weight_EKN: Tensor, block: Block) -> Tensor:
    """x W of each expert's rows, (S, N)."""
    if len(block.counts) == 1:
        return x_SK @ weight_EKN[0]
    if is_grouped(x_SK, weight_EKN):
        product: Tensor = nn.functional.grouped_mm(x_SK, weight_EKN, offs=block.ends)
        return product
    parts = zip(torch.split(x_SK, list(block.counts)), weight_EKN, strict=True)
    return torch.cat([x @ weight for x, weight in parts])


def is_grouped(x_SK: Tensor, weight_EKN: Tensor) -> bool:
    """True where torch has one product for all: bf16, on GPUs from Ampere on, rows of whole 16 bytes."""
    sizes = (x_SK.shape[-1], weight_EKN.shape[-1])
    aligned = all(size * x_SK.element_size() % 16 == 0 for size in sizes)
    able = x_SK.device.type != "cuda" or torch.cuda.get_device_capability(x_SK.device) >= (8, 0)
    return x_SK.dtype == torch.bfloat16 and aligned and able and hasattr(nn.functional, "grouped_mm")


def per_block(experts: Experts, x_TD: Tensor, places: int) -> int:
    """Experts that become dense at a time: one alone where most have no token, as when text is generated."""
    device, dtype = x_TD.device, x_TD.dtype
    if (device.type == "cpu" and not runs_as_on_cuda()) or places < 2 * experts.number:
        return 1
    size = dtype.itemsize * sum(stack.shape[1:].numel() for stack in (experts.first, experts.last))
    return max(1, min(experts.number, BLOCK_BYTES // size))


def runs_as_on_cuda() -> bool:
    """False; a trace on fake tensors says otherwise."""
    return False


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, place_TK: Tensor, share_TK: Tensor, experts: Experts) -> Tensor:
        plan = Sorted(place_TK, experts.number)
        output_SD = x_TD.new_empty(len(plan.token_S), x_TD.shape[1])
        for block in plan.blocks(per_block(experts, x_TD, len(plan.token_S))):
            x = x_TD[plan.token_S[block.rows]]
            first = _first_product(x, experts, experts.weights(experts.first, block, x.dtype), plan, block)
            inner = experts.between(first)
            weight = experts.weights(experts.last, block, x.dtype)
            output_SD[block.rows] = _with_bias(grouped_product(inner, weight, block), experts.last_bias, plan, block)
        ctx.save_for_backward(x_TD, place_TK, share_TK)
        ctx.experts = experts
        return _summed(output_SD, plan, share_TK)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (grad_TD,) = gradients
        x_TD, place_TK, share_TK = ctx.saved_tensors
        experts: Experts = ctx.experts
        plan = Sorted(place_TK, experts.number)
        share_S = share_TK.reshape(-1)[plan.order_S]
        grad_x_SD = x_TD.new_empty(len(plan.token_S), x_TD.shape[1])
        grad_share_S = torch.empty_like(share_S)
        for block in plan.blocks(per_block(experts, x_TD, len(plan.token_S))):
            token_S, rows = plan.token_S[block.rows], block.rows
            first_weight = experts.weights(experts.first, block, x_TD.dtype)
            first = _first_product(x_TD[token_S], experts, first_weight, plan, block)
            with torch.enable_grad():
                leaf = first.requires_grad_()
                inner = experts.between(leaf)
            grad = grad_TD[token_S]
            last_weight = experts.weights(experts.last, block, x_TD.dtype)
            grad_inner = grouped_product(grad, last_weight.transpose(1, 2), block)
            del last_weight
            grad_share = (grad_inner.float() * inner.detach().float()).sum(-1)
            if experts.last_bias is not None:
                bias = experts.last_bias[plan.expert_S[rows]]
                grad_share += (grad.float() * bias.float()).sum(-1)
            grad_share_S[rows] = grad_share.to(grad_share_S.dtype)
            grad_inner = (grad_inner * share_S[rows, None]).to(inner.dtype)
            (grad_first,) = torch.autograd.grad(inner, leaf, grad_inner)
            grad_x_SD[rows] = grouped_product(grad_first, first_weight.transpose(1, 2), block)
        grad_share_TK = grad_share_S[plan.back_S].view_as(share_TK)
        return _summed(grad_x_SD, plan, None, places=place_TK.shape[1]), None, grad_share_TK, None


def _first_product(x: Tensor, experts: Experts, weight: Tensor, plan: Sorted, block: Block) -> Tensor:
    return _with_bias(grouped_product(x, weight, block), experts.first_bias, plan, block)


def _with_bias(product: Tensor, bias_EN: Tensor | None, plan: Sorted, block: Block) -> Tensor:
    return product if bias_EN is None else product.add_(bias_EN[plan.expert_S[block.rows]])


def _summed(values_SD: Tensor, plan: Sorted, share_TK: Tensor | None, *, places: int | None = None) -> Tensor:
    """The sum over the experts of each token, weighed by `share_TK`: in float32, and always in the same order."""
    back_TK = plan.back_S.view(-1, share_TK.shape[1] if share_TK is not None else places or 1)
    total_TD = values_SD.new_empty(len(back_TK), values_SD.shape[1])
    for rows in slices(total_TD):
        parts = values_SD[back_TK[rows]].float()
        if share_TK is not None:
            parts *= share_TK[rows, :, None]
        total_TD[rows] = parts.sum(1)
    return total_TD


def experts_of(module: Any) -> Experts:
    """The parts of a module of experts of transformers (see `is_experts`)."""
    names = (first_of(module), LAST)
    stacks = [getattr(module, name) for name in names]
    biases = [getattr(module, f"{name}_bias") if module.has_bias else None for name in names]
    plain = [PlainStack(stack) if isinstance(stack, Tensor) else stack for stack in stacks]
    return Experts(
        module=module, first=plain[0], last=plain[1], first_bias=biases[0], last_bias=biases[1],
        is_transposed=module.is_transposed, has_gate=module.has_gate,
    )  # fmt: skip


def experts_output(x: Tensor, place: Tensor, share: Tensor, experts: Experts) -> Tensor:
    """The weighed sum of each token's experts; shape of x.

    `place` (T, K) numbers the experts of each token, `share` (T, K) weighs them.
    """
    x_TD = x.reshape(-1, x.shape[-1])
    output: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        x_TD, place.view(len(x_TD), -1), share.view(len(x_TD), -1), experts
    )
    return output.view_as(x)
