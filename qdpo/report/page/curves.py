"""The pictures of a report: panels made from the records, for one run or for several overlaid."""

import math
from collections.abc import Sequence
from dataclasses import replace

from qdpo.diagnose.course import Course
from qdpo.report.page.facts import Facts
from qdpo.report.page.plots import Histogram, Line, Panel

SIDES = [("chosen", "chosen"), ("rejected", "rejected")]
BOTH = [("train", "training"), ("held", "held out")]


def panels(facts: Facts) -> list[Panel]:
    """The curves of one run."""
    noise = 2 * Course(facts.terms).noise(facts.terms.held_out)
    found = [
        Panel(
            title="Loss",
            unit="",
            lines=[_trained(facts, "loss", "train"), _held(facts, "loss", "held")],
            legend=BOTH,
            help="loss",
        ),
        Panel(
            title="Reward accuracy",
            unit=f"share of pairs ordered as labelled, held out n={facts.terms.held_out:,}; band: chance",
            lines=[_trained(facts, "rewards/accuracies", "train"), _held(facts, "rewards/accuracies", "held")],
            legend=BOTH,
            level=0.5,
            band=noise,
            help="rewards/accuracies",
        ),
        Panel(
            title="Reward margin",
            unit="chosen − rejected",
            lines=[_trained(facts, "rewards/margins", "train"), _held(facts, "rewards/margins", "held")],
            legend=BOTH,
            level=0.0,
            help="rewards/margins",
        ),
        Panel(
            title="Rewards",
            unit="β × log-ratio; curves: training, dots: held out",
            lines=_sides(facts, "rewards/{}"),
            legend=SIDES,
            level=0.0,
            help="rewards/chosen",
        ),
        Panel(
            title="Log-probs",
            unit="nats a token; curves: training, dots: held out",
            lines=_sides(facts, "logps/{}_per_token"),
            legend=SIDES,
            help="displacement",
        ),
        Panel(
            title="Proxy kl",
            unit="nats a token from the reference",
            lines=[_trained(facts, "kl", "train"), _held(facts, "kl", "held")],
            legend=BOTH,
            logarithmic=True,
            help="kl",
        ),
        _lengths(facts),
        Panel(
            title="Gradient norm",
            unit="before clipping",
            lines=[_trained(facts, "grad_norm", "train")],
            logarithmic=True,
            help="grad_norm",
        ),
        Panel(title="Learning rate", unit="", lines=[_raw(facts, "learning_rate")], help="learning_rate"),
        Panel(
            title="Speed", unit="tokens a second", lines=[_trained(facts, "tokens_per_s", "train")], help="tokens_per_s"
        ),
        Panel(title="Peak memory", unit="GiB so far", lines=[_raw(facts, "peak_gib")], help="peak_gib"),
    ]
    return _drawn(found)


def distributions(facts: Facts) -> list[Histogram]:
    """Distributions of the change of each held-out pair; empty for a run that is not evaluated yet."""
    pairs = [line for line in facts.pairs if "before" in line and "after" in line]
    if not pairs:
        return []
    gaps = {
        colour: [line[when]["logps/chosen"] - line[when]["logps/rejected"] for line in pairs]
        for colour, when in (("train", "before"), ("held", "after"))
    }
    margins = {"held": [float(line["after"]["margin"]) for line in pairs]}
    return [
        Histogram(
            "Which answer the model itself finds likelier",
            "log-prob of chosen − rejected, nats",
            gaps,
            [("train", "before"), ("held", "after")],
        ),
        Histogram(
            "Reward margins",
            "margin after training; every pair started at the dotted line"
            if all(line["before"]["margin"] == 0 for line in pairs)
            else "margin after training",
            margins,
            [("held", "after")],
        ),
    ]


def overlays(runs: Sequence[Facts]) -> list[Panel]:
    """The curves that can be compared between runs, one colour a run."""
    legend = [(f"run-{place}", facts.name) for place, facts in enumerate(runs)]
    pairs = ", ".join(dict.fromkeys(f"{facts.terms.held_out:,}" for facts in runs))
    found = []
    for title, unit, name, level, per_beta in (
        ("Held-out accuracy", f"share of pairs ordered as labelled, n={pairs}", "eval_rewards/accuracies", 0.5, False),
        ("Held-out loss", "not comparable between losses or values of β", "eval_loss", None, False),
        ("Held-out margin / β", "nats: comparable between values of β", "eval_rewards/margins", 0.0, True),
        ("Held-out log-prob of chosen", "nats a token", "eval_logps/chosen_per_token", None, False),
        ("Proxy kl, held out", "nats a token", "eval_kl", None, False),
        ("Own answers", "median tokens", "eval_samples/tokens", None, False),
    ):
        lines = []
        for place, facts in enumerate(runs):
            by = facts.terms.beta if per_beta else 1.0
            known = [record for record in facts.evaluations if name in record]
            lines.append(Line([r["step"] for r in known], [r[name] / by for r in known], f"run-{place}", dots=True))
        found.append(
            Panel(title=title, unit=unit, lines=lines, legend=legend, level=level, logarithmic=name == "eval_kl")
        )
    trained = [_trained(facts, "loss", f"run-{place}") for place, facts in enumerate(runs)]
    found.append(Panel(title="Training loss", unit="mean over recent steps", lines=trained, legend=legend))
    grads = [_trained(facts, "grad_norm", f"run-{place}") for place, facts in enumerate(runs)]
    found.append(Panel(title="Gradient norm", unit="before clipping", lines=grads, legend=legend, logarithmic=True))
    return _drawn(found)


def _drawn(panels: list[Panel]) -> list[Panel]:
    """The panels that have points; an axis that may be logarithmic is so if its values span two orders of magnitude."""
    found = []
    for panel in panels:
        values = [y for line in panel.lines for y in line.y if y is not None and math.isfinite(y)]
        above = [value for value in values if value > 0]
        if panel.logarithmic and above and max(above) > 100 * min(above):
            # A logarithmic axis has no zeros: those of the untouched adapter are left out.
            panel = replace(panel, lines=[replace(line, y=[y or None for y in line.y]) for line in panel.lines])
        else:
            panel = replace(panel, logarithmic=False)
        if values:
            found.append(panel)
    return found


def _trained(facts: Facts, name: str, colour: str) -> Line:
    """A training metric, averaged over recent steps as the rules define them."""
    window = Course(facts.terms).window
    known = [record for record in facts.steps if record.get(name) is not None]
    x, y, total = [], [], 0.0
    for place, record in enumerate(known):
        total += record[name] - (known[place - window][name] if place >= window else 0.0)
        x.append(record["step"])
        y.append(total / min(place + 1, window))
    return Line(x, y, colour)


def _raw(facts: Facts, name: str) -> Line:
    return Line([record["step"] for record in facts.steps], [record.get(name) for record in facts.steps], "train")


def _held(facts: Facts, name: str, colour: str) -> Line:
    known = [record for record in facts.evaluations if f"eval_{name}" in record]
    return Line([r["step"] for r in known], [r[f"eval_{name}"] for r in known], colour, dots=True)


def _sides(facts: Facts, name: str) -> list[Line]:
    trained = [_trained(facts, name.format(side), side) for side in ("chosen", "rejected")]
    return trained + [_held(facts, name.format(side), side) for side in ("chosen", "rejected")]


def _lengths(facts: Facts) -> Panel:
    lines = [_trained(facts, "lengths/chosen", "chosen"), _trained(facts, "lengths/rejected", "rejected")]
    lines.append(_held(facts, "samples/tokens", "held"))
    legend = [("chosen", "chosen, data"), ("rejected", "rejected, data"), ("held", "own answers, median")]
    return Panel(title="Lengths", unit="tokens an answer", lines=lines, legend=legend, help="samples/tokens")
