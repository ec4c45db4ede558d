"""Fits a run into its device: resolves `auto` memory settings, and tries the worst row before step 0."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdpo.data.tokens.pack import PairRow, pack_rows
from qdpo.data.tokens.sieve import TokenPair
from qdpo.errors import ConfigError, OutOfMemoryError
from qdpo.families import shapes
from qdpo.families.shapes import AnyShape
from qdpo.forecast import choose
from qdpo.forecast.choose import Choice, Lengths
from qdpo.forecast.memory import GIB
from qdpo.model.base.folder import read_json
from qdpo.model.device import release_memory
from qdpo.model.trace.store import finder
from qdpo.run import disk
from qdpo.run.record import MemoryChoice
from qdpo.run.watcher import Say
from qdpo.settings.schema import RunConfig
from qdpo.train.keep.progress import Progress
from qdpo.train.policy.build import Loaded
from qdpo.train.step.step import score

# Share of the free host memory that waiting inputs and an embedding table may take.
HOST_SHARE = 0.7
CPU = torch.device("cpu")


def choose_memory(
    config: RunConfig,
    folder: Path,
    pairs: Sequence[TokenPair],
    *,
    device: torch.device,
    dtype: str,
    optimizer: str,
    say: Say,
) -> MemoryChoice:
    """A value for each [memory] setting that may be auto: as given, or as forecast for this device and these pairs.

    `folder` is the base's; layers of a model that no forecast knows are traced.

    Raises: OutOfMemoryError if the forecast says that nothing fits, before anything is loaded.
    """
    given = config.memory
    try:
        shape = _shape(config, read_json(folder / "config.json"), say)
    except ConfigError as error:
        say(f"memory: nothing is packed or kept unless settings say so. {error}")
        return MemoryChoice(
            tokens_per_row=0 if given.tokens_per_row == "auto" else given.tokens_per_row,
            kept_layers=0 if given.kept_layers == "auto" else given.kept_layers,
            offload=given.offload is True,
            embeddings="device" if given.embeddings == "auto" else given.embeddings,
        )
    if given.embeddings == "host" and shape.tied:
        raise ConfigError(
            "memory.embeddings=host cannot help this model: its head is the same table, and must be on the device. "
            "Set `memory.embeddings=auto`."
        )
    cuda = device.type == "cuda"
    run = choose.settings_of(
        config.model, config.adapter, config.memory, optimizer=optimizer, element=4 if dtype == "fp32" else 2,
        cuda=cuda, context=False,
    )  # fmt: skip
    free = available(device)
    limit = _limit(config, free)
    lengths = lengths_of(pairs, config.train.pairs_per_step)
    asked = choose.given_of(config.memory, shape)
    found = choose.choose(shape, run, lengths, asked, limit=limit, host_limit=HOST_SHARE * available(CPU))
    if found.peak > limit:
        ways = choose.ways_out(shape, run, lengths, asked, limit=limit, max_tokens=config.data.max_tokens)
        raise OutOfMemoryError(
            f"This run does not fit: it needs at least {found.peak / GIB:.1f} GiB, but only {limit / GIB:.1f} GiB "
            f"of {device} can be planned for ({_of_what(free, given.limit_gib)}). Nothing was loaded. "
            f"{choose.advice(ways)}"
        )
    row = "one pair" if found.tokens_per_row == 0 else f"{found.tokens_per_row} tokens"
    say(
        f"memory: {found.peak / GIB:.1f} GiB forecast of {free / GIB:.1f} GiB free, with rows of {row}, "
        f"{found.run.kept_layers} of {shape.layers} layers kept"
        + ", inputs of the other layers on the host" * found.run.offload
        + ", embedding table on the host" * found.run.host_embeddings
    )
    return memory_of(found)


def memory_of(chosen: Choice) -> MemoryChoice:
    """The forecast's choice as setting values."""
    return MemoryChoice(
        tokens_per_row=chosen.tokens_per_row,
        kept_layers=chosen.run.kept_layers,
        offload=chosen.run.offload,
        embeddings="host" if chosen.run.host_embeddings else "device",
    )


def _shape(config: RunConfig, model_config: Mapping[str, Any], say: Say) -> AnyShape:
    cache = disk.cache_folder(config.cache.dir)
    return shapes.from_config(model_config, str(config.model.path), trace=finder(cache, say))


def refuse_hopeless(config: RunConfig, model_config: Mapping[str, Any], device: torch.device, say: Say) -> None:
    """Refuses a run before the download if even short pairs cannot fit; an architecture without a forecast passes.

    Raises: OutOfMemoryError.
    """
    try:
        shape = _shape(config, model_config, say)
    except ConfigError:
        return
    element = 4 if config.model.dtype == "fp32" else 2
    cuda = device.type == "cuda"
    run = choose.settings_of(config.model, config.adapter, config.memory, element=element, cuda=cuda, context=False)
    needed, limit = choose.smallest_fixed_part(shape, run), _limit(config, available(device))
    if needed > limit:
        raise OutOfMemoryError(
            f"{config.model.path} does not fit: it takes at least {choose.least(shape, run)}, but only "
            f"{limit / GIB:.1f} GiB of {device} can be planned for "
            f"({_of_what(available(device), config.memory.limit_gib)}). Its weights were not downloaded. "
            f"{choose.smaller(shape, None)}"
        )


def after_failure(config: RunConfig, pairs: Sequence[TokenPair], progress: Progress) -> str:
    """Message for a step that ran out of memory at every level: the measured peak, and settings to change."""
    memory, longest = config.memory, max(pair.tokens for pair in pairs)
    changes = []
    if memory.kept_layers not in (0, "auto"):
        changes.append(f"memory.kept_layers={0 if memory.kept_layers == 'all' else int(memory.kept_layers) // 2}")
    if memory.offload is not True:
        changes.append("memory.offload=true")
    if memory.embeddings != "host":
        changes.append("memory.embeddings=host (unless the head is the same table)")
    anew = f"data.max_tokens={config.data.max_tokens * 3 // 4} --fresh"
    return (
        f"The adapter after step {progress.step} is saved. Measured peak {progress.peak_gib:.1f} GiB, longest pair "
        f"{longest} tokens. Close other programs that use the card's memory, or continue with "
        f"{' or '.join([*changes[:2], anew])}."
    )


def _limit(config: RunConfig, free: float) -> float:
    """Bytes that may be planned for."""
    given = config.memory.limit_gib
    return (free if given is None else min(free, given * GIB)) * choose.PLANNED_SHARE


def lengths_of(pairs: Sequence[TokenPair], pairs_per_step: int) -> Lengths:
    """Lengths of prepared pairs."""
    longest = max(pairs, key=lambda pair: pair.tokens)
    prompts, tokens = ([len(pair.prompt) for pair in pairs], [pair.tokens for pair in pairs])
    return Lengths(longest.tokens, len(longest.prompt), float(np.mean(tokens)), float(np.mean(prompts)), pairs_per_step)


def _of_what(free: float, limit_gib: float | None) -> str:
    if limit_gib is not None and limit_gib * GIB < free:
        return f"memory.limit_gib={limit_gib:g}, less {1 - choose.PLANNED_SHARE:.0%} to spare"
    return f"{free / GIB:.1f} GiB are free, less {1 - choose.PLANNED_SHARE:.0%} to spare"


def available(device: torch.device) -> float:
    """Free bytes of the device; on the CPU, memory available without swapping."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    import psutil

    return float(psutil.virtual_memory().available)


def settled(config: RunConfig, choice: MemoryChoice) -> RunConfig:
    """The settings with the memory values that the run was started with."""
    return config.model_copy(update={"memory": config.memory.model_copy(update=dataclasses.asdict(choice))})


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
    """Forward and backward pass of the longest possible row, with room for the optimizer; trains nothing.

    An out-of-memory error comes here or never. If `may_lower`, the kept layers are lowered by a quarter at a time until
    the row fits. Returns the number of kept layers that fits.
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
        release_memory(loaded.policy.device)
        layers = len(loaded.layers) if kept == "all" else int(kept)
        tokens = max(row.tokens for row in worst)
        if not may_lower or layers == 0:
            raise OutOfMemoryError(
                f"The longest row, {tokens} tokens, does not fit: {first_line} Nothing was trained. Lower "
                "data.max_tokens (the longest pair), memory.kept_layers or memory.head_tile_mib, set "
                "memory.offload=true, or close other programs that use the card's memory."
            )
        kept = layers - max(1, layers // 4)
        loaded.layers.keep(kept)
        say(f"memory: the longest row, {tokens} tokens, does not fit with {layers} layers kept; trying {kept}")


def worst_rows(pairs: Sequence[TokenPair], tokens_per_row: int) -> list[PairRow]:
    """The fullest row that the pairs can make, longest pairs first; the longest pair alone if rows are not packed."""
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
