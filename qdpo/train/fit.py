"""Fits a run into its device: values for the memory settings that are `auto`, and the worst row tried before step 0."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from qdpo import memory
from qdpo.config import RunConfig
from qdpo.data.pack import PairRow, pack_rows
from qdpo.data.tokens import TokenPair
from qdpo.errors import OutOfMemoryError
from qdpo.memory import GIB
from qdpo.train.meters import give_back_memory
from qdpo.train.policy import Loaded
from qdpo.train.step import score

Say = Callable[[str], None]
SETTINGS = ("memory.tokens_per_row", "memory.kept_layers", "memory.offload")
# Share of the free memory that is planned for: the rest is fragmentation, and what the formula does not know.
PLANNED_SHARE = 0.92
# On CPUs longer rows gain nothing.
CPU_ROW = 2048


def choose_memory(
    config: RunConfig,
    model_config: Any,
    pairs: Sequence[TokenPair],
    *,
    device: torch.device,
    dtype: str,
    optimizer: str,
    say: Say,
) -> dict[str, Any]:
    """Concrete values for SETTINGS: as given, or from the forecast for this device and these pairs."""
    given = config.memory
    if "auto" not in (given.tokens_per_row, given.kept_layers, given.offload):
        return dict(zip(SETTINGS, (given.tokens_per_row, given.kept_layers, given.offload), strict=True))
    text = model_config.get_text_config()
    try:
        shape = memory.Shape.of(lambda name: getattr(text, name, None))
    except KeyError as error:
        say(f"memory: no forecast for this architecture (its config names no {error}); nothing is kept or packed")
        return {
            "memory.tokens_per_row": _number(given.tokens_per_row) or 0,
            "memory.kept_layers": 0 if given.kept_layers == "auto" else given.kept_layers,
            "memory.offload": given.offload is True,
        }
    cuda = device.type == "cuda"
    free = available(device) if given.limit_gib is None else min(available(device), given.limit_gib * GIB)
    longest = max(pair.tokens for pair in pairs)
    settings = memory.Settings(
        rank=config.adapter.rank,
        optimizer=optimizer,
        quantised=config.model.quantization != "none",
        element=4 if dtype == "fp32" else 2,
        tile_mib=given.head_tile_mib,
        row_tokens=longest,
        kept_layers=0,
        offload=False,
        cuda=cuda,
    )
    step_tokens = int(np.mean([pair.tokens for pair in pairs]) * config.train.pairs_per_step)
    choice = memory.choose(
        shape,
        settings,
        limit=free * PLANNED_SHARE,
        longest=longest,
        step_tokens=step_tokens if cuda else min(step_tokens, CPU_ROW),
        rows=_number(given.tokens_per_row),
        kept=shape.layers if given.kept_layers == "all" else _number(given.kept_layers),
        offload=None if given.offload == "auto" else given.offload,
    )
    row = "one pair" if choice.tokens_per_row == 0 else f"{choice.tokens_per_row} tokens"
    say(
        f"memory: {choice.peak / GIB:.1f} GiB forecast of {free / GIB:.1f} GiB free, with rows of {row}, "
        f"{choice.kept_layers} of {shape.layers} layers kept" + (", inputs of the others on the host" * choice.offload)
    )
    return dict(zip(SETTINGS, (choice.tokens_per_row, choice.kept_layers, choice.offload), strict=True))


def _number(value: int | str) -> int | None:
    return value if isinstance(value, int) else None


def available(device: torch.device) -> float:
    """Free bytes of the device; on the CPU, memory that the system can give without swapping."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    return float(psutil.virtual_memory().available)


def settled(config: RunConfig, found: dict[str, Any]) -> RunConfig:
    """The settings with the memory values that the run was started with."""
    values = {name.partition(".")[2]: found[name] for name in SETTINGS if name in found}
    return config.model_copy(update={"memory": config.memory.model_copy(update=values)})


def try_worst_row(
    loaded: Loaded,
    pairs: Sequence[TokenPair],
    *,
    tokens_per_row: int,
    kept_layers: int | str,
    may_lower: bool,
    optimizer_bytes: int,
    say: Say,
) -> int | str:
    """Forward and backward of the longest row there can be, with room for the optimizer; trains nothing.

    An out-of-memory error comes here or never. If `may_lower`, layers are given up one quarter at a time until the row
    fits. Returns the number of kept layers that fits.
    Raises: OutOfMemoryError if it does not fit.
    """
    worst = worst_rows(pairs, tokens_per_row)
    kept = kept_layers
    while True:
        try:
            _try(loaded, worst, optimizer_bytes)
            return kept
        except torch.cuda.OutOfMemoryError as error:
            loaded.policy.peft.zero_grad(set_to_none=True)
            first_line = str(error).splitlines()[0]
        give_back_memory(loaded.policy.device)
        layers = len(loaded.layers) if kept == "all" else int(kept)
        tokens = max(row.tokens for row in worst)
        if not may_lower or layers == 0:
            raise OutOfMemoryError(
                f"The longest row, {tokens} tokens, does not fit: {first_line} Nothing was trained. Lower "
                "data.max_tokens (the longest pair), memory.kept_layers or memory.head_tile_mib, set "
                "memory.offload=true, or close other programs that hold memory of the card."
            )
        kept = layers - max(1, layers // 4)
        loaded.layers.keep(kept)
        say(f"memory: the longest row, {tokens} tokens, does not fit with {layers} layers kept; trying {kept}")


def worst_rows(pairs: Sequence[TokenPair], tokens_per_row: int) -> list[PairRow]:
    """The fullest row that pairs can make, and the longest pair alone if the row holds no longer one."""
    longest = sorted(pairs, key=lambda pair: -pair.tokens)
    full: list[TokenPair] = []
    for pair in longest:
        if sum(member.tokens for member in full) + pair.tokens <= max(tokens_per_row, longest[0].tokens):
            full.append(pair)
    if tokens_per_row == 0:
        full = longest[:1]
    return pack_rows(full, max(tokens_per_row, longest[0].tokens))


def _try(loaded: Loaded, rows: Sequence[PairRow], optimizer_bytes: int) -> None:
    policy = loaded.policy
    room = torch.empty(optimizer_bytes, dtype=torch.uint8, device=policy.device)
    for row in rows:
        torch.autograd.backward(score(policy, row, metrics=True).logp.sum())
        with torch.no_grad():
            score(policy, row, metrics=True)
    policy.peft.zero_grad(set_to_none=True)
    del room
    if policy.device.type == "cuda":
        torch.cuda.synchronize(policy.device)
