"""The first setting that does not fit, found on the device under a card's memory, beside the one that is planned."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.proof import settings
from benchmarks.proof.items import Failed
from qdpo.data.tokens.sieve import TokenPair
from qdpo.errors import OutOfMemoryError
from qdpo.families import shapes
from qdpo.families.shapes import AnyShape
from qdpo.forecast import choose, memory, model_table, plan
from qdpo.forecast.choose import Given, Lengths
from qdpo.forecast.memory import GIB, MemorySettings, RowSize
from qdpo.measure import random_base, steps
from qdpo.model import device
from qdpo.model.device import DTYPES, choose_device, choose_dtype
from qdpo.settings.layered import Resolved
from qdpo.train.policy.build import Loaded, make_policy, probe_pairs
from qdpo.train.start import auto_memory as trying

# Bisecting stops once fitting and unfitting are this close, and when this long has passed.
CLOSE, ENOUGH_S = 0.02, 110.0


def longest(job: dict[str, Any]) -> dict[str, Any]:
    """The longest pair that `qdpo fit` promises, tried; then the longest that fits."""
    words = ("memory.kept_layers=0", "memory.offload=true", "memory.embeddings=host", "memory.head_tile_mib=64")
    stand = Stand(job, *words)
    # As `qdpo fit` says it, with its share to spare; and without any, for what this process may use.
    limit, _card = plan.usable(job["card_gib"], None, None)
    promised = model_table.longest_pair(stand.shape, MemorySettings(rank=16, tile_mib=64), limit)
    edge = model_table.longest_pair(stand.shape, stand.run, stand.allowed)
    if job["tiny"]:
        promised = edge = 4 * settings.TINY_TOKENS
    if not stand.try_pair(promised):
        raise Failed(f"a pair of {promised:,} tokens does not fit", {"promised": promised})
    row = RowSize(promised, promised * 2 // 5)
    found = {"promised": promised, "tokens_per_row": promised, "kept_layers": 0, **stand.peaks(row)}
    if stand.device.type != "cuda":
        return {**found, "edge": "not applicable: nothing holds a CPU's memory"}
    measured, unfit = bisect(stand.try_pair, promised, int(edge * 1.05), 64)
    return {**found, "planned_edge": edge, "measured_edge": measured, "unfit": unfit, "edge_error": edge / measured - 1}


def kept(job: dict[str, Any]) -> dict[str, Any]:
    """The most kept layers that fit, at rows of this length, beside the forecast's."""
    rows = 2 * settings.TINY_TOKENS if job["tiny"] else job["rows"]
    words = ("memory.kept_layers=0", "memory.offload=false", "memory.embeddings=device", "memory.head_tile_mib=192")
    stand = Stand(job, *words)
    lengths, given = Lengths(rows, rows * 2 // 5, rows, rows * 2 / 5, 1), Given(rows, None, False, False)
    planned = choose.choose(stand.shape, stand.run, lengths, given, limit=stand.allowed).run.kept_layers
    pair = [stand.pair(rows)]
    if not stand.fits(pair, planned):
        raise Failed(f"{planned} kept layers do not fit", {"planned_edge": planned, "measured_edge": None})
    stand.run = replace(stand.run, kept_layers=planned)
    found = {"tokens_per_row": rows, "kept_layers": planned, **stand.peaks(RowSize(rows, rows * 2 // 5))}
    if stand.device.type != "cuda":
        return {**found, "edge": "not applicable: nothing holds a CPU's memory"}
    measured, unfit = planned, planned + 1
    while measured < stand.shape.layers and stand.fits(pair, unfit):
        measured, unfit = unfit, unfit + 1
    # In layers, one more or less is as near as it can be told.
    error = max(0, planned - measured) / stand.shape.layers
    return {**found, "planned_edge": planned, "measured_edge": measured, "unfit": unfit, "edge_error": error}


def bisect(fits: Callable[[int], bool], low: int, high: int, step: int) -> tuple[int, int]:
    """The largest number found that fits, from `low` on, which does, and the smallest found that does not."""
    begun = time.monotonic()
    unfit = max(high, low + step)
    while fits(unfit) and time.monotonic() - begun < ENOUGH_S:
        low, unfit = unfit, int(unfit * 1.1)
    while unfit - low > max(step, CLOSE * low) and time.monotonic() - begun < ENOUGH_S:
        middle = (low + unfit) // 2
        low, unfit = (middle, unfit) if fits(middle) else (low, middle)
    return low, unfit


class Stand:
    """A policy on random weights, under a card's memory, on which rows are tried one after the other."""

    def __init__(self, job: dict[str, Any], *words: str) -> None:
        resolved: Resolved = settings.resolve(
            job, f"model.path={job['model']}", "adapter.rank=16", "train.pairs_per_step=1",
            "memory.tokens_per_row=64", *words,
        )  # fmt: skip
        config = resolved.config
        self.device = choose_device(config.model.device, print)
        settings.check_card(job)
        dtype = choose_dtype(config.model.dtype, self.device, print)
        architecture = random_base.config_for(str(config.model.path), None)
        self.shape: AnyShape = shapes.from_config(architecture.to_dict(), str(config.model.path))
        _free, self.allowed = steps.limit_to_card(self.device, job["card_gib"], None, job["context_gib"])
        cuda = self.device.type == "cuda"
        self.run = choose.settings_of(
            config.model, config.adapter, config.memory, optimizer="paged_adamw8bit" if cuda else "adamw8bit",
            element=DTYPES[dtype].itemsize, cuda=cuda, context=not cuda,
            offload=config.memory.offload is True and cuda, host_embeddings=config.memory.embeddings == "host",
        )  # fmt: skip
        torch.manual_seed(0)
        model = random_base.random_base(
            architecture, quantization=config.model.quantization, double_quant=config.model.double_quant,
            dtype=DTYPES[dtype], device=self.device,
        )  # fmt: skip
        few = [self.pair(128) for _ in range(2)]
        self.loaded: Loaded = make_policy(
            config, model, device=self.device, dtype=dtype, probe_with=probe_pairs(few), say=print
        )
        self._states = memory.STATE_BYTES[self.run.optimizer] * memory.adapter_numbers(self.shape, self.run.rank)

    def pair(self, tokens: int) -> TokenPair:
        prompt = tokens * 2 // 5
        chosen = (tokens - prompt) // 2
        parts = (prompt, chosen, tokens - prompt - chosen)
        return steps.random_pair(*parts, 1, np.random.default_rng(tokens), self.shape.vocabulary)

    def try_pair(self, tokens: int) -> bool:
        return self.fits([self.pair(tokens)], 0)

    def fits(self, pairs: list[TokenPair], kept_layers: int) -> bool:
        """Whether forward, backward and the optimizer's states of this row fit."""
        self.loaded.layers.keep(kept_layers)  # lets go of what a failed try left on the host
        device.release_memory(self.device)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        begun = time.monotonic()
        try:
            trying.try_worst_row(
                self.loaded, pairs, tokens_per_row=pairs[0].tokens, kept_layers=kept_layers, may_lower=False,
                optimizer_bytes=self._states, say=print,
            )  # fmt: skip
            fitted = True
        except OutOfMemoryError:
            fitted = False
        print(f"{pairs[0].tokens} tokens, {kept_layers} kept: {fitted}, {time.monotonic() - begun:.1f} s")
        return fitted

    def peaks(self, row: RowSize) -> dict[str, float]:
        """The last try's peak, and the forecast of its row; on CUDA of torch's allocator."""
        forecast = memory.peak(self.shape, self.run, row)
        return {"peak_gib": device.peak_gib(self.device), "forecast_gib": forecast / GIB}
