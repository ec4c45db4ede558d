"""Writes report.html: a self-contained page on one run, or on several side by side."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from qdpo import __version__
from qdpo.diagnose.rules import RULES
from qdpo.errors import ConfigError
from qdpo.report.accuracy import accuracy_text
from qdpo.report.page import curves, plots, verdict
from qdpo.report.page.facts import Facts, read_facts
from qdpo.run import disk
from qdpo.train.watch.prompts import question

PAGES = Path(__file__).with_name("pages")
MOST_RUNS = 6
MOST_PROMPTS, OPEN_PROMPTS, MOST_TEXT, MOST_PAIRS = 25, 6, 2000, 4
# Metric → label and format.
FIGURES = {
    "rewards/accuracies": ("reward accuracy", "{:.3f}"),
    "rewards/margins": ("reward margin", "{:+.3f}"),
    "loss": ("loss", "{:.4f}"),
    "logps/chosen_per_token": ("log-prob of chosen, nats a token", "{:.3f}"),
    "logps/rejected_per_token": ("log-prob of rejected, nats a token", "{:.3f}"),
    "kl": ("proxy kl, nats a token", "{:.3g}"),
    "entropy": ("entropy, nats a token", "{:.3f}"),
    "samples/tokens": ("own answers, median tokens", "{:g}"),
    "samples/repetition": ("own answers, repetition", "{:.0%}"),
}


def write_report(folders: Sequence[Path], out: Path | None) -> Path:
    """Write the page, by default into the run's folder (several runs: here). Raises: ConfigError, DiskError."""
    if len(folders) > MOST_RUNS:
        raise ConfigError(f"{len(folders)} runs are too many to tell apart in one picture. Give at most {MOST_RUNS}.")
    runs = [read_facts(folder) for folder in folders]
    target = out or (runs[0].run.report if len(runs) == 1 else Path("report.html"))
    text = run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)
    disk.write_text(target, text)
    return target


def run_page(facts: Facts) -> str:
    """The page on one run."""
    mark, sentence = verdict.verdict(facts)
    lasting, passed = verdict.grouped(facts.seen)
    settings = facts.with_origins()
    return _render(
        "run.html",
        facts=facts,
        mark=mark,
        sentence=sentence,
        answers=verdict.answers(facts),
        lasting=lasting,
        passed=passed,
        rules=RULES,
        figures=_figures(facts),
        panels=[(panel, Markup(plots.draw_panel(panel))) for panel in curves.panels(facts)],
        distributions=[(each, Markup(plots.draw_histogram(each))) for each in curves.distributions(facts)],
        extremes=_extremes(facts),
        samples=[_sample(line) for line in facts.samples[:MOST_PROMPTS]],
        shown_open=OPEN_PROMPTS,
        changed=[setting for setting in settings if not setting.is_default],
        defaults=[setting for setting in settings if setting.is_default],
    )


def comparison_page(runs: Sequence[Facts]) -> str:
    """The page on several runs: overlaid curves, differing settings, and results."""
    names = dict.fromkeys(name for facts in runs for name in facts.settings)
    differing = []
    for name in names:
        values = [facts.settings.get(name) for facts in runs]
        if any(value != values[0] for value in values) and not name.startswith("output."):
            differing.append((name, values))
    rows = []
    for name, (label, form) in FIGURES.items():
        figures = [_value(facts.latest, name) for facts in runs]
        if any(value is not None for value in figures):
            pairs = [_pairs(name, facts) for facts in runs]
            rows.append((label, [_formatted(value, form, n) for value, n in zip(figures, pairs, strict=True)]))
    return _render(
        "comparison.html",
        runs=[(facts, *verdict.verdict(facts), verdict.grouped(facts.seen)[0]) for facts in runs],
        differing=differing,
        rows=rows,
        panels=[(panel, Markup(plots.draw_panel(panel))) for panel in curves.overlays(runs)],
    )


def _render(template: str, **values: Any) -> str:
    # Everything is escaped except the pictures, which contain no text of users.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["setting"] = _setting
    environment.filters["quoted"] = lambda path: shlex.quote(str(path))
    environment.filters["coded"] = _coded
    environment.filters["signed"] = lambda number, form: f"{number:{form}}".replace("-", "−")
    environment.filters["thousands"] = lambda number: f"{number:,}"
    style = Markup((PAGES / "style.css").read_text(encoding="utf-8"))
    return environment.get_template(template).render(style=style, version=__version__, **values)


def _figures(facts: Facts) -> list[tuple[str, str, str]]:
    """Label, value before, value after; a dash for unknown values."""
    found = []
    for name, (label, form) in FIGURES.items():
        before, after = _value(facts.first, name), _value(facts.latest, name)
        if before is not None or after is not None:
            pairs = _pairs(name, facts)
            found.append((label, _formatted(before, form, pairs), _formatted(after, form, pairs)))
    return found


def _value(record: dict[str, Any] | None, name: str) -> float | None:
    return None if record is None else record.get(f"eval_{name}")


def _pairs(name: str, facts: Facts) -> int | None:
    """The number of pairs behind a figure that is a share of them."""
    return facts.terms.held_out if name == "rewards/accuracies" else None


def _formatted(value: float | None, form: str, pairs: int | None = None) -> str:
    if value is not None and pairs is not None:
        return accuracy_text(value, pairs)
    return "–" if value is None else form.format(value).replace("-", "−")


def _setting(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list) else "not set" if value is None else str(value)


def _coded(text: str) -> Markup:
    """Escaped text, with `names` in backticks marked up as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _cut(text: str) -> str:
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} … ({len(text) - MOST_TEXT} characters more)"


def _sample(line: dict[str, Any]) -> dict[str, Any]:
    during = [{**each, "answer": _cut(each["answer"])} for each in line.get("during", [])[:-1]]
    return {
        "row": line["row"],
        "prompt": _cut(question(line["prompt"])),
        "before": _cut(line.get("before", "")),
        "before_tokens": line.get("before_tokens"),
        "after": _cut(line.get("after", "")),
        "after_tokens": line.get("after_tokens"),
        "during": during[-8:],
    }


def _extremes(facts: Facts) -> list[tuple[str, list[dict[str, Any]]]]:
    """Held-out pairs with the largest and the smallest margins, as text; empty without a tokenizer."""
    scored = sorted((line for line in facts.pairs if "after" in line), key=lambda line: -line["after"]["margin"])
    tokenizer = facts.tokenizer()
    if not scored or tokenizer is None:
        return []
    pairs, many = facts.held_out(), min(MOST_PAIRS, len(scored) // 2)

    def shown(line: dict[str, Any]) -> dict[str, Any]:
        pair = pairs[line["pair"]]
        prompt = tokenizer.decode(pair.prompt.tolist(), skip_special_tokens=False)
        sides = {side: tokenizer.decode(getattr(pair, side).tolist()) for side in ("chosen", "rejected")}
        change = {
            side: line["after"][f"logps/{side}"] - line["before"][f"logps/{side}"] if "before" in line else None
            for side in sides
        }
        return {
            "row": line["row"], "margin": line["after"]["margin"], "prompt": _cut(question(prompt)),
            "change": change, **{side: _cut(text.strip()) for side, text in sides.items()},
        }  # fmt: skip

    return [
        ("Won most", [shown(line) for line in scored[:many]]),
        ("Lost, or won least", [shown(line) for line in scored[-many:][::-1]]),
    ]
