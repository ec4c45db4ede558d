"""Output of a running command: a live display on a terminal, plain lines elsewhere, and the result at the end."""

import json
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from qdpo.diagnose.course import Record
from qdpo.report.accuracy import accuracy_text
from qdpo.report.screen.console import Screen
from qdpo.report.screen.spark import sparkline
from qdpo.run.folder import RunDir
from qdpo.run.lines import is_sampled, read_lines
from qdpo.run.record import Result
from qdpo.run.watcher import PAIRS
from qdpo.train.watch.prompts import question

if TYPE_CHECKING:
    from qdpo.review.score import Rescored

# Metrics shown with their trend: metric → label and format.
TRENDS = {
    "loss": ("loss", "{:.4f}"),
    "rewards/accuracies": ("accuracy", "{:.2f}"),
    "rewards/margins": ("margin", "{:+.3f}"),
    "logps/chosen_per_token": ("chosen/token", "{:.3f}"),
}
ACCURACY = "rewards/accuracies"
# Seconds between lines of a stage's progress when the output is not a terminal.
PLAIN_EVERY_S = 20.0


class Terminal:
    """A Watcher that draws a bar with the newest metrics, or prints one line a step if there is no terminal."""

    def __init__(self, *, stderr: bool = False):
        self.console = Screen(stderr=stderr)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._live: Live | None = None
        self._newest = Text("")
        self._what, self._unit, self._total, self._done = "", "", 0, 0
        self._begun = self._told = 0.0
        self._trends: dict[str, list[float]] = {name: [] for name in TRENDS}
        self._counted: dict[str, str] = {}

    def say(self, line: str) -> None:
        self.console.print(line, markup=False)

    def begin(self, what: str, total: int, unit: str) -> None:
        self.finish()
        self._what, self._unit, self._total, self._done = what, unit, total, 0
        self._begun = self._told = time.monotonic()
        if self.console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            )  # fmt: skip
            self._task = self._bar.add_task(what, total=total)
            self._newest = Text("")
            # The metrics have their own line: next to the bar they would push the time left off a narrow terminal.
            self._live = Live(Group(self._bar, self._newest), console=self.console, transient=True)
            self._live.start()
        elif unit != "step":
            self.say(f"{what} …")

    def advance(self, units: int) -> None:
        self._done += units
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, units)
        elif self._unit != "step" and time.monotonic() - self._told > PLAIN_EVERY_S:
            self._told = time.monotonic()
            self.say(f"{self._what}: {self._done} of {self._total} {self._unit}s, {self._left()} left")

    def finish(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live = self._bar = self._task = None

    def step(self, record: Record) -> None:
        if "loss" in record:
            learned = (
                f"loss {record['loss']:.4f} · accuracy {record[ACCURACY]:.2f}{_of(record)} · "
                f"margin {record['rewards/margins']:+.3f}"
            )
            speed = (
                f"{record['tokens_per_s']:,.0f} tokens/s · {record['pairs_per_s']:.2f} pairs/s · "
                f"{record['peak_gib']:.2f} GiB"
            )
            self._counted = {ACCURACY: f" n={record[PAIRS]:,.0f}"} if PAIRS in record else {}
            for name, values in self._trends.items():
                values.append(record.get(name, 0.0))
            if self._live is not None:
                self._newest.plain = "\n".join([*self._trend_lines(), f"  {speed}"])
            else:
                self.say(f"step {record['step']}/{self._total}: {learned} · {speed} · {self._left()} left")
        else:
            self.say(
                f"held out after step {record['step']}: loss {record['eval_loss']:.4f} · accuracy "
                f"{record[f'eval_{ACCURACY}']:.3f}{_of(record)} · margin {record['eval_rewards/margins']:+.4f}"
            )
            if self._live is None and len(self._trends["loss"]) > 1:
                self.say("\n".join(self._trend_lines()))

    def _trend_lines(self) -> list[str]:
        """Newest value and trend of the main metrics, two a line."""
        cells = [
            f"  {label + self._counted.get(name, ''):<12} {form.format(self._trends[name][-1]):>8}  "
            f"{sparkline(self._trends[name]):<16}"
            for name, (label, form) in TRENDS.items()
        ]
        return ["".join(cells[place : place + 2]).rstrip() for place in range(0, len(cells), 2)]

    def _left(self) -> str:
        done = max(1, self._done)
        seconds = int((time.monotonic() - self._begun) / done * (self._total - done))
        return (
            f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
            if seconds >= 3600
            else f"{seconds // 60}:{seconds % 60:02}"
        )


def _of(record: Record) -> str:
    """The number of pairs behind a record's accuracy, if it says so."""
    return f" (n={record[PAIRS]:,.0f})" if PAIRS in record else ""


def print_result(run: RunDir, result: Result, console: Console, *, held_out: int | None = None, shown: int = 2) -> None:
    """Print held-out figures before and after, completions side by side, the adapter's path, and the next commands.

    `held_out` is the number of pairs behind the figures.
    """
    table = Table("held-out pairs", "before", "after", title="result", title_justify="left")
    for label, name in (
        ("reward accuracy", "rewards/accuracies"),
        ("reward margin", "rewards/margins"),
        ("loss", "loss"),
    ):
        pairs = held_out if name == ACCURACY else None
        table.add_row(label, *(accuracy_text(values[name], pairs) for values in (result.before, result.after)))
    lengths = result.samples
    if lengths is not None:
        table.add_row(
            f"median answer, tokens ({lengths.count} prompts)",
            f"{lengths.median_tokens_before:g}",
            f"{lengths.median_tokens_after:g}",
        )
    console.print(table)
    for line in read_lines(run.samples, is_sampled)[:shown]:
        _side_by_side(line, console)
    console.print(
        f"{result.steps} steps, {result.pairs} pairs, {result.seconds / 60:.1f} minutes, peak memory "
        f"{result.peak_gib:.2f} GiB",
        markup=False,
    )
    commands = {
        f"qdpo report {run.path}": "a page that says whether it worked: curves, findings, answers",
        f"qdpo merge {run.path}": "one model to serve, compared with what was trained; then `qdpo export`",
        f"qdpo eval {run.path}": "score it again, or score it on other pairs (data.path=…)",
        "qdpo runs" if run.path.parent == Path("runs") else f"qdpo runs {run.path.parent}": "list all runs",
        "qdpo run … --fresh": "train again with the same settings",
    }
    width = max(map(len, commands)) + 2
    console.print(
        f"\nadapter: {run.adapter}  (PEFT's format; its README.md loads it over the base as it was trained)",
        markup=False,
    )
    console.print("next:\n" + "\n".join(f"  {c:<{width}}{what}" for c, what in commands.items()), markup=False)


def _side_by_side(line: dict[str, Any], console: Console) -> None:
    width = min(max(console.width, 60), 140)
    half = (width - 5) // 2
    table = Table(width=width, title=Text(question(line["prompt"])), title_justify="left")
    table.add_column("before", width=half)
    table.add_column("after", width=half)
    # Text, not str: rich would take parts of an answer for its markup.
    table.add_row(*(Text(textwrap.shorten(line[side], 700, placeholder=" …")) for side in ("before", "after")))
    console.print(table)


def print_evaluation(scored: "Rescored", *, as_json: bool) -> None:
    """Print the metrics of `qdpo eval`, as a table or as one JSON object."""
    values = {**scored.evaluation.values, **scored.evaluation.perplexities}
    if as_json:
        print(
            json.dumps(
                {
                    "run": scored.run,
                    "source": scored.source,
                    "pairs": scored.pairs,
                    "trained_pairs": scored.trained.pairs,
                    "trained_prompts": scored.trained.prompts,
                    **values,
                }
            )
        )
        return
    print(f"{scored.run} on {scored.pairs} pairs of {scored.source}")
    for name, value in values.items():
        figure = accuracy_text(value, scored.pairs) if name == ACCURACY else f"{value:.4f}"
        print(f"  {name:<26} {figure:>12}")
    if scored.trained.prompts:
        print(f"warning: {scored.trained.sentence(scored.pairs)}")
    print("`qdpo metrics NAME` explains each.")
