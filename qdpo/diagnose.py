"""What is wrong with a run, in plain words: rules over its metric records, each with threshold, evidence and advice.

No torch and no other module of qdpo: the settings name these rules, the loop stops on them, the report repeats them.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]

# Steps without any effect after which that is said.
UNMOVED_STEPS = 10
# Pairs that a mean over recent steps should hold: below that, accuracy is mostly noise.
WINDOW_PAIRS = 32
# Of them, at most, where the rest of the run so far is meant: a look costs the same however long the run is.
MANY_WINDOWS = 20
# Nats a token. Half a nat leaves each token of a chosen answer 61 % of its probability.
DISPLACED = 0.5
# Nats a token between chosen and rejected. The demo wrote readable answers at 0.7 and repetitions at 1.7 (LOG.md).
RUNAWAY = 1.2
# The proxy `kl`, nats a token. It was 1.4 at the end of a healthy demo, and 10^6 at a hundred times its rate.
DRIFTED = 10.0
# Below this margin a sigmoid loss still pulls with 95 % of its first force.
WEAK_MARGIN, SORTED = 0.1, 0.9
SATURATED, EARLY_SHARE = 0.99, 0.1
SPIKE, SPIKES, SPIKE_STEPS = 10.0, 3, 100
LONGER, SHORTER = 1.5, 0.5
REPEATING, REPEATING_MORE = 0.4, 0.25


@dataclass(frozen=True)
class Terms:
    """What the rules must know of a run besides its records."""

    steps: int
    """Planned."""
    pairs_per_step: int
    held_out: int
    """Held-out pairs."""
    beta: float


@dataclass(frozen=True)
class Finding:
    """One rule that holds."""

    rule: str
    evidence: str
    """What was measured, beside its bound."""
    advice: str

    @property
    def sentence(self) -> str:
        """Evidence and advice, for a terminal."""
        return f"{self.rule}: {self.evidence}. {self.advice}"


@dataclass
class Course:
    """The records of a run so far, in the order in which they were written."""

    terms: Terms
    steps: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        (self.steps if "loss" in record else self.evaluations).append(record)

    def findings(self, rules: Iterable[str] | None = None) -> list[Finding]:
        """The rules (all, or those named) that hold now, gravest first."""
        found = ((name, RULES[name].holds(self)) for name in RULES if rules is None or name in rules)
        return [Finding(name, evidence, RULES[name].advice) for name, evidence in found if evidence]

    @property
    def window(self) -> int:
        """Steps that make up a mean over recent steps."""
        return max(3, math.ceil(WINDOW_PAIRS / self.terms.pairs_per_step))

    @property
    def half_done(self) -> bool:
        return len(self.steps) >= max(self.terms.steps / 2, 2 * self.window)

    @property
    def first(self) -> Record | None:
        """The evaluation before the first step."""
        return self.evaluations[0] if self.evaluations and self.evaluations[0]["step"] == 0 else None

    @property
    def latest(self) -> Record | None:
        """The newest evaluation of a trained adapter."""
        return self.evaluations[-1] if self.evaluations and self.evaluations[-1]["step"] > 0 else None

    def recent(self, name: str, steps: int | None = None) -> float | None:
        """Mean over the last steps; None before there are enough of them."""
        last = self.steps[-(steps or self.window) :]
        return _mean(last, name) if len(last) >= self.window else None

    @property
    def first_accuracy(self) -> float:
        """Of the held-out pairs; an untouched adapter that is its own reference has 0.5 by definition."""
        return float(self.first["eval_rewards/accuracies"]) if self.first else 0.5

    def noise(self, pairs: float) -> float:
        """Standard error of an accuracy over so many pairs, where half of them are right."""
        return 0.5 / math.sqrt(max(1.0, pairs))


@dataclass(frozen=True)
class Rule:
    """A way to go wrong."""

    threshold: str
    """When it holds, for users."""
    advice: str
    holds: Callable[[Course], str | None]
    """The evidence, if it holds."""
    is_failure: bool = False
    """The run did not do what it was for."""


@dataclass(frozen=True)
class Seen:
    """A rule that held at some time of the run."""

    finding: Finding
    first_step: int
    lasting: bool
    """Whether it still holds at the end of the records."""


def diagnose(records: Sequence[Record], terms: Terms) -> list[Finding]:
    """What is wrong at the end of these records."""
    course = Course(terms)
    for record in records:
        course.add(record)
    return course.findings()


def follow(records: Sequence[Record], terms: Terms, looks: int = 200) -> list[Seen]:
    """What was wrong at any time, looked at after each evaluation and about `looks` more times."""
    course, seen = Course(terms), dict[str, Seen]()
    every = max(1, len(records) // looks)
    for number, record in enumerate(records, 1):
        course.add(record)
        if "loss" in record and number % every and number < len(records):
            continue
        now = {finding.rule: finding for finding in course.findings()}
        for rule, finding in now.items():
            first = seen[rule].first_step if rule in seen else record["step"]
            seen[rule] = Seen(finding, first, lasting=True)
        for rule in seen.keys() - now.keys():
            seen[rule] = Seen(seen[rule].finding, seen[rule].first_step, lasting=False)
    return [seen[rule] for rule in RULES if rule in seen]


def _unmoved(course: Course) -> str | None:
    opening = course.steps[:UNMOVED_STEPS]
    if len(opening) == UNMOVED_STEPS and all(record["rewards/margins"] == 0.0 for record in opening):
        rate = max(record["learning_rate"] for record in opening)
        return f"after {UNMOVED_STEPS} steps every margin is still exactly 0 (learning_rate up to {rate:g})"
    return None


def _reversed(course: Course) -> str | None:
    for share, pairs, whose in _accuracies(course):
        bound = course.first_accuracy - 3 * course.noise(pairs)
        if share < bound:
            return f"only {share:.0%} of {whose} pairs are ordered as labelled, below chance (bound: {bound:.0%})"
    return None


def _stuck(course: Course) -> str | None:
    found = [known for known in _accuracies(course) if known[2] != "held-out" or _is_late(course)]
    if not course.half_done or not found or _train_accuracy(course) >= 0.75 or _runaway(course):
        return None
    share, pairs, whose = found[0]
    bound = course.first_accuracy + 2 * course.noise(pairs)
    if not course.first_accuracy - 3 * course.noise(pairs) <= share < bound:
        return None
    return f"{share:.0%} of {whose} pairs are ordered as labelled, no more than chance allows (up to {bound:.0%})"


def _overfit(course: Course) -> str | None:
    latest = course.latest
    if latest is None or course.recent("loss") is None or _reversed(course):
        return None
    share, bound = latest["eval_rewards/accuracies"], course.first_accuracy + 2 * course.noise(course.terms.held_out)
    if course.half_done and share < bound and _train_accuracy(course) >= 0.9:
        return (
            f"{_train_accuracy(course):.0%} of the training pairs are ordered as labelled, but only {share:.0%} of the "
            f"held-out ones, no more than chance allows (up to {bound:.0%})"
        )
    best = min(course.evaluations, key=lambda record: float(record["eval_loss"]))
    start = float(course.evaluations[0]["eval_loss"])
    rise, bound = latest["eval_loss"] - best["eval_loss"], max(0.02 * abs(start), 0.25 * (start - best["eval_loss"]))
    place = max(best["step"], course.window)  # records of steps have no gaps, so step n is the n-th
    then = course.steps[place - course.window : place]
    if rise > bound and _mean(course.steps[-course.window :], "loss") < _mean(then, "loss"):
        return (
            f"held-out loss has risen from {best['eval_loss']:.3f} after step {best['step']} to "
            f"{latest['eval_loss']:.3f} (bound: +{bound:.3f}) while the training loss fell"
        )
    return None


def _saturated(course: Course) -> str | None:
    early = int(max(course.window, EARLY_SHARE * course.terms.steps))
    shares = [record["rewards/accuracies"] for record in course.steps[:early]]
    for end in range(course.window, len(shares) + 1):
        if sum(shares[end - course.window : end]) / course.window >= SATURATED:
            return (
                f"accuracy was {SATURATED:.0%} or more by step {course.steps[end - 1]['step']} of "
                f"{course.terms.steps}, in the first {EARLY_SHARE:.0%} of the run"
            )
    first, latest = course.first, course.latest
    if first and latest and latest["eval_rewards/accuracies"] >= 0.995:
        if 0 < first["eval_loss"] and latest["eval_loss"] < 0.1 * first["eval_loss"]:
            return (
                f"every held-out pair is ordered as labelled and their loss is {latest['eval_loss']:.4f}, under a "
                f"tenth of its {first['eval_loss']:.4f} at the start: better than real preferences allow"
            )
    return None


def _displacement(course: Course) -> str | None:
    falls = []
    if course.first and course.latest:
        name = "eval_logps/chosen_per_token"
        falls.append((course.latest[name] - course.first[name], "held-out"))
    recent = course.steps[-course.window :]
    if len(recent) == course.window and all("kl" in record for record in recent):
        nats = _mean(recent, "rewards/chosen") / course.terms.beta
        falls.append((nats / _mean(recent, "lengths/chosen"), "recent training"))
    fall, whose = min(falls, default=(0.0, ""))
    if fall >= -DISPLACED:
        return None
    kept = math.exp(max(fall, -20))
    return (
        f"chosen answers of {whose} pairs have lost {-fall:.2f} nats a token (bound: {DISPLACED:g}): each token keeps "
        f"{kept:.0%} of its probability"
    )


def _runaway(course: Course) -> str | None:
    gaps = []
    recent = course.steps[-course.window :]
    for whose, records, prefix in (("held-out", [course.latest], "eval_"), ("recent training", recent, "")):
        known = [record for record in records if record and f"{prefix}kl" in record]
        if known and (prefix or len(known) == course.window):
            tokens = (_mean(known, f"{prefix}lengths/chosen") + _mean(known, f"{prefix}lengths/rejected")) / 2
            gaps.append((_mean(known, f"{prefix}rewards/margins") / course.terms.beta / tokens, whose))
    gap, whose = max(gaps, default=(0.0, ""))
    if gap <= RUNAWAY:
        return None
    return f"the two answers of {whose} pairs lie {gap:.2f} nats a token apart (bound: {RUNAWAY:g})"


def _weak_beta(course: Course) -> str | None:
    recent = course.steps[-course.window :]
    if not course.half_done or any("kl" not in record for record in recent):
        return None
    share, margin = _train_accuracy(course), _mean(recent, "rewards/margins")
    if share < SORTED or not 0 < margin < WEAK_MARGIN:
        return None
    return (
        f"{share:.0%} of recent training pairs are ordered as labelled, {margin / course.terms.beta:.1f} nats apart, "
        f"yet at beta {course.terms.beta:g} that is a margin of {margin:.3g} (bound: {WEAK_MARGIN:g}), which the loss "
        "hardly notices"
    )


def _drift(course: Course) -> str | None:
    recent = [record["kl"] for record in course.steps[-course.window :] if "kl" in record]
    values = [(statistics.median(recent), "of recent steps")] if len(recent) == course.window else []
    if course.latest and "eval_kl" in course.latest:
        values.append((course.latest["eval_kl"], "of the held-out pairs"))
    value, whose = max(values, default=(0.0, ""))
    return f"the proxy kl {whose} is {value:.3g} nats a token (bound: {DRIFTED:g})" if value > DRIFTED else None


def _repetition(course: Course) -> str | None:
    before, after = _sampled(course, "eval_samples/repetition")
    if after is None or before is None or after < REPEATING or after - before < REPEATING_MORE:
        return None
    return (
        f"{after:.0%} of a sampled answer repeats what it said before, {before:.0%} with the adapter off (bounds: "
        f"{REPEATING:.0%}, and {REPEATING_MORE:.0%} more)"
    )


def _length(course: Course) -> str | None:
    before, after = _sampled(course, "eval_samples/tokens")
    if not before or after is None or course.latest is None:
        return None
    chosen, rejected = (course.latest[f"eval_lengths/{side}"] for side in ("chosen", "rejected"))
    beside = f"chosen answers have {chosen:.0f} tokens, rejected ones {rejected:.0f}"
    if after > LONGER * before and after > chosen:
        return f"sampled answers grew from {before:g} to {after:g} tokens (bound: {LONGER:g} times; {beside})"
    if after < SHORTER * before and after < SHORTER * chosen:
        return f"sampled answers shrank from {before:g} to {after:g} tokens (bound: {SHORTER:g} times; {beside})"
    return None


def _spikes(course: Course) -> str | None:
    norms = [record["grad_norm"] for record in course.steps[-SPIKE_STEPS:] if record["grad_norm"] is not None]
    peaks = []
    for place in range(course.window, len(norms)):
        usual = statistics.median(norms[max(0, place - 2 * course.window) : place])
        if usual > 0 and norms[place] > SPIKE * usual:
            peaks.append(norms[place] / usual)
    if len(peaks) < SPIKES and max(peaks, default=0) < SPIKE**2:
        return None
    return (
        f"{len(peaks)} of the last {len(norms)} gradients were more than {SPIKE:g} times those before, the largest "
        f"{max(peaks):.0f} times"
    )


def _overflow(course: Course) -> str | None:
    recent = course.steps[-20:]
    risen = recent[-1].get("overflows", 0) - recent[0].get("overflows", 0) if len(recent) == 20 else 0
    return f"{risen} of the last 20 updates were skipped because fp16 overflowed (bound: 5)" if risen > 5 else None


def _accuracies(course: Course) -> Iterator[tuple[float, float, str]]:
    """Share of pairs ordered as labelled, over how many pairs, and whose: held-out ones first."""
    if course.latest and len(course.steps) >= course.window:
        yield course.latest["eval_rewards/accuracies"], course.terms.held_out, "held-out"
    steps = max(course.window, min(len(course.steps) // 3, MANY_WINDOWS * course.window))
    share = course.recent("rewards/accuracies", steps)
    if share is not None and course.half_done:
        yield share, steps * course.terms.pairs_per_step, "recent training"


def _is_late(course: Course) -> bool:
    return course.latest is not None and course.latest["step"] >= course.terms.steps / 2


def _train_accuracy(course: Course) -> float:
    return course.recent("rewards/accuracies") or 0.0


def _sampled(course: Course, name: str) -> tuple[float | None, float | None]:
    """A measure of the sampled answers with the adapter off, and now."""
    return (course.first or {}).get(name), (course.latest or {}).get(name)


def _mean(records: Sequence[Record], name: str) -> float:
    return sum(float(record[name]) for record in records) / len(records)


RULES = {
    "unmoved": Rule(
        f"every margin is exactly 0 for the first {UNMOVED_STEPS} steps",
        "The adapter learns nothing. Usual causes: a rate too small to change a weight (train.learning_rate), "
        "adapter.targets that no answer passes through, or a layer without a backward pass.",
        _unmoved,
        is_failure=True,
    ),
    "reversed": Rule(
        "accuracy is three standard errors below its start",
        "Labels are swapped in one of the two sets, or the columns are (data.columns.chosen, data.columns.rejected).",
        _reversed,
        is_failure=True,
    ),
    "stuck": Rule(
        "half of the run is over, and held-out accuracy is within two standard errors of its start",
        "The rate is too low, the run too short, or the labels are noise: read twenty pairs and say which answer you "
        "would choose.",
        _stuck,
        is_failure=True,
    ),
    "overfit": Rule(
        "held-out loss rises by a quarter of what it had fallen while training loss falls, or held-out accuracy is "
        "that of chance where training accuracy is 90 %",
        "The run memorises its pairs: take fewer epochs, a lower rate, a larger beta, or more pairs.",
        _overfit,
    ),
    "saturated": Rule(
        f"accuracy reaches {SATURATED:.0%} in the first {EARLY_SHARE:.0%} of the run, or all held-out pairs are right "
        "at a tenth of the first loss",
        "Something trivial tells the answers apart (a marker, a style, the length), held-out pairs are among the "
        "training pairs, or the rate is too high or beta too small.",
        _saturated,
    ),
    "displacement": Rule(
        f"chosen answers lose {DISPLACED:g} nats a token",
        "The model is leaving the text you asked for: lower the rate, raise beta, or add a term that holds chosen "
        "answers (loss.name=sigmoid+sft, dpop). `qdpo metrics displacement` says more.",
        _displacement,
    ),
    "runaway": Rule(
        f"margin / beta passes {RUNAWAY:g} nats a token",
        "Margins this wide cost the quality of the text: lower the rate, raise beta, or take fewer steps.",
        _runaway,
    ),
    "weak_beta": Rule(
        f"half of the run is over, {SORTED:.0%} of the pairs are ordered, and their margin is below {WEAK_MARGIN:g}",
        "The loss goes on pulling pairs that are long in order, so nothing but the number of steps bounds the drift: "
        "raise beta.",
        _weak_beta,
    ),
    "drift": Rule(
        f"kl passes {DRIFTED:g} nats a token",
        "The policy has left its reference: lower the rate, or raise beta.",
        _drift,
    ),
    "repetition": Rule(
        f"sampled answers repeat {REPEATING:.0%} of themselves, and {REPEATING_MORE:.0%} more than before",
        "The adapter has damaged the model: lower the rate or stop earlier, and read the samples.",
        _repetition,
    ),
    "length": Rule(
        f"sampled answers grow to {LONGER:g} times, or shrink to {SHORTER:g} times, beyond what chosen answers are",
        "The preference may be one for length: balance it in the data, or see loss.length_normalized and "
        "loss.ld_alpha.",
        _length,
    ),
    "spikes": Rule(
        f"{SPIKES} of {SPIKE_STEPS} gradients are {SPIKE:g} times those before, or one {SPIKE**2:g} times",
        "Lower the rate or lengthen the warm-up (train.warmup_steps); look for broken rows.",
        _spikes,
    ),
    "overflow": Rule(
        "more than 5 of 20 updates are skipped", "Compute in bf16 or fp32 (model.dtype), or lower the rate.", _overflow
    ),
}  # fmt: skip
