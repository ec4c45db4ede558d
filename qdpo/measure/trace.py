"""Traces the actual training step on fake tensors at full size: its peak GPU memory, without a GPU or any weights.

Fake tensors have shapes but no data; `model.trace.live` counts them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qdpo.data.tokens.pack import PairRow
from qdpo.data.tokens.sieve import TokenPair
from qdpo.forecast.memory import MemorySettings, RowSize
from qdpo.model.base.text_model import decoder_of
from qdpo.model.fast.logps import Head
from qdpo.model.policy import adapter, choose_attention, install, recompute
from qdpo.model.policy.adapter import Policy
from qdpo.model.trace.fake_base import no_fake, random_base
from qdpo.model.trace.live import CountedHostInputs, LiveBytes, as_on_cuda
from qdpo.settings.schema import LossConfig
from qdpo.train.step.feed import ready
from qdpo.train.step.step import backward_by_row


def trace_peak(
    config: Any, run: MemorySettings, row: RowSize, *, targets: Sequence[str] = ("all-linear",)
) -> dict[str, float]:
    """Bytes at the step's peak, for a transformers config under `run`, on two equal rows one after the other.

    "fixed" is the memory before a step: base, adapter and optimizer states, without the CUDA context.
    """
    device, dtype = torch.device("cpu"), {2: torch.bfloat16, 4: torch.float32}[run.element]
    with torch.device("cpu"), FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as count, as_on_cuda():
        base = random_base(
            config, quantization="nf4" if run.quantised else "none", double_quant=run.double_quant, dtype=dtype,
            device=device,
        )  # fmt: skip
        with no_fake():
            model = adapter.new_adapter(
                base, rank=run.rank, alpha=run.rank, targets=list(targets), rslora=False, seed=0
            )
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if parameter.requires_grad:
                    setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter)))
        causal = model.get_base_model()
        policy = Policy(model, decoder_of(causal), Head.of(causal), device, "spans", run.tile_mib)
        choose_attention.choose_unseen(policy)
        with no_fake():
            install.install(model, device, weightless=True)
        layers = recompute.Layers(policy.backbone, host=CountedHostInputs(count) if run.offload else None)
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
