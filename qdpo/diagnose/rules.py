"""Diagnoses a run in plain words: rules over its records, each with threshold, evidence and advice.

Imports neither torch nor other rooms of qdpo: settings name these rules, the loop stops on them, the report shows them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qdpo.diagnose import signs
from qdpo.diagnose.course import Course, Record, Terms


@dataclass(frozen=True)
class Finding:
    """One rule that holds."""

    rule: str
    evidence: str
    """The measurement, with its bound."""
    advice: str

    @property
    def sentence(self) -> str:
        """Evidence and advice, for a terminal."""
        return f"{self.rule}: {self.evidence}. {self.advice}"


@dataclass(frozen=True)
class Symptom:
    """A rule: one way in which a run can go wrong."""

    threshold: str
    """Condition of the rule, for users."""
    advice: str
    holds: Callable[[Course], str | None]
    """Returns the evidence if the rule holds, else None."""
    is_failure: bool = False
    """True if the run has failed its purpose."""


@dataclass(frozen=True)
class Seen:
    """A rule that held at some time during the run."""

    finding: Finding
    first_step: int
    lasting: bool
    """True if it still holds at the end of the records."""


def findings(course: Course) -> list[Finding]:
    """The rules that hold now, most severe first."""
    found = ((name, rule.advice, rule.holds(course)) for name, rule in RULES.items())
    return [Finding(name, evidence, advice) for name, advice, evidence in found if evidence]


def diagnose(records: Sequence[Record], terms: Terms) -> list[Finding]:
    """Findings at the end of these records."""
    course = Course(terms)
    for record in records:
        course.add(record)
    return findings(course)


def follow(records: Sequence[Record], terms: Terms, looks: int = 200) -> list[Seen]:
    """Findings at any time of the run, checked after each evaluation and about `looks` more times."""
    course, seen = Course(terms), dict[str, Seen]()
    every = max(1, len(records) // looks)
    for number, record in enumerate(records, 1):
        course.add(record)
        if "loss" in record and number % every and number < len(records):
            continue
        now = {finding.rule: finding for finding in findings(course)}
        for rule, finding in now.items():
            first = seen[rule].first_step if rule in seen else int(record["step"])
            seen[rule] = Seen(finding, first, lasting=True)
        for rule in seen.keys() - now.keys():
            seen[rule] = Seen(seen[rule].finding, seen[rule].first_step, lasting=False)
    return [seen[rule] for rule in RULES if rule in seen]


RULES = {
    "unmoved": Symptom(
        f"every margin is exactly 0 for the first {signs.UNMOVED_STEPS} steps",
        "The adapter learns nothing. Usual causes: a learning rate too small to change any weight "
        "(train.learning_rate), adapter.targets that no answer passes through, or a layer without a backward pass.",
        signs.unmoved,
        is_failure=True,
    ),
    "reversed": Symptom(
        "accuracy is three standard errors below its start",
        "The labels of one of the two sets are swapped, or its columns (data.columns.chosen, data.columns.rejected).",
        signs.swapped,
        is_failure=True,
    ),
    "stuck": Symptom(
        "half of the run is over, and held-out accuracy is within two standard errors of its start",
        "The learning rate is too low, the run too short, or the labels are noise: read twenty pairs and say which "
        "answer you would choose.",
        signs.stuck,
        is_failure=True,
    ),
    "overfit": Symptom(
        "held-out loss rises by a quarter of its earlier fall while training loss falls, or held-out accuracy is at "
        "chance while training accuracy is 90 %",
        "The run memorises its pairs: use fewer epochs, a lower learning rate, a larger beta, or more pairs.",
        signs.overfit,
    ),
    "saturated": Symptom(
        f"accuracy reaches {signs.SATURATED:.0%} in the first {signs.EARLY_SHARE:.0%} of the run, or all held-out "
        "pairs are right at a tenth of the first loss",
        "Something trivial tells the answers apart (a marker, a style, the length), held-out pairs are among the "
        "training pairs, or the learning rate is too high or beta too small.",
        signs.saturated,
    ),
    "displacement": Symptom(
        f"chosen answers lose {signs.DISPLACED:g} nats a token",
        "The model is drifting away from the answers you chose: lower the learning rate, raise beta, or add a term "
        "that keeps chosen answers likely (loss.name=sigmoid+sft, dpop). `qdpo metrics displacement` says more.",
        signs.displacement,
    ),
    "runaway": Symptom(
        f"margin / beta exceeds {signs.RUNAWAY:g} nats a token",
        "Margins this wide harm the quality of the text: lower the learning rate, raise beta, or use fewer steps.",
        signs.runaway,
    ),
    "weak_beta": Symptom(
        f"half of the run is over, {signs.SORTED:.0%} of the pairs are ordered, and their margin is below "
        f"{signs.WEAK_MARGIN:g}",
        "The loss keeps pulling pairs that are already ordered, so only the number of steps bounds the drift: raise "
        "beta.",
        signs.weak_beta,
    ),
    "drift": Symptom(
        f"kl exceeds {signs.DRIFTED:g} nats a token",
        "The policy is far from its reference: lower the learning rate, or raise beta.",
        signs.drift,
    ),
    "repetition": Symptom(
        f"sampled answers repeat {signs.REPEATING:.0%} of themselves, and {signs.REPEATING_MORE:.0%} more than before",
        "The adapter has damaged the model: lower the learning rate or stop earlier, and read the samples.",
        signs.repetition,
    ),
    "length": Symptom(
        f"sampled answers grow to {signs.LONGER:g} times, or shrink to {signs.SHORTER:g} times, beyond the length of "
        "chosen answers",
        "The model may have learnt a preference for length: balance lengths in the data, or see "
        "loss.length_normalized and loss.ld_alpha.",
        signs.length,
    ),
    "spikes": Symptom(
        f"{signs.SPIKES} of {signs.SPIKE_STEPS} gradients are {signs.SPIKE:g} times those before, or one is "
        f"{signs.SPIKE**2:g} times",
        "Lower the learning rate or lengthen the warm-up (train.warmup_steps); look for broken rows.",
        signs.spikes,
    ),
    "overflow": Symptom(
        "more than 5 of 20 updates are skipped",
        "Compute in bf16 or fp32 (model.dtype), or lower the learning rate.",
        signs.overflow,
    ),
}
