"""Traces the actual training step on fake tensors at full size: its peak GPU memory, without a GPU or any weights.

Fake tensors have shapes but no data. A dispatch mode sees each tensor come and go, and adds up the live bytes. Memory
that a CUDA kernel allocates internally is not a tensor here, so it is added at the call (`_workspace`).
"""

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qdpo.data.tokens.pack import PairRow
from qdpo.data.tokens.sieve import TokenPair
from qdpo.forecast.memory import MemorySettings, RowSize
from qdpo.measure import random_base
from qdpo.model.base.text_model import decoder_of
from qdpo.model.fast import attention, products
from qdpo.model.fast.logps import Head
from qdpo.model.policy import adapter, choose_attention, install, recompute
from qdpo.model.policy.adapter import Policy
from qdpo.settings.schema import LossConfig
from qdpo.train.step.feed import ready
from qdpo.train.step.step import backward_by_row


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all live storages, and their peak; storages on meta and in host memory do not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.host = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        self.peak = max(self.peak, self.live + _workspace(function, args, kwargs or {}))
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


class _HostInputs(recompute.HostInputs):
    """Host buffers excluded from the count; copies between fake tensors represent those to and from the card."""

    def __init__(self, count: LiveBytes):
        super().__init__()
        self._count = count

    def buffer(self, like: Tensor) -> Tensor:
        tensor = super().buffer(like)
        self._count.to_host(tensor)
        return tensor


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


@contextlib.contextmanager
def _as_on_cuda() -> Iterator[None]:
    """Makes fake CPU tensors follow the CUDA paths: one varlen call per layer, float32 sums of 16-bit products."""
    names = (attention, "path_name"), (products, "mm_fp32")
    before = [getattr(module, name) for module, name in names]
    attention.path_name = lambda device, dtype, width: attention.VARLEN  # type: ignore[assignment]
    products.mm_fp32 = lambda left, right: torch.mm(left, right, out_dtype=torch.float32)
    try:
        yield
    finally:
        for (module, name), value in zip(names, before, strict=True):
            setattr(module, name, value)


def trace_peak(
    config: Any, run: MemorySettings, row: RowSize, *, targets: Sequence[str] = ("all-linear",)
) -> dict[str, float]:
    """Bytes at the step's peak, for a transformers config under `run`, on two equal rows one after the other.

    "fixed" is the memory before a step: base, adapter and optimizer states, without the CUDA context.
    """
    device, dtype = torch.device("cpu"), {2: torch.bfloat16, 4: torch.float32}[run.element]
    with torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as count, _as_on_cuda():
        base = random_base.random_base(
            config, quantization="nf4" if run.quantised else "none", double_quant=run.double_quant, dtype=dtype,
            device=device,
        )  # fmt: skip
        with random_base.no_fake():
            model = adapter.new_adapter(
                base, rank=run.rank, alpha=run.rank, targets=list(targets), rslora=False, seed=0
            )
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.requires_grad:
                    setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter)))
        causal = model.get_base_model()
        policy = Policy(model, decoder_of(causal), Head.of(causal), device, "spans", run.tile_mib)
        assert choose_attention.switch_attention(policy, attention.NAME)
        with random_base.no_fake():
            install.install(model, device, weightless=True)
        layers = recompute.Layers(policy.backbone, host=_HostInputs(count) if run.offload else None)
        layers.keep(run.kept_layers)
        if run.host_embeddings:
            count.to_host(causal.get_input_embeddings().weight)
        states = [_state(p, run.optimizer) for p in policy.adapter_parameters().values()]
        fixed = count.live
        count.peak = 0
        rows = [ready(_row(row), None), ready(_row(row), None)]
        backward_by_row(policy, rows, LossConfig(name=["simpo"]), lambda loss: loss)
        del states
        return {"fixed": float(fixed), "peak": float(count.peak), "host": float(count.host)}


def _state(parameter: Tensor, optimizer: str) -> Tensor:
    """The optimizer's two states of a parameter: 8-bit with a scale a block of 256, or float32 where it is small."""
    numbers = parameter.numel()
    if optimizer == "adamw" or numbers < 4096:
        return torch.empty(8 * numbers, dtype=torch.uint8)
    return torch.empty(2 * numbers + 8 * -(-numbers // 256), dtype=torch.uint8)


def _row(row: RowSize) -> PairRow:
    """A row of pairs with these totals, divided evenly."""
    pairs = []
    for number in range(row.pairs):
        prompt, answers = (_share(total, row.pairs, number) for total in (row.prompts, row.tokens - row.prompts))
        parts = [np.ones(length, dtype=np.int32) for length in (prompt, answers - answers // 2, answers // 2)]
        pairs.append(TokenPair(parts[0], parts[1], parts[2], number))
    return PairRow(pairs)


def _share(total: int, parts: int, number: int) -> int:
    return total * (number + 1) // parts - total * number // parts
