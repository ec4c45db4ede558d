"""Output of `qdpo data check` and `qdpo data show`: tables of a data set, and pairs as the model will read them."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qdpo.data.layouts.pair import Pair, Rejection
from qdpo.data.report import SIDES, DataReport
from qdpo.data.tokens.store import TokenPair

BARS = " ▁▂▃▄▅▆▇█"
STYLES = {"prompt": "dim", "chosen": "black on green", "rejected": "black on red"}
SHOWN_TOKENS = 220


def print_report(report: DataReport, console: Console) -> None:
    """Print the report without its verdict."""
    for source in report.sources:
        licence = f" (licence: {source.license})" if source.license else ""
        console.print(f"data: {source.name}{licence}", markup=False)
        console.print(f"layout: {source.layout}: {source.why}", markup=False)
    made = "" if report.outcomes == report.seen else f" that make {report.outcomes:,} pairs"
    console.print(f"rows: {report.seen:,}{made}")
    console.print(_counts(report))
    if report.usable:
        console.print(_lengths(report))
        console.print(_what_if(report))
        console.print(
            f"longest pair: {report.longest['tokens']:,} tokens (row {report.longest['row']}) · chosen is longer in "
            f"{report.chosen_longer:.0%} of pairs · correlation of length with being chosen: "
            f"{report.length_correlation:+.2f}"
        )
    if report.on_policy is not None:
        written = ", ".join(f"{name} {count:,}" for name, count in report.origins.items())
        console.print(f"on-policy: {report.on_policy:.0%} of the answers · written by: {written}", markup=False)
    if report.overlap is not None:
        console.print(f"held-out prompts that are also trained on: {report.overlap:,}")


def print_verdict(report: DataReport, console: Console) -> None:
    """Print warnings, most harmful first, and whether the data are fit to train on."""
    console.print()
    for number, warning in enumerate(report.warnings, 1):
        console.print(f"warning {number}: {warning}", style="yellow", markup=False)
    found = f", with {len(report.warnings)} warning{'s' * (len(report.warnings) > 1)}" if report.warnings else ""
    if report.fit:
        console.print(f"verdict: fit to train{found}", style="bold green")
    else:
        console.print("verdict: not fit to train as it is", style="bold red")


def print_token_pair(pair: TokenPair, tokenizer: Any, console: Console) -> None:
    """Print a pair as the model reads it, with BOS and EOS; trained spans are coloured, or in ‹…› without colour."""
    console.print(f"\nrow {pair.row}: {len(pair.prompt):,} + {len(pair.chosen):,} / {len(pair.rejected):,} tokens")
    for side in SIDES:
        ids = getattr(pair, side)
        shown = ids if len(ids) <= SHOWN_TOKENS else ids[:SHOWN_TOKENS]
        text = str(tokenizer.decode(shown)) + ("" if len(shown) == len(ids) else f" … ({len(ids) - len(shown):,} more)")
        if side == "prompt":
            console.print(Text(text, style=STYLES[side]))
        elif console.color_system:
            console.print(Text.assemble((f"{side}: ", "bold"), (text, STYLES[side])))
        else:
            console.print(Text(f"{side}: ‹{text}›"))


def print_row(number: int, found: Sequence[Pair | Rejection], console: Console) -> None:
    """Print the pairs of a row as text, before any template."""
    for pair in found:
        if isinstance(pair, Rejection):
            console.print(f"row {number} is not used ({pair.reason}): {pair.detail}", style="red", markup=False)
            continue
        console.print(f"row {number}", style="bold")
        for turn in pair.prompt:
            role = turn["role"] if pair.is_chat else "prompt"
            console.print(Text.assemble((f"{role}:", "bold"), f" {turn['content']}"))
        for side, turn in zip(("chosen", "rejected"), pair.answers(), strict=True):
            calls = f" {turn['tool_calls']}" if "tool_calls" in turn else ""
            style = "green" if side == "chosen" else "red"
            console.print(Text.assemble((f"{side}:", f"bold {style}"), f" {turn['content']}{calls}"))
        for _reason, detail in pair.mended:
            console.print(f"mended: {detail}", markup=False)


def histogram(counts: Sequence[int]) -> str:
    """One character a bin; non-empty bins are never blank."""
    top = max(counts) or 1
    return "".join(BARS[0 if not count else max(1, round(count / top * (len(BARS) - 1)))] for count in counts)


def _counts(report: DataReport) -> Table:
    table = Table("pairs", "count", "share", box=None, padding=(0, 2, 0, 0))
    rows = [("usable", report.usable), ("  of these cut at the end of an answer", report.cut)]
    rows += [(f"  of these mended: {reason}", count) for reason, count in report.mended.items()]
    rows += [(f"dropped: {reason}", count) for reason, count in report.dropped.items()]
    for name, count in rows:
        table.add_row(name, f"{count:,}", f"{count / max(1, report.outcomes):.1%}")
    table.columns[1].justify = table.columns[2].justify = "right"
    return table


def _lengths(report: DataReport) -> Table:
    table = Table("tokens", "median", "mean", "95 %", "longest", "1 … longest", box=None, padding=(0, 2, 0, 0))
    for side, found in report.lengths.items():
        numbers = [f"{number:,.0f}" for number in (found.median, found.mean, found.p95, found.longest)]
        table.add_row(side, *numbers, histogram(found.histogram))
    for column in table.columns[1:5]:
        column.justify = "right"
    return table


def _what_if(report: DataReport) -> Table:
    table = Table("data.max_tokens", "whole", "cut", "dropped", box=None, padding=(0, 2, 0, 0))
    for row in report.what_if:
        table.add_row(*(f"{row[key]:,}" for key in ("max_tokens", "whole", "cut", "dropped")))
    for column in table.columns:
        column.justify = "right"
    return table
