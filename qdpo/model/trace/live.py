"""Counts the live bytes of fake tensors: the memory of code that runs without a GPU, without weights and without data.

A dispatch mode sees each tensor come and go, and adds up the live bytes. Memory that a CUDA kernel allocates internally
is not a tensor here, so it is added at the call (`_workspace`).
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils

from qdpo.model.fast import attention, experts, mlp, norm, products, scored_attention
from qdpo.model.policy import recompute


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all live storages, and their peak; storages on meta and in host memory do not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.host = 0
        self.products = 0
        """Multiplications of all matrix products so far."""
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        self.peak = max(self.peak, self.live + _workspace(function, args, kwargs or {}))
        self.products += _products(function, args, result)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "meta" or key in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any, key: int = key, size: int = size) -> None:
            del self._known[key]
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size

    def to_host(self, tensor: Tensor) -> None:
        """Removes a tensor that represents pinned host memory from the count."""
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._known[storage._cdata] = storage
        self.live -= size
        self.host += size


class CountedHostInputs(recompute.HostInputs):
    """Host buffers excluded from the count; copies between fake tensors represent those to and from the card."""

    def __init__(self, count: LiveBytes):
        super().__init__()
        self._count = count

    def buffer(self, like: Tensor) -> Tensor:
        tensor = super().buffer(like)
        self._count.to_host(tensor)
        return tensor


def _products(function: Any, args: Any, result: Any) -> int:
    """Multiplications of a matrix product; 0 for any other call, attention included."""
    name = function.name().partition(".")[0]
    if name == "bitsandbytes::gemm_4bit":
        return int(result.numel() * args[2][1])
    left = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1, "aten::_grouped_mm": 0}.get(name)
    return 0 if left is None else int(result.numel() * args[left].shape[-1])


def _workspace(function: Any, args: Any, kwargs: dict[str, Any]) -> int:
    """Bytes that the CUDA kernel of this call allocates internally while it runs."""
    name = function.name()
    if name == "bitsandbytes::gemm_4bit":  # at training sizes: dequantise, then a dense product
        outputs, inputs = args[2]
        scales = 4 * outputs * inputs // args[4] if kwargs.get("absmax_8bit") is not None else 0
        return int(outputs * inputs * args[0].element_size() + scales)
    if name == "torch_attn::_varlen_attn_backward":  # FlashAttention 2: float32 sums of dQ, and dK, dV of every head
        query, key = args[1], args[2]
        width = -(-query.shape[2] // 32) * 32
        sums = 4 * query.shape[0] * query.shape[1] * (width + 1)
        expanded = 0
        if query.shape[1] != key.shape[1]:
            expanded = 2 * key.shape[0] * query.shape[1] * key.shape[2] * key.element_size()
        return int(sums + expanded)
    return 0


def _path_on_cuda(_device: torch.device, _dtype: torch.dtype, width: int) -> str:
    return attention.VARLEN if attention.is_varlen_width(width) else attention.PAIRWISE


class _MemoryEfficient(torch.autograd.Function):
    """Attention as CUDA's memory-efficient kernel holds it: no scores; float32 sums in the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, bias, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors[:3]
        work = [torch.empty_like(one, dtype=torch.float32) for one in inputs]
        found = [torch.empty_like(one) for one in inputs]
        del work
        return (*found, None)


def _attention_on_cuda(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
    """Values of another width than the keys: for those the CPU's attention keeps all scores, which no card does."""
    if not isinstance(query, FakeTensor) or query.shape[-1] == value.shape[-1]:
        return scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, **options)
    bias = None if attn_mask is None else query.new_empty(attn_mask.shape)
    output: Tensor = _MemoryEfficient.apply(query, key, value, bias)  # type: ignore[no-untyped-call]
    return output


def _mm_fp32_on_cuda(left: Tensor, right: Tensor) -> Tensor:
    if isinstance(left, FakeTensor):
        return torch.mm(left, right, out_dtype=torch.float32)
    return (left @ right).float()  # real numbers: an MLP's form is being checked


@contextlib.contextmanager
def as_on_cuda() -> Iterator[None]:
    """Makes fake CPU tensors follow the CUDA paths: one varlen call per layer, no kept scores, float32 sums of mm.

    transformers looks at positions for several sequences in one, and cannot with fake ones: here they are one sequence.
    """
    changes: tuple[tuple[Any, str, Any], ...] = (
        (attention, "path_name", _path_on_cuda),
        (attention, "scaled_dot_product_attention", _attention_on_cuda),
        (functional, "scaled_dot_product_attention", _attention_on_cuda),
        (products, "mm_fp32", _mm_fp32_on_cuda),
        (experts, "runs_as_on_cuda", lambda: True),
        (masking_utils, "find_packed_sequence_indices", lambda *_positions: None),
    )
    before = [getattr(module, name) for module, name, _change in changes]
    for module, name, change in changes:
        setattr(module, name, change)
    try:
        yield
    finally:
        for (module, name, _change), value in zip(changes, before, strict=True):
            setattr(module, name, value)


@contextlib.contextmanager
def short_loops() -> Iterator[None]:
    """Of loops over equal slices only the first two and the last turn: the others take the same memory, one by one."""
    places: tuple[tuple[Any, str], ...] = (
        (norm, "slices"), (mlp, "slices"), (scored_attention, "blocks"), (experts.Sorted, "blocks"),
    )  # fmt: skip
    before = [getattr(module, name) for module, name in places]
    for (module, name), loop in zip(places, before, strict=True):
        setattr(module, name, _shortened(loop))
    try:
        yield
    finally:
        for (module, name), loop in zip(places, before, strict=True):
            setattr(module, name, loop)


def _shortened(loop: Callable[..., Iterator[Any]]) -> Callable[..., list[Any]]:
    def few(*arguments: Any) -> list[Any]:
        turns = list(loop(*arguments))
        return turns if len(turns) < 4 else [*turns[:2], turns[-1]]

    return few
