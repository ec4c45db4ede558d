"""Sums up a run in one sentence, and answers the questions that users ask about their curves, from the records."""

from dataclasses import dataclass
from typing import Literal

from qdpo.diagnose.course import Course, Record
from qdpo.diagnose.rules import RULES, Seen
from qdpo.diagnose.signs import DISPLACED, DRIFTED
from qdpo.report.page.facts import Facts

NOT_OVER = ("it does not work", "it works", "it learns")
Grade = Literal["good", "look", "bad", "open"]


@dataclass(frozen=True)
class ReportAnswer:
    """A question, its answer, and a grade of the answer."""

    question: str
    answer: str
    mark: Grade


def verdict(facts: Facts) -> tuple[Grade, str]:
    """The grade of a run, and whether it worked, in one sentence."""
    so_far = "" if facts.result else f"So far, after {facts.done} of {facts.planned} steps: "
    failed, worked, learned = ("It did not work", "It worked", "It learned") if facts.result else NOT_OVER
    latest, lasting = facts.latest, [seen for seen in facts.seen if seen.lasting]
    failures = [seen for seen in lasting if RULES[seen.finding.rule].is_failure]
    if failures:
        return "bad", f"{so_far}{failed}: {failures[0].finding.evidence}."
    if latest is None:
        return "open", "Nothing can be said yet: there is no evaluation after the first step."
    accuracy, start, noise = _accuracy(facts, latest)
    counted = f"{accuracy:.0%} of {facts.terms.held_out} held-out pairs are ordered as labelled, {start:.0%} before"
    names = _listed([seen.finding.rule for seen in lasting]) if lasting else ""
    if lasting and accuracy <= start + 2 * noise:
        return "bad", f"{so_far}{failed}: {counted}, within the noise (±{2 * noise:.0%}). Findings: {names}."
    if accuracy <= start + 2 * noise:
        return "open", f"{so_far}No effect beyond chance: {counted}; the noise is ±{2 * noise:.0%}."
    if lasting:
        return "look", f"{so_far}{learned} the preference ({counted}), but check this before you trust it: {names}."
    return "good", f"{so_far}{worked}: {counted}, and no rule finds anything wrong."


def answers(facts: Facts) -> list[ReportAnswer]:
    """Answers to the users' questions, most important first."""
    if facts.latest is None:
        return []
    found = [_held_out(facts, facts.latest), _learned(facts), _chosen(facts), _moved(facts), _own_answers(facts)]
    return [answer for answer in found if answer is not None]


def _held_out(facts: Facts, latest: Record) -> ReportAnswer:
    accuracy, start, noise = _accuracy(facts, latest)
    mark: Grade = "good" if accuracy > start + 2 * noise else "bad" if accuracy < start - 2 * noise else "look"
    text = (
        f"Accuracy {start:.2f} → {accuracy:.2f} on {facts.terms.held_out} pairs that it was not trained on "
        f"(chance alone: ±{2 * noise:.2f}); margin {latest['eval_rewards/margins']:+.2f}."
    ).replace("-", "−")
    return ReportAnswer("Does it prefer the chosen answers?", text, mark)


def _learned(facts: Facts) -> ReportAnswer | None:
    course = Course(facts.terms, facts.steps, facts.evaluations)
    trained, latest = course.recent("rewards/accuracies"), facts.latest
    if trained is None or latest is None:
        return None
    gap = trained - latest["eval_rewards/accuracies"]
    noise = 2 * course.noise(facts.terms.held_out)
    text = (
        f"Recent training accuracy is {trained:.2f} (n={course.window * facts.terms.pairs_per_step:,}), held-out "
        f"{latest['eval_rewards/accuracies']:.2f} (n={facts.terms.held_out:,})."
    )
    if any(seen.finding.rule == "overfit" and seen.lasting for seen in facts.seen):
        return ReportAnswer("Does it memorise?", f"Yes: held-out figures lag behind. {text}", "bad")
    if gap > noise:
        return ReportAnswer("Does it memorise?", f"It is starting to. {text}", "look")
    return ReportAnswer("Does it memorise?", f"No. {text}", "good")


def _chosen(facts: Facts) -> ReportAnswer | None:
    if facts.first is None or facts.latest is None:
        return None
    change = {
        side: facts.latest[f"eval_logps/{side}_per_token"] - facts.first[f"eval_logps/{side}_per_token"]
        for side in ("chosen", "rejected")
    }
    both = f"chosen {change['chosen']:+.2f}, rejected {change['rejected']:+.2f} nats a token".replace("-", "−")
    title = "Log-probs of chosen fall: is it broken?"
    if change["chosen"] < -DISPLACED:
        return ReportAnswer(title, f"They fall too far: {both} (bound: −{DISPLACED:g}).", "bad")
    if change["chosen"] < -0.02:
        text = f"No: they fall a little, as usual, since DPO trains the difference: {both} (bound: −{DISPLACED:g})."
        return ReportAnswer(title, text, "good")
    return ReportAnswer("Did the chosen answers become less likely?", f"No: {both}.", "good")


def _moved(facts: Facts) -> ReportAnswer | None:
    value = (facts.latest or {}).get("eval_kl")
    if value is None:
        return None
    text = f"The proxy kl is {value:.3g} nats a token on held-out pairs (0 at the start, bound: {DRIFTED:g})."
    return ReportAnswer("How far did it move from the reference?", text, "bad" if value > DRIFTED else "good")


def _own_answers(facts: Facts) -> ReportAnswer | None:
    first, latest = facts.first or {}, facts.latest or {}
    if "eval_samples/tokens" not in first or "eval_samples/tokens" not in latest:
        return None
    trouble = [seen for seen in facts.seen if seen.lasting and seen.finding.rule in ("length", "repetition")]
    text = (
        f"Median length {first['eval_samples/tokens']:g} → {latest['eval_samples/tokens']:g} tokens, "
        f"repetition {first['eval_samples/repetition']:.0%} → {latest['eval_samples/repetition']:.0%}; "
        f"{latest['eval_samples/cut']:.0%} reached the limit. Read them below: no figure replaces that."
    )
    return ReportAnswer("How did its own answers change?", text, "look" if trouble else "good")


def _accuracy(facts: Facts, latest: Record) -> tuple[float, float, float]:
    """Accuracy on held-out pairs: now, at the start, and its standard error."""
    course = Course(facts.terms, facts.steps, facts.evaluations)
    return latest["eval_rewards/accuracies"], course.first_accuracy, course.noise(facts.terms.held_out)


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def grouped(seen: list[Seen]) -> tuple[list[Seen], list[Seen]]:
    """Findings that hold at the end, and findings that have passed."""
    return [one for one in seen if one.lasting], [one for one in seen if not one.lasting]
