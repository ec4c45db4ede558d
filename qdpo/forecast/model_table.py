"""The models that a card can train: the table of `qdpo fit`; no torch."""

from dataclasses import dataclass

from qdpo.errors import ConfigError
from qdpo.families.shapes import AnyShape, FindTrace, known_shape
from qdpo.families.traced import TracedShape
from qdpo.forecast import choose, memory, timing
from qdpo.forecast.choose import Given, Lengths
from qdpo.forecast.memory import GIB, MemorySettings

# One or two models of each size that people use, 1B to 32B.
MODELS = (
    "google/gemma-3-1b-it", "Qwen/Qwen3.5-2B", "meta-llama/Llama-3.2-3B", "HuggingFaceTB/SmolLM3-3B",
    "google/gemma-3-4b-it", "Qwen/Qwen3.5-4B", "google/gemma-4-E4B-it", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B",
    "mistralai/Ministral-3-8B-Instruct-2512", "Qwen/Qwen3.5-9B", "google/gemma-3-12b-it",
    "mistralai/Mistral-Nemo-Instruct-2407", "mistralai/Ministral-3-14B-Instruct-2512", "Qwen/Qwen3-14B",
    "openai/gpt-oss-20b", "mistralai/Mistral-Small-3.2-24B-Instruct-2506", "google/gemma-3-27b-it",
    "Qwen/Qwen3.5-27B", "Qwen/Qwen3-30B-A3B-Instruct-2507", "Qwen/Qwen3-32B",
)  # fmt: skip
MOST_TOKENS = 131_072
PAIRS_PER_STEP = 16


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A model on a card: the longest pair that fits at all, and the fastest settings for pairs of a given length."""

    model: str
    longest_pair: int
    """Tokens of prompt and both answers, at most the model's positions; 0: nothing fits."""
    tokens_per_row: int | None
    kept_layers: int | None
    layers: int
    offload: bool
    host_embeddings: bool
    peak_gib: float | None
    pairs_per_hour: float | None
    """An estimate: reference pass included."""


def fit_table(
    limit: float, *, card: str, longest: int, mean: float, rank: int = 16, trace: FindTrace | None = None
) -> list[Fit]:
    """A line for each of MODELS that has a forecast, under `limit` bytes; `longest` and `mean` are tokens of pairs."""
    shapes = {name: shape for name in MODELS if (shape := _shape(name, trace)) is not None}
    return [_fit(name, shape, limit, card, longest, mean, rank) for name, shape in shapes.items()]


def without_forecast(trace: FindTrace | None = None) -> list[str]:
    """Those of MODELS that have no forecast yet, and so no line."""
    return [name for name in MODELS if _shape(name, trace) is None]


def with_kernels(trace: FindTrace | None = None) -> list[str]:
    """Those of MODELS whose estimate of time counts on packages of GPU kernels: hybrids."""
    shapes = ((name, _shape(name, trace)) for name in MODELS)
    return [name for name, shape in shapes if isinstance(shape, TracedShape) and shape.states]


def _shape(name: str, trace: FindTrace | None) -> AnyShape | None:
    try:
        return known_shape(name, trace=trace)
    except ConfigError:
        return None


def _fit(name: str, shape: AnyShape, limit: float, card: str, longest: int, mean: float, rank: int) -> Fit:
    run = MemorySettings(rank=rank, tile_mib=64)
    most = longest_pair(shape, run, limit)
    lengths = Lengths(longest, longest * 2 // 5, mean, mean * 2 / 5, PAIRS_PER_STEP)
    found = choose.choose(shape, run, lengths, Given(), limit=limit)
    if found.peak > limit:
        return Fit(
            model=name,
            longest_pair=most,
            tokens_per_row=None,
            kept_layers=None,
            layers=shape.layers,
            offload=False,
            host_embeddings=False,
            peak_gib=None,
            pairs_per_hour=None,
        )
    budget = min(found.tokens_per_row, lengths.step)
    row = memory.RowSize(budget, budget * 2 // 5, max(1, round(budget / mean)))
    seconds = sum(
        timing.row_seconds(shape, found.run, row, timing.CARDS[card], scoring=scoring) for scoring in (False, True)
    )
    return Fit(
        model=name,
        longest_pair=most,
        tokens_per_row=found.tokens_per_row,
        kept_layers=found.run.kept_layers,
        layers=shape.layers,
        offload=found.run.offload,
        host_embeddings=found.run.host_embeddings,
        peak_gib=found.peak / GIB,
        pairs_per_hour=3600 * budget / mean / seconds,
    )


def longest_pair(shape: AnyShape, run: MemorySettings, limit: float) -> int:
    """Tokens of the longest pair that fits with no kept layers and maximum offload, in steps of 64.

    It is not longer than the model's positions: beyond them no pair is trained.
    """

    def fits(tokens: int) -> bool:
        lengths = Lengths(tokens, tokens * 2 // 5, tokens, tokens * 2 / 5, 1)
        return choose.choose(shape, run, lengths, Given(kept=0), limit=limit).peak <= limit

    low, high = 0, min(MOST_TOKENS, shape.positions or MOST_TOKENS) // 64
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(64 * middle) else (low, middle - 1)
    return 64 * low


def table_lines(fits: list[Fit]) -> list[str]:
    """The table as text."""
    rows = [("model", "longest pair", "rows", "layers kept", "on the host", "peak", "pairs/hour*")]
    for fit in fits:
        moved = " + ".join(["inputs"] * fit.offload + ["embeddings"] * fit.host_embeddings) or "-"
        if fit.peak_gib is None:
            longest = f"{fit.longest_pair:,}" if fit.longest_pair else "does not fit"
            rows.append((fit.model, longest, "-", "-", "-", "-", "-"))
            continue
        rows.append(
            (
                fit.model,
                f"{fit.longest_pair:,}",
                f"{fit.tokens_per_row:,}",
                f"{fit.kept_layers} of {fit.layers}",
                moved,
                f"{fit.peak_gib:.1f} GiB",
                f"{fit.pairs_per_hour:,.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
