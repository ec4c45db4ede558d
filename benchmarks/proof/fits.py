"""Stage 2: does it fit? Presets under the memory of their cards, forecasts against peaks, and where the edge is.

On CUDA torch's allocator is held to the card, less what a desktop and the runtime itself take; the runtime is measured
first. On a CPU nothing is held, so that edges and the runtime do not apply there.
"""

from collections.abc import Iterator, Sequence

from benchmarks.proof.items import OK, Item, Options, Result, Verdict
from benchmarks.proof.records import Records
from qdpo.settings import layered

# The project's own bounds: forecast over measured peak, less one.
LOWEST, HIGHEST = -0.03, 0.08
EDGES = "benchmarks.proof.edges"
RUNTIME = "what CUDA itself takes"
# Model, card in GiB: the longest pair that `qdpo fit` promises.
LONGEST = (
    ("7B", "Qwen/Qwen2.5-7B", 8), ("7B", "Qwen/Qwen2.5-7B", 12), ("14B", "Qwen/Qwen2.5-14B", 12),
    ("32B", "Qwen/Qwen2.5-32B", 24),
)  # fmt: skip
ROWS = 4096
ALL_KEPT = f"goal: 7B on 24 GiB, all layers kept at rows of {ROWS:,}"
KEPT_EDGE = f"edge: layers kept of 14B on 24 GiB, rows of {ROWS:,}"
STEPS = 5


def items(options: Options, records: Records) -> Iterator[Item]:
    """Lazily: what the runtime takes, once measured, goes into the jobs that follow."""
    yield Item(2, RUNTIME, "benchmarks.proof.runtime", "runtime", options.job, expected_s=30)
    found = records.now(2, RUNTIME)
    context = found.values["context_gib"] if found is not None and found.status == OK else None

    def bench(name: str, card: float | None, *words: str, steps: int = STEPS, longest: int | None = None) -> Item:
        job = {"words": list(words), "card_gib": card, "steps": steps, "longest": longest, "context_gib": context}
        return Item(2, name, "benchmarks.proof.bench_job", "bench", {**options.job, **job}, expected_s=75)

    for title, model, card in LONGEST:
        job = {"model": model, "card_gib": card, "context_gib": context}
        yield Item(2, longest_name(title, card), EDGES, "longest", {**options.job, **job}, expected_s=100)
    seven = "model.path=Qwen/Qwen2.5-7B"
    yield bench(
        ALL_KEPT, 24, seven, "memory.kept_layers=all", f"memory.tokens_per_row={ROWS}", "train.pairs_per_step=16",
        "memory.head_tile_mib=192", longest=ROWS,
    )  # fmt: skip
    for name in layered.preset_names():
        if (card_gib := layered.card_gib(name)) is not None:
            yield bench(f"preset {name}", card_gib, f"preset={name}")
    job = {"model": "Qwen/Qwen2.5-14B", "card_gib": 24, "context_gib": context, "rows": ROWS}
    yield Item(2, KEPT_EDGE, EDGES, "kept", {**options.job, **job}, expected_s=100)
    for offload in ("true", "false"):
        yield bench(
            f"7B on 12 GiB, nothing kept, offload {offload}", 12, seven, "memory.kept_layers=0",
            f"memory.offload={offload}", f"memory.tokens_per_row={ROWS}", "memory.embeddings=host", steps=3,
            longest=ROWS,
        )  # fmt: skip


def longest_name(title: str, card: float) -> str:
    return f"goal: longest pair of {title} on {card:g} GiB"


def verdicts(results: Sequence[Result], options: Options) -> list[Verdict]:
    """Every item's forecast, and every goal."""
    found = []
    by_name = {result.item: result for result in results}
    runtime = by_name.get(RUNTIME)
    if runtime is not None and runtime.status == OK:
        took, assumed = runtime.values["context_gib"], runtime.values["assumed_gib"]
        found.append(Verdict("CUDA takes what is assumed", f"{took:.2f} GiB, assumed {assumed:.2f}", took <= assumed))
    for result in results:
        if "forecast_gib" not in result.values:
            if result.item.startswith(("preset", "goal")):
                found.append(Verdict(result.item, said(result), met_or_unknown(result, options, met=False)))
            continue
        off = result.values["forecast_gib"] / result.values["peak_gib"] - 1
        text = f"forecast {off:+.1%} of the peak"
        met = LOWEST <= off <= HIGHEST
        found.append(Verdict(f"{result.item}: fits, forecast", text, met_or_unknown(result, options, met=met)))
    for result in results:
        if "edge_error" in result.values:
            text = f"planned {result.values['planned_edge']:,}, measured {result.values['measured_edge']:,}"
            # Planned for less than fits is safe; for more is not.
            met = result.values["edge_error"] <= -LOWEST
            found.append(Verdict(f"{result.item}: the edge", text, met_or_unknown(result, options, met=met)))
    return found


def met_or_unknown(result: Result, options: Options, *, met: bool) -> bool | None:
    """A verdict on a GPU's result; nothing that was tried out on a CPU or with tiny shapes meets or misses a goal."""
    return met if result.cuda and not result.tiny else None


def said(result: Result) -> str:
    return result.status + (f": {result.said[:100]}" if result.said else "")


def table(results: Sequence[Result], records: Records) -> list[str]:
    """Peak beside forecast, and speed, of each item."""
    lines = [f"{'':52}{'peak GiB':>9}{'forecast':>9}{'off':>7}{'tokens/s':>10}  rows, kept"]
    for result in results:
        values = result.values
        if "peak_gib" not in values:
            took = f"{values['context_gib']:.2f} GiB" if "context_gib" in values else said(result)
            lines.append(f"{result.item:52}  {took}")
            continue
        off = values["forecast_gib"] / values["peak_gib"] - 1
        speed = f"{values['tokens_per_s']:,.0f}" if "tokens_per_s" in values else ""
        how = f"{values['tokens_per_row']:,}, {values['kept_layers']}"
        if "measured_edge" in values:
            how = f"fits {values['measured_edge']:,}, planned {values['planned_edge']:,}"
        elif "edge" in values:
            how = f"edge {values['edge']}"
        lines.append(
            f"{result.item:52}{values['peak_gib']:9.2f}{values['forecast_gib']:9.2f}{off:7.1%}{speed:>10}  {how}"
        )
    return lines
