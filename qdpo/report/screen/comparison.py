"""Output of `qdpo compare`: both answers to each prompt side by side, and a summary."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qdpo.train.watch.prompts import question

if TYPE_CHECKING:
    from qdpo.review.compare import Compared, Comparison, MeasuredAnswer

LABELS = {
    "tokens": "tokens",
    "repeated": "repeated 4-grams",
    "base_logp": "log-prob a token, base",
    "tuned_logp": "log-prob a token, tuned",
}
NOTES = (
    "tokens: including the end token. repeated 4-grams: 1 − distinct / all runs of four tokens of an answer. log-prob: "
    "mean a token in nats, under either model. KL: KL(tuned ‖ base) of the full next-token distributions along the "
    "tuned answer, in nats."
)
GREEDY = (
    "The answers are greedy, so this KL is that of the path shown. With --temperature 1, its sum estimates the KL of "
    "whole answers without bias."
)


def print_comparison(found: "Comparison", console: Console) -> None:
    """Print every prompt with both answers, then means and medians."""
    for number, one in enumerate(found.prompts, 1):
        _side_by_side(number, one, console)
    summary, drawing = found.summary(), found.drawing
    how = "greedy" if drawing.temperature == 0 else f"temperature {drawing.temperature:g}, seed {drawing.seed}"
    console.print(
        f"{found.run}, base against tuned: {len(found.prompts)} prompts of {found.source}, {how}, at most "
        f"{drawing.max_new_tokens} new tokens",
        markup=False,
    )
    table = Table("mean (median)", "base's answers", "tuned answers")
    for name, label in LABELS.items():
        cells = (side.measures[name] for side in (summary.base, summary.tuned))
        table.add_row(label, *(f"{cell.mean:.3f} ({cell.median:.3f})" for cell in cells))
    table.add_row("cut at the limit", *(f"{side.cut:.0%}" for side in (summary.base, summary.tuned)))
    for label, middle in (("KL a token", summary.kl_per_token), ("KL an answer", summary.kl)):
        table.add_row(label, "", f"{middle.mean:.4f} ({middle.median:.4f})")
    table.add_row("answers that changed", "", f"{summary.changed:.0%}")
    console.print(table)
    console.print(NOTES if drawing.temperature else f"{NOTES} {GREEDY}", markup=False)


def _side_by_side(number: int, one: "Compared", console: Console) -> None:
    width = min(max(console.width, 60), 160)
    half = (width - 7) // 2
    title = Text(f"{number}. {question(one.prompt)}")
    table = Table(width=width, title=title, title_justify="left", title_style="bold")
    table.add_column("base", width=half)
    table.add_column("tuned" if one.changed else "tuned (the same)", width=half)
    # Text, not str: rich would take parts of an answer for its markup.
    table.add_row(Text(one.base.text), Text(one.tuned.text))
    table.add_section()
    kl = f"KL {one.kl_per_token:.4f} a token, {one.kl:.3f} in all"
    table.add_row(Text(_figures(one.base), style="dim"), Text(f"{_figures(one.tuned)}\n{kl}", style="dim"))
    console.print(table)


def _figures(answer: "MeasuredAnswer") -> str:
    cut = "" if answer.ended else " (cut)"
    return (
        f"{answer.tokens} tokens{cut}, {answer.repeated:.0%} repeated\n"
        f"log-prob a token: base {answer.base_logp:.3f}, tuned {answer.tuned_logp:.3f}"
    )
