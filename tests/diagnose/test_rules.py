"""Every rule holds where it should, on made and on recorded runs, and nowhere in a healthy one."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdpo.diagnose.course import Course, Record, Terms
from qdpo.diagnose.rules import RULES, diagnose, findings, follow
from qdpo.report.screen.explain import PAGE, explain
from qdpo.report.screen.spark import sparkline

TRACES = Path(__file__).with_name("traces")
STEPS, EVERY = 120, 20
TERMS = Terms(steps=STEPS, pairs_per_step=16, held_out=200, beta=0.1)
Change = Callable[[int, Record], Record]


def made(change: Change = lambda step, record: {}, steps: int = STEPS) -> list[Record]:
    """Records of a healthy run, as `change` has them: it is given each step and record, and says what differs."""

    def values(step: int) -> Record:
        done = step / STEPS
        return {
            "loss": 0.693 - 0.3 * done, "rewards/chosen": -0.2 * done, "rewards/margins": 1.2 * done,
            "rewards/accuracies": 0.5 + 0.25 * min(1, 3 * done) if step else 0.5, "kl": 0.1 * done,
            "logps/chosen_per_token": -1 - 0.01 * done, "lengths/chosen": 200.0, "lengths/rejected": 180.0,
        }  # fmt: skip

    records = []
    for step in range(steps + 1):
        if step:
            record = {"step": step, **values(step), "grad_norm": 2.0 + 0.3 * (step % 5), "learning_rate": 1e-5}
            records.append({**record, "overflows": 0, **change(step, record)})
        if step % EVERY == 0:
            held = {f"eval_{name}": value for name, value in values(step).items()}
            held |= {"step": step, "eval_samples/tokens": 120.0, "eval_samples/repetition": 0.04}
            records.append({**held, **change(step, held)})
    return records


def trained(**values: Any) -> Change:
    """The same values at every training step."""
    return lambda step, record: values if "loss" in record else {}


def held(first_step: int = 1, **values: Any) -> Change:
    """The same values at every evaluation from a step on; __ stands for the slash."""
    named = {f"eval_{name.replace('__', '/')}": value for name, value in values.items()}
    return lambda step, record: named if "eval_loss" in record and step >= first_step else {}


def rewards(accuracy: float, margin: float = 0.5) -> Change:
    def change(step: int, record: Record) -> Record:
        prefix = "eval_" if "eval_loss" in record else ""
        return {f"{prefix}rewards/accuracies": accuracy, f"{prefix}rewards/margins": margin} if step else {}

    return change


def rising(step: int, record: Record) -> Record:
    return {"eval_loss": 0.69 - 0.002 * min(step, 60) + 0.002 * max(0, step - 60)} if "eval_loss" in record else {}


def spiking(step: int, record: Record) -> Record:
    return {"grad_norm": 60.0} if step in (70, 90, 110) else {}


def lost(nats_a_token: float) -> Change:
    return trained(**{"rewards/chosen": -nats_a_token * TERMS.beta * 200})


SICK: dict[str, tuple[Change, Change]] = {
    # what makes the rule hold, and a little less of it
    "unmoved": (trained(**{"rewards/margins": 0.0}), trained(**{"rewards/margins": 1e-9})),
    "reversed": (rewards(0.38), rewards(0.46)),
    "stuck": (rewards(0.51), rewards(0.59)),
    "overfit": (rising, lambda step, record: rising(step, record) if step <= 80 else {}),
    "saturated": (rewards(1.0), lambda step, record: rewards(1.0)(step, record) if step > 12 else {}),
    "displacement": (lost(0.51), lost(0.49)),
    "runaway": (trained(**{"rewards/margins": 1.21 * 0.1 * 190}), trained(**{"rewards/margins": 1.19 * 0.1 * 190})),
    "weak_beta": (rewards(0.95, 0.05), rewards(0.95, 0.2)),
    "drift": (trained(kl=11.0), trained(kl=9.0)),
    "repetition": (held(samples__repetition=0.45), held(samples__repetition=0.35)),
    "length": (held(samples__tokens=260.0), held(samples__tokens=170.0)),
    "spikes": (spiking, lambda step, record: spiking(step, record) if step > 80 else {}),
    "overflow": (
        lambda step, record: {"overflows": max(0, step - 112)} if "loss" in record else {},
        lambda step, record: {"overflows": max(0, step - 116)} if "loss" in record else {},
    ),
}


def names(records: list[Record], terms: Terms = TERMS) -> list[str]:
    return [finding.rule for finding in diagnose(records, terms)]


def test_a_healthy_run_has_no_findings_at_any_time() -> None:
    assert follow(made(), TERMS) == []


def test_every_rule_is_tried() -> None:
    assert list(SICK) == list(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_holds_from_its_bound_on(rule: str) -> None:
    sick, less = SICK[rule]
    assert rule in names(made(sick)) and rule not in names(made(less))


@pytest.mark.parametrize("rule", RULES)
def test_a_finding_says_what_was_measured_and_what_to_do(rule: str) -> None:
    (finding,) = [finding for finding in diagnose(made(SICK[rule][0]), TERMS) if finding.rule == rule]
    assert re.search(r"\d", finding.evidence) and not finding.evidence.endswith(".") and "\n" not in finding.sentence
    assert finding.advice.endswith(".") and finding.sentence.startswith(f"{rule}: ")


def test_other_ways_to_hold() -> None:
    shorter = made(held(samples__tokens=40.0))
    assert names(shorter) == ["length"] and names(made(held(samples__tokens=70.0))) == []
    memorised = made(lambda step, record: rewards(0.95 if "loss" in record else 0.52)(step, record))
    assert names(memorised) == ["overfit"]
    few = Terms(steps=STEPS, pairs_per_step=16, held_out=3, beta=0.1)  # chance may order all three rightly
    assert names(memorised, few) == [] and names(made(SICK["stuck"][0]), few) == ["stuck"]
    leaking = made(held(rewards__accuracies=1.0, loss=0.02))
    assert names(leaking) == ["saturated"]
    held_out_only = made(held(logps__chosen_per_token=-1.6))
    assert names(held_out_only) == ["displacement"]
    one_huge = made(lambda step, record: {"grad_norm": 900.0} if step == 100 else {})
    assert names(one_huge) == ["spikes"]


def test_without_a_reference_nothing_is_said_of_rewards() -> None:
    def simpo(step: int, record: Record) -> Record:
        prefix = "eval_" if "eval_loss" in record else ""
        return {f"{prefix}rewards/chosen": -40.0, f"{prefix}rewards/margins": 30.0}

    records = made(simpo)
    assert names(records) == ["displacement", "runaway"]
    assert names([{name: record[name] for name in record if not name.endswith("kl")} for record in records]) == []


@pytest.mark.parametrize("steps", [0, 1, 5, 19])
def test_a_run_that_has_hardly_begun_is_left_in_peace(steps: int) -> None:
    for change in (rewards(0.5), rewards(0.3), lost(0.4)):
        assert set(names(made(change, steps=steps))) <= {"reversed"}


def test_what_has_passed_is_told_apart() -> None:
    def passing(step: int, record: Record) -> Record:
        return {"kl": 50.0} if "loss" in record and 30 <= step < 40 else {}

    (seen,) = follow(made(passing), TERMS)
    assert seen.finding.rule == "drift" and 30 < seen.first_step < 35 and not seen.lasting


@pytest.mark.parametrize(
    ("trace", "steps", "beta", "expected"),
    [
        ("demo", 48, 0.1, []),
        ("rate", 24, 0.1, ["displacement", "runaway", "drift", "spikes"]),
        ("beta", 36, 0.001, ["weak_beta"]),
        ("shuffled", 36, 0.1, ["stuck"]),
        ("swapped", 36, 0.1, ["reversed"]),
        ("leak", 40, 0.1, ["saturated"]),
    ],
)
def test_real_runs_of_the_demo(trace: str, steps: int, beta: float, expected: list[str]) -> None:
    """The demo, and the demo at 100 times its rate, with beta 0.001, labels shuffled or swapped, 12 pairs repeated."""
    records = [json.loads(line) for line in (TRACES / f"{trace}.jsonl").read_text().splitlines()]
    terms = Terms(steps=steps, pairs_per_step=4, held_out=50 if trace == "demo" else 24, beta=beta)
    assert names(records, terms) == expected
    seen = follow(records, terms)
    assert [one.finding.rule for one in seen if one.lasting] == expected
    assert expected or seen == []


def test_one_record_more_costs_next_to_nothing_however_long_the_run() -> None:
    """The loop looks after every step: a look may not read the whole run again."""
    counted = [0]

    class Counted(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            counted[0] += 1
            return super().__getitem__(name)

    def looked_up(steps: int) -> int:
        course = Course(Terms(steps, 16, 200, 0.1))
        for record in made() * (steps // STEPS):
            course.add(Counted(record))
        counted[0] = 0
        findings(course)
        return counted[0]

    assert looked_up(9600) < 5 * looked_up(960)


def test_the_page_on_metrics_lists_the_rules_as_they_are() -> None:
    page = " ".join(explain("findings").split())
    for name, rule in RULES.items():
        assert f"**{name}**: {rule.threshold}. {rule.advice}" in page
    assert PAGE.read_text(encoding="utf-8").count("## Findings") == 1


def test_sparklines() -> None:
    assert sparkline([]) == "" and sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    line = sparkline([math.sin(place / 100) for place in range(314)], width=16)
    assert len(line) == 16 and line.startswith("▁") and "█" in line[6:10]
