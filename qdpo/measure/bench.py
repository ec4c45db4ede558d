"""Benchmarks the real step on random weights of a model's shape, under a memory cap: speed, peak, utilisation.

Nothing is downloaded. The base is built in 4 bits on the device, layer by layer.
"""

import datetime
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qdpo import __version__
from qdpo.data.tokens.sieve import TokenPair
from qdpo.errors import ConfigError, OutOfMemoryError
from qdpo.families import shapes
from qdpo.families.shapes import AnyShape
from qdpo.forecast import choose, memory
from qdpo.forecast.choose import Choice, Lengths
from qdpo.forecast.memory import GIB, MemorySettings
from qdpo.measure import random_base, steps
from qdpo.model.device import DTYPES, choose_device, choose_dtype, peak_gib, release_memory
from qdpo.model.trace.store import finder
from qdpo.run.disk import cache_folder
from qdpo.run.watcher import Say
from qdpo.settings.layered import Resolved
from qdpo.train.policy.build import Loaded, make_policy, probe_pairs
from qdpo.train.start import auto_memory
from qdpo.train.step import optimizer

WARM_UP = 1


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One benchmark result: speeds over useful tokens (without recompute and padding), peaks in GiB."""

    device: str
    limit_gib: float | None
    tokens_per_row: int
    kept_layers: int
    offload: bool
    embeddings: str
    longest_pair: int
    tokens_per_s: float
    pairs_per_s: float
    peak_gib: float
    forecast_gib: float
    reserved_gib: float | None
    matrix_tflops: float
    utilisation: float
    """Useful FLOPs of the timed steps relative to the matrix rate measured in the same run."""
    build_s: float
    step_s: list[float]


def run_bench(
    resolved: Resolved, *, limit_gib: float | None, others_gib: float | None, number: int, longest: int | None,
    say: Say, context_gib: float | None = None,
) -> Measured:  # fmt: skip
    """Builds the model, tries its longest row, and times `number` steps after one warm-up step.

    `limit_gib` is a card's memory, of which `others_gib` and the CUDA context (default: what the forecast assumes) are
    taken off. Pairs are random ids, the first one `longest` tokens long (default: what data.max_tokens allows), on
    average a quarter of that.
    Raises: OutOfMemoryError if the forecast says it cannot fit, or the device says so.
    """
    config = resolved.config
    device = choose_device(config.model.device, say)
    dtype = choose_dtype(config.model.dtype, device, say)
    settings = random_base.config_for(str(config.model.path), config.model.revision)
    trace = finder(cache_folder(config.cache.dir), say)
    shape = shapes.from_config(settings.to_dict(), str(config.model.path), trace=trace)
    free, allowed = steps.limit_to_card(device, limit_gib, others_gib, context_gib)
    optimizer_name = optimizer.choose_optimizer(config.train.optimizer, device, say)
    run = choose.settings_of(
        config.model, config.adapter, config.memory, optimizer=optimizer_name,
        element=DTYPES[dtype].itemsize, cuda=device.type == "cuda", context=False,
    )  # fmt: skip
    lengths = _lengths(longest or 2 * config.data.max_tokens, config.train.pairs_per_step)
    chosen = choose.choose(
        shape, run, lengths, choose.given_of(config.memory, shape), limit=allowed * choose.PLANNED_SHARE,
        host_limit=auto_memory.HOST_SHARE * auto_memory.available(auto_memory.CPU),
    )  # fmt: skip
    if chosen.peak > allowed:
        raise OutOfMemoryError(
            f"The forecast, {chosen.peak / GIB:.2f} GiB, is above the {allowed / GIB:.2f} GiB that this benchmark may "
            "use. Nothing was built. `qdpo plan` says what would fit."
        )
    say(f"memory: {chosen.peak / GIB:.2f} GiB forecast, {allowed / GIB:.2f} of {free / GIB:.1f} GiB free may be used")
    rate = steps.matrix_rate(device, DTYPES[dtype])
    release_memory(device)  # memory left by that product is not part of any forecast
    begun = time.monotonic()
    loaded, pairs = _build(resolved, settings, shape, chosen, lengths, number, device, dtype, say)
    build_s = time.monotonic() - begun
    _first, *timed = steps.timed_steps(
        config, loaded, pairs, tokens_per_row=chosen.tokens_per_row, optimizer_name=optimizer_name
    )
    seconds = [step.seconds for step in timed]
    tokens, spent = sum(step.tokens for step in timed), sum(seconds)
    useful = steps.useful_flops(shape, tokens, sum(step.responses for step in timed))
    return Measured(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        limit_gib=limit_gib,
        tokens_per_row=chosen.tokens_per_row,
        kept_layers=chosen.run.kept_layers,
        offload=chosen.run.offload,
        embeddings="host" if chosen.run.host_embeddings else "device",
        longest_pair=lengths.longest,
        tokens_per_s=tokens / spent,
        pairs_per_s=number * config.train.pairs_per_step / spent,
        peak_gib=peak_gib(device),
        forecast_gib=_forecast(shape, chosen, pairs, device),
        reserved_gib=torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else None,
        matrix_tflops=rate / 1e12,
        utilisation=useful / spent / rate,
        build_s=build_s,
        step_s=seconds,
    )


def _lengths(longest: int, pairs_per_step: int) -> Lengths:
    return Lengths(longest, longest * 2 // 5, longest / 4, longest / 10, pairs_per_step)


def _pairs(lengths: Lengths, number: int, vocabulary: int) -> list[TokenPair]:
    """Random pairs: the longest first, the others from a half to one and a half times the mean."""
    generator = np.random.default_rng(0)
    sizes = [lengths.longest, *generator.uniform(0.5, 1.5, number - 1) * lengths.mean]
    pairs = []
    for row, size in enumerate(sizes, 1):
        prompt = max(1, int(size * 0.4))
        answer = max(1, (int(size) - prompt) // 2)
        pairs.append(steps.random_pair(prompt, answer, answer, row, generator, vocabulary))
    return pairs


def _build(
    resolved: Resolved,
    settings: Any,
    shape: AnyShape,
    chosen: Choice,
    lengths: Lengths,
    number: int,
    device: torch.device,
    dtype: str,
    say: Say,
) -> tuple[Loaded, list[TokenPair]]:
    """The policy with random weights and its pairs, after the longest row was tried."""
    config = resolved.config
    config = auto_memory.settled(config, auto_memory.memory_of(chosen))
    torch.manual_seed(0)
    model = random_base.random_base(
        settings,
        quantization=config.model.quantization,
        double_quant=config.model.double_quant,
        dtype=DTYPES[dtype],
        device=device,
    )
    pairs = _pairs(lengths, (number + WARM_UP) * config.train.pairs_per_step, shape.vocabulary)
    loaded = make_policy(config, model, device=device, dtype=dtype, probe_with=probe_pairs(pairs), say=say)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    states = memory.STATE_BYTES[chosen.run.optimizer] * memory.adapter_numbers(shape, chosen.run.rank)
    auto_memory.try_worst_row(
        loaded, pairs, tokens_per_row=chosen.tokens_per_row, kept_layers=chosen.run.kept_layers, may_lower=False,
        optimizer_bytes=states, say=say,
    )  # fmt: skip
    return loaded, pairs


def _forecast(shape: AnyShape, chosen: Choice, pairs: list[TokenPair], device: torch.device) -> float:
    """GiB forecast for the fullest row of these pairs; on CUDA in torch's allocator, which holds workspaces too."""
    rows = auto_memory.worst_rows(pairs, chosen.tokens_per_row)
    run: MemorySettings = chosen.run if device.type == "cuda" else replace(chosen.run, context=True)
    sizes = [
        memory.RowSize(row.tokens, sum(len(pair.prompt) for pair in row.pairs), len(row.pairs)) for row in rows
    ]  # fmt: skip
    return max(memory.peak(shape, run, row) for row in sizes) / GIB


def write_measured(
    preset: str, measured: Measured, folder: Path, *, commit: str | None = None, date: str | None = None
) -> Path:
    """Puts the figures into the preset's [measured] table; `commit` and `date`, if they were not measured just now.

    Raises: ConfigError if its file cannot be written.
    """
    path = folder / f"{preset}.toml"
    head = path.read_text(encoding="utf-8").partition("[measured]")[0]
    values = {
        "gpu": measured.device, "limit_gib": measured.limit_gib, "peak_gib": round(measured.peak_gib, 2),
        "forecast_gib": round(measured.forecast_gib, 2), "longest_pair": measured.longest_pair,
        "tokens_per_row": measured.tokens_per_row, "kept_layers": measured.kept_layers, "offload": measured.offload,
        "embeddings": measured.embeddings, "tokens_per_s": round(measured.tokens_per_s, 1),
        "pairs_per_s": round(measured.pairs_per_s, 3), "utilisation": round(measured.utilisation, 3),
        "commit": commit or _commit(), "date": date or datetime.datetime.now(datetime.UTC).date().isoformat(),
    }  # fmt: skip
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
    text = head + "[measured]  # written by `qdpo bench --write` or scripts/gpu_proof\n" + "\n".join(lines) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"The preset's file {path} cannot be written: {error}. Use `--write` in a clone only."
        ) from error
    return path


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _commit() -> str:
    """The clone's commit, else the installed version."""
    here = Path(__file__).resolve().parents[2]
    try:
        found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
    except OSError:
        return f"qdpo {__version__}"
    return found.stdout.strip() if found.returncode == 0 else f"qdpo {__version__}"


def print_measured(measured: Measured, say: Say) -> None:
    """The figures as text."""
    cap = "" if measured.limit_gib is None else f", capped for a card of {measured.limit_gib:g} GiB"
    say(f"device       {measured.device}{cap}")
    say(
        f"rows         {measured.tokens_per_row:,} tokens, {measured.kept_layers} layers kept, offload "
        f"{str(measured.offload).lower()}, embedding table on the {measured.embeddings}; longest pair "
        f"{measured.longest_pair:,} tokens"
    )
    off = measured.forecast_gib / measured.peak_gib - 1
    say(f"peak         {measured.peak_gib:.2f} GiB measured, {measured.forecast_gib:.2f} forecast ({off:+.1%})")
    say(f"speed        {measured.tokens_per_s:,.0f} tokens/s, {measured.pairs_per_s:.3g} pairs/s")
    say(f"utilisation  {measured.utilisation:.1%} of {measured.matrix_tflops:.3g} TFLOP/s measured in this run")
