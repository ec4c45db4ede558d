"""Times steps of a loaded policy on random pairs; measures the matrix rate; limits the allocator to a card's size.

Only useful work counts, not recomputation: a forward pass and the gradients of inputs, since the base is frozen.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qdpo.data.tokens.pack import pack_rows
from qdpo.data.tokens.sieve import TokenPair
from qdpo.errors import ConfigError
from qdpo.families.shapes import AnyShape
from qdpo.forecast import memory
from qdpo.forecast.memory import GIB
from qdpo.forecast.plan import OTHERS_GIB
from qdpo.settings.loss_rules import needs_reference
from qdpo.settings.schema import RunConfig
from qdpo.train.policy.build import Loaded
from qdpo.train.start import auto_memory
from qdpo.train.step.feed import ReadyRow, ready
from qdpo.train.step.optimizer import make_optimizer
from qdpo.train.step.step import train_step


def limit_to_card(
    device: torch.device, limit_gib: float | None, others_gib: float | None, context_gib: float | None
) -> tuple[float, float]:
    """Free bytes, and the bytes that torch may use; on CUDA the allocator is limited to the latter.

    `limit_gib` is a card's memory, from which the memory of other programs and the CUDA context are subtracted.
    """
    free = auto_memory.available(device)
    if device.type != "cuda" or limit_gib is None:
        return free, free if limit_gib is None else min(free, limit_gib * GIB)
    others = (OTHERS_GIB if others_gib is None else others_gib) * GIB
    context = memory.CONTEXT if context_gib is None else context_gib * GIB
    allowed = min(free, limit_gib * GIB - others - context)
    if allowed <= 0:
        raise ConfigError(f"--limit-gib={limit_gib:g} leaves nothing after other programs and the CUDA context.")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(allowed / total, device)
    return free, allowed


def random_pair(
    prompt: int, chosen: int, rejected: int, row: int, generator: np.random.Generator, most: int
) -> TokenPair:
    """A pair with these token counts and ids below `most`."""
    ids = [generator.integers(0, most, length, dtype=np.int32) for length in (prompt, chosen, rejected)]
    return TokenPair(ids[0], ids[1], ids[2], row)


@dataclass(frozen=True)
class TimedStep:
    """One step: seconds, the tokens of its pairs (a prompt once), and those of answers."""

    seconds: float
    tokens: int
    responses: int


def timed_steps(
    config: RunConfig, loaded: Loaded, pairs: Sequence[TokenPair], *, tokens_per_row: int, optimizer_name: str
) -> Iterator[TimedStep]:
    """Trains on the pairs in order, pairs_per_step at a time; the caller leaves out the first step, which warms up."""
    device, size = loaded.policy.device, config.train.pairs_per_step
    parameters = list(loaded.policy.adapter_parameters().values())
    optimizer = make_optimizer(optimizer_name, parameters, weight_decay=config.train.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    for group in optimizer.param_groups:
        group["lr"] = config.train.learning_rate
    reference = _reference if needs_reference(config.loss.name) else None
    for start in range(0, len(pairs), size):
        packed = pack_rows(pairs[start : start + size], tokens_per_row)
        rows: Sequence[ReadyRow] = [ready(row, reference, pin=device.type == "cuda") for row in packed]
        wait_for(device)
        begun = time.monotonic()
        report = train_step(
            loaded.policy, parameters, optimizer, scaler, rows, config.loss, max_grad_norm=config.train.max_grad_norm
        )
        wait_for(device)
        seconds = time.monotonic() - begun
        yield TimedStep(seconds, report.tokens, sum(sum(row.lengths) for row in packed))


def _reference(pair: TokenPair) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs near those of random weights; their values do not matter here."""
    return np.full(len(pair.chosen), -10.0, np.float32), np.full(len(pair.rejected), -10.0, np.float32)


def useful_flops(shape: AnyShape, tokens: int, responses: int) -> float:
    """Floating-point operations that steps over these tokens need: all linear layers, and the head over answers."""
    return 4.0 * shape.product_weights * tokens + 4.0 * shape.table_weights * responses


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on this device, the best of five."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    best = math.inf
    for _attempt in range(6):
        wait_for(device)
        begun = time.perf_counter()
        left @ right
        wait_for(device)
        best = min(best, time.perf_counter() - begun)
    return 2.0 * size**3 / best


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
