"""`qdpo judge`: asks a judge about every undecided prompt, and saves each decision as it is made."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qdpo.collect.candidates import Answer, Candidates
from qdpo.collect.decisions import Decision, Decisions
from qdpo.errors import ServerError

if TYPE_CHECKING:
    from qdpo.run.watcher import Watcher

MOST_FAILURES = 5
"""Consecutive prompts without an answer that stop a judge: the cause is then the server, not the prompts."""


@dataclass(frozen=True)
class Unanswered:
    """A prompt about which the judge gave no answer: nothing is decided, and the same command asks again."""

    prompt: str
    reason: str
    """The text before a colon is the key for counting."""


Judgement = Decision | Unanswered


class Judge(Protocol):
    """Judges prompts, in any order, and yields each outcome as soon as it is known."""

    name: str
    """Author of its decisions: the rule or the model, with every option that may change a decision."""

    def opening(self, items: Sequence[Candidates]) -> list[str]:
        """Lines for the user before it starts: the criteria and the expected cost."""

    def decide(self, items: Sequence[Candidates]) -> Iterator[Judgement]: ...

    def figures(self) -> dict[str, Any]:
        """Statistics about the judge itself at the end, for the summary."""
        return {}

    def remarks(self) -> list[str]:
        """The figures, as sentences."""
        return []


@dataclass(kw_only=True)
class JudgeSummary:
    """Result of one call of `qdpo judge`."""

    judge: str
    out: Path
    pairs: int = 0
    open: Counter[str] = field(default_factory=Counter)
    """Prompts left to a person, by reason."""
    unanswered: Counter[str] = field(default_factory=Counter)
    """Prompts about which the judge gave no answer, by reason."""
    decided_before: int = 0
    open_before: int = 0
    """Prompts that the same judge left open earlier, and that are not asked again."""
    not_reached: int = 0
    """Prompts left out by --limit."""
    pairs_in_file: int = 0
    open_in_file: int = 0
    """Prompts that still need a person or another judge."""
    seconds: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The summary as plain values."""
        return {**vars(self), "out": str(self.out), "seconds": round(self.seconds, 3)}


def judge_candidates(
    judge: Judge, decisions: Decisions, items: Sequence[Candidates], watcher: "Watcher", *, limit: int | None = None
) -> JudgeSummary:
    """Let the judge decide all undecided prompts; decisions of a person or of an earlier judge are kept.

    Raises: ServerError if MOST_FAILURES prompts in a row got no answer, and any error that stops the judge. Decisions
    made until then are on disk.
    """
    found, started = JudgeSummary(judge=judge.name, out=decisions.out), time.monotonic()
    todo = _undecided(judge, decisions, items, found)
    found.not_reached = max(0, len(todo) - limit) if limit is not None else 0
    todo = todo[:limit]
    if todo:
        for line in judge.opening(todo):
            watcher.say(line)
        watcher.begin("judging", len(todo), "prompt")
        try:
            _take(judge, decisions, todo, watcher, found)
        finally:
            watcher.finish()
    found.pairs_in_file = sum(1 for _pair in decisions.pairs())
    found.open_in_file = sum(not decisions.is_settled(item.id) for item in items)
    found.seconds, found.figures = time.monotonic() - started, judge.figures()
    return found


def _undecided(
    judge: Judge, decisions: Decisions, items: Sequence[Candidates], found: JudgeSummary
) -> list[Candidates]:
    """The prompts to ask about. A prompt that this judge left open stays open unless its answers have changed."""
    left = {(taken.prompt, frozenset(taken.shown)) for taken in decisions.history
            if taken.kind == "open" and taken.by == judge.name}  # fmt: skip
    todo = []
    for item in items:
        if decisions.is_settled(item.id):
            found.decided_before += 1
        elif (item.id, frozenset(answer.id for answer in item.answers)) in left:
            found.open_before += 1
        else:
            todo.append(item)
    return todo


def _take(
    judge: Judge, decisions: Decisions, todo: Sequence[Candidates], watcher: "Watcher", found: JudgeSummary
) -> None:
    failures = 0
    for outcome in judge.decide(todo):
        if isinstance(outcome, Unanswered):
            kind = outcome.reason.partition(":")[0]
            if kind not in found.unanswered:
                watcher.say(f"no answer about {decisions.items[outcome.prompt].place}: {outcome.reason}")
            found.unanswered[kind] += 1
            failures += 1
            if failures >= MOST_FAILURES:
                raise ServerError(
                    f"{failures} prompts in a row got no answer from {judge.name}. Reason for the last prompt: "
                    f"{outcome.reason}. Decisions so far are in {decisions.out} ({found.pairs:,} new pairs); the "
                    "same command resumes there."
                )
        else:
            failures = 0
            decisions.add(outcome)
            if outcome.kind == "open":
                found.open[outcome.note.partition(":")[0]] += 1
            else:
                found.pairs += 1
        watcher.advance(1)


def picked(judge: str, item: Candidates, best: Answer, worst: Answer, **others: Any) -> Decision:
    """Decision of a judge that prefers one answer to another."""
    return Decision(prompt=item.id, kind="pick", by=judge, best=best.id, worst=worst.id, shown=_ids(item), **others)


def left_open(judge: str, item: Candidates, reason: str, **others: Any) -> Decision:
    """Decision of a judge that leaves the prompt to a person; the text before a colon in `reason` is counted."""
    return Decision(prompt=item.id, kind="open", by=judge, note=reason, shown=_ids(item), **others)


def _ids(item: Candidates) -> tuple[str, ...]:
    return tuple(answer.id for answer in item.answers)


def summary_lines(found: JudgeSummary, judge: Judge, candidates: str) -> list[str]:
    """The summary for the user, with the next commands."""
    asked = found.pairs + found.open.total() + found.unanswered.total()
    lines = [f"{judge.name}: {found.pairs:,} pairs of {asked:,} prompts, in {found.seconds:.1f} s"]
    lines += [f"  left open, {reason}: {count:,}" for reason, count in found.open.most_common()]
    lines += [f"  no answer, {reason}: {count:,}" for reason, count in found.unanswered.most_common()]
    before = {
        "decided before, kept as they are": found.decided_before,
        "left open by this judge before": found.open_before,
        "not reached because of --limit": found.not_reached,
    }
    lines += [f"  {what}: {count:,}" for what, count in before.items() if count]
    lines += [f"  {remark}" for remark in judge.remarks()]
    lines.append(f"{found.out}: {found.pairs_in_file:,} pairs, {found.open_in_file:,} prompts without a decision")
    commands = {}
    if found.unanswered or found.not_reached:
        commands["the same command"] = "asks about the rest"
    if found.open_in_file:
        commands[f"qdpo label {candidates} --out {found.out}"] = "decide the open prompts yourself"
    if found.pairs_in_file:
        commands[f"qdpo data check {found.out}"] = "check that the pairs are fit to train on"
    width = max(map(len, commands), default=0) + 2
    return [*lines, "next:", *(f"  {command:<{width}}{what}" for command, what in commands.items())]
