"""Chooses rows, kept layers and offload for a limit, and finds changes that make a run fit; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qdpo.families.shapes import AnyShape
from qdpo.forecast import memory, timing
from qdpo.forecast.memory import GIB, MemorySettings, RowSize
from qdpo.settings.schema import AdapterConfig, MemoryConfig, ModelConfig

ROWS = (8192, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512)
# On CPUs longer rows gain nothing.
CPU_ROW = 2048
# Share of the free memory that is planned for: the rest is for fragmentation.
PLANNED_SHARE = 0.96
# Speeds are compared on this card where none is named.
REFERENCE_CARD = timing.CARDS["rtx-4090"]
# The settings of `Given`, in its order.
_AUTO = ("memory.tokens_per_row", "memory.kept_layers", "memory.offload", "memory.embeddings")


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest and the mean pair; a prompt counts once."""

    longest: int
    longest_prompt: int
    mean: float
    mean_prompt: float
    pairs_per_step: int

    def row(self, budget: int) -> RowSize:
        """The fullest row of a budget: the longest pair alone if no shorter pair fits in with it."""
        if budget <= self.longest + self.mean:
            tokens = max(self.longest, min(budget, self.longest + int(self.mean)))
            return RowSize(tokens, self.longest_prompt, 1)
        pairs = max(1, round((budget - self.longest) / self.mean))
        return RowSize(budget, min(budget, self.longest_prompt + int(pairs * self.mean_prompt)), 1 + pairs)

    @property
    def step(self) -> int:
        """Tokens per step, the most that a row can hold."""
        return int(self.mean * self.pairs_per_step)


@dataclass(frozen=True)
class Given:
    """Memory settings that the user gave; None is auto."""

    rows: int | None = None
    kept: int | None = None
    offload: bool | None = None
    host_embeddings: bool | None = None


@dataclass(frozen=True)
class Choice:
    """Concrete memory settings, their forecast peak, and seconds per token on the reference card."""

    tokens_per_row: int
    run: MemorySettings
    row: RowSize
    peak: float
    seconds: float


@dataclass(frozen=True)
class Way:
    """One change, or several together, that makes a run fit; `slower` is its time relative to the unchanged run."""

    change: str
    peak: float
    slower: float | None


def choose(
    shape: AnyShape,
    run: MemorySettings,
    lengths: Lengths,
    given: Given,
    *,
    limit: float,
    host_limit: float = float("inf"),
) -> Choice:
    """The fastest settings under `limit` bytes; given settings stay. If nothing fits, the smallest, above the limit."""
    best: Choice | None = None
    smallest: Choice | None = None
    for budget in _budgets(lengths, given, run.cuda):
        for offload in _switch(given.offload, run.cuda):
            for hosted in _switch(given.host_embeddings, run.cuda and not shape.tied):
                settings = replace(run, offload=offload, host_embeddings=hosted)
                found = _keep_most(shape, settings, budget, lengths.row(budget), given.kept, limit)
                waiting = sum(memory.host_bytes(shape, found.run, found.row).values())
                if waiting > host_limit and (offload, hosted) != (bool(given.offload), bool(given.host_embeddings)):
                    continue
                if smallest is None or found.peak < smallest.peak:
                    smallest = found
                if found.peak <= limit and (best is None or found.seconds < best.seconds):
                    best = found
    assert smallest is not None
    return best or smallest


def _budgets(lengths: Lengths, given: Given, cuda: bool) -> list[int]:
    if given.rows is not None:
        return [given.rows]
    most = lengths.step if cuda else min(lengths.step, CPU_ROW)
    return sorted({max(lengths.longest, min(budget, most)) for budget in ROWS}, reverse=True)


def _switch(given: bool | None, possible: bool) -> list[bool]:
    if given is not None:
        return [given]
    return [False, True] if possible else [False]


def _keep_most(
    shape: AnyShape, run: MemorySettings, budget: int, row: RowSize, kept: int | None, limit: float
) -> Choice:
    """As many kept layers as fit, found by halving: the peak grows with them."""
    low, high = (0, shape.layers) if kept is None else (min(kept, shape.layers),) * 2
    while low < high:
        middle = (low + high + 1) // 2
        if memory.peak(shape, replace(run, kept_layers=middle), row) <= limit:
            low = middle
        else:
            high = middle - 1
    settled = replace(run, kept_layers=low)
    seconds = timing.row_seconds(shape, settled, row, REFERENCE_CARD) / row.tokens
    return Choice(budget, settled, row, memory.peak(shape, settled, row), seconds)


def ways_out(
    shape: AnyShape, run: MemorySettings, lengths: Lengths, given: Given, *, limit: float, max_tokens: int
) -> list[Way]:
    """Up to three changes that make the run fit, the fastest first; then those that cost data or adapter rank.

    Single changes are tried, then all of them together, then each with shorter pairs.
    """
    now = choose(shape, run, lengths, given, limit=limit)
    found: list[Way] = []

    def attempt(change: str, run: MemorySettings = run, lengths: Lengths = lengths, given: Given = given) -> bool:
        choice = choose(shape, run, lengths, given, limit=limit)
        if choice.peak <= limit:
            found.append(Way(change, choice.peak, choice.seconds / now.seconds))
        return choice.peak <= limit

    free = Given()
    if given.offload is False:
        attempt("memory.offload=true", given=replace(given, offload=True))
    if given.kept:
        attempt("memory.kept_layers=auto", given=replace(given, kept=None))
    if given.rows:
        attempt("memory.tokens_per_row=auto", given=replace(given, rows=None))
    if given.host_embeddings is False and not shape.tied:
        attempt("memory.embeddings=host", given=replace(given, host_embeddings=True))
    if run.tile_mib > 32:
        attempt("memory.head_tile_mib=32", run=replace(run, tile_mib=32))
    if not run.double_quant and run.quantised:
        attempt("model.double_quant=true", run=replace(run, double_quant=True))
    if not run.quantised:
        attempt("model.quantization=nf4", run=replace(run, quantised=True))
    found.sort(key=lambda way: way.slower or 0)
    words, lean = _all_changes(run, given)
    if not found and len(words) > 1:
        attempt(" ".join(words), run=lean, given=free)
    whole = choose(shape, lean, lengths, free, limit=limit).peak <= limit
    reached = 0
    for more, settings, kept in (([], run, given), (words, lean, free)):
        shorter = _longest_that_fits(shape, settings, lengths, kept, limit)
        # Extra changes must save data; they must not cut pairs that already fit whole.
        if shorter is not None and len(found) < 3 and shorter.longest > reached and not (more and whole):
            # Whatever its prompt, a pair has at most twice data.max_tokens.
            reached, tokens = shorter.longest, min(max_tokens, shorter.longest // 2)
            attempt(" ".join([f"data.max_tokens={tokens}", *more]), settings, shorter, kept)
    if run.rank > 8 and len(found) < 3:
        attempt("adapter.rank=8", run=replace(run, rank=8))
    return found[:3]


def _all_changes(run: MemorySettings, given: Given) -> tuple[list[str], MemorySettings]:
    """Changes, as words, that free memory without touching the data, and the new settings; given ones become auto."""
    words = [f"{name}=auto" for name, value in zip(_AUTO, vars(given).values(), strict=True) if value is not None]
    if not run.quantised:
        words.append("model.quantization=nf4")
    if not run.double_quant:
        words.append("model.double_quant=true")
    if run.tile_mib > 32:
        words.append("memory.head_tile_mib=32")
    return words, replace(run, quantised=True, double_quant=True, tile_mib=min(run.tile_mib, 32))


def _longest_that_fits(
    shape: AnyShape, run: MemorySettings, lengths: Lengths, given: Given, limit: float
) -> Lengths | None:
    """The same data with longer pairs cut as far as needed, in steps of an eighth; None if no pair fits at all."""
    for eighths in range(7, 0, -1):
        share = eighths / 8
        cut = replace(
            lengths, longest=int(lengths.longest * share),
            longest_prompt=min(lengths.longest_prompt, int(lengths.longest * share / 2)),
            mean=min(lengths.mean, lengths.longest * share), mean_prompt=lengths.mean_prompt * min(1.0, 2 * share),
        )  # fmt: skip
        if cut.longest >= 64 and choose(shape, run, cut, given, limit=limit).peak <= limit:
            return cut
    return None


def fixed_part(shape: AnyShape, run: MemorySettings) -> float:
    """Bytes that no row length changes: below it nothing can run."""
    return sum(memory.fixed(shape, run).values()) + sum(memory.outside(run).values())


def smallest_fixed_part(shape: AnyShape, run: MemorySettings) -> float:
    """The fixed part with every setting that reduces it: below this, `ways_out` finds nothing."""
    lean = replace(run, quantised=True, double_quant=True, rank=min(run.rank, 8), host_embeddings=run.cuda)
    return fixed_part(shape, lean)


def _experts(shape: AnyShape, run: MemorySettings) -> float:
    causes = memory.fixed(shape, run).items()
    return sum(size for cause, size in causes if cause.startswith("experts") and cause != "experts in 4 bits")


def has_experts(shape: AnyShape, run: MemorySettings) -> bool:
    """A mixture of experts that are not stored in 4 bits."""
    return _experts(shape, run) > 0


def least(shape: AnyShape, run: MemorySettings) -> str:
    """The smallest fixed part as words of a message, with what of it belongs to experts."""
    experts = _experts(shape, replace(run, quantised=True))
    of_it = f" ({experts / GIB:.1f} of it experts, which are not stored in 4 bits)" if experts else ""
    return f"{smallest_fixed_part(shape, run) / GIB:.1f} GiB before its first token{of_it}"


def smaller(shape: AnyShape, gib: float | None) -> str:
    """The next step for a model of which no setting fits."""
    what = "Choose a dense model" if has_experts(shape, MemorySettings()) else "Choose a smaller model"
    return f"{what} (`qdpo fit --gpu-gib {'N' if gib is None else f'{gib:g}'}` lists what fits)."


def advice(ways: Sequence[Way]) -> str:
    """The ways out as words for the end of a message."""
    if not ways:
        return "No setting of this model fits; choose a smaller model (`qdpo fit --gpu-gib N` lists what does)."
    parts = []
    for way in ways:
        cost = "" if way.slower is None else f", {way.slower:.2f} times the time"
        parts.append(f"{way.change} ({way.peak / GIB:.1f} GiB{cost})")
    return "What fits: " + "; ".join(parts) + "."


def given_of(memory: MemoryConfig, shape: AnyShape) -> Given:
    """The settings of [memory] that are not auto."""
    kept, place = memory.kept_layers, memory.embeddings
    return Given(
        rows=None if memory.tokens_per_row == "auto" else memory.tokens_per_row,
        kept=None if kept == "auto" else shape.layers if kept == "all" else kept,
        offload=None if memory.offload == "auto" else memory.offload,
        host_embeddings=None if place == "auto" else place == "host",
    )


def settings_of(model: ModelConfig, adapter: AdapterConfig, memory: MemoryConfig, **base: Any) -> MemorySettings:
    """The forecast's inputs from three sections of settings; `base` holds the other fields."""
    return MemorySettings(
        rank=adapter.rank, quantised=model.quantization != "none", double_quant=model.double_quant,
        tile_mib=memory.head_tile_mib, **base,
    )  # fmt: skip
