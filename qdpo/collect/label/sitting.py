"""State and actions of the label page: answers in random order, decisions without overwriting, repeated questions."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from threading import Lock
from typing import Any

from qdpo.collect.candidates import Candidates
from qdpo.collect.decisions import MAKES_PAIR, Decision, Decisions
from qdpo.collect.label.habits import read_habits
from qdpo.data.layouts.turns import RowProblem, read_text
from qdpo.errors import DataError

AGAIN_EVERY = 20
"""--agreement asks one pick in 20 again: 5 %."""
AGAIN_AFTER = 10
"""Decisions between a pick and its repetition, if there are as many, so that the pick is not remembered."""
LONGEST_SECONDS = 24 * 3600.0


class Overtaken(Exception):
    """The prompt was decided elsewhere after this view of it was made."""


@dataclass(frozen=True)
class LabelOptions:
    """Options of the label page."""

    is_blind: bool = False
    """Hide from the page which model wrote an answer; only the pairs record it."""
    agreement: bool = False
    seed: int = 0
    """Random seed of the order of answers."""


class Labelling:
    """One labelling session; every method may be called from any thread."""

    def __init__(self, decisions: Decisions, options: LabelOptions):
        self.decisions, self.options = decisions, options
        self._lock = Lock()
        self._folded: dict[str, str] = {}

    def index(self) -> dict[str, object]:
        """A short row for each prompt, in the order of the files, and the figures."""
        with self._lock:
            return {
                "out": self.decisions.out.name,
                "blind": self.options.is_blind,
                "rows": [self._row(item) for item in self.decisions.items.values()],
                **self._figures(),
            }

    def view(self, prompt: str, *, again: bool = False) -> dict[str, object]:
        """A prompt with its answers in display order; if asked again, without its decision. Raises: DataError."""
        with self._lock:
            return self._view(self._item(prompt), again)

    def search(self, text: str) -> list[str]:
        """Ids of the prompts with the text in a turn, an answer or a note, ignoring case."""
        wanted = text.casefold()
        with self._lock:
            return [item.id for item in self.decisions.items.values() if wanted in self._text(item)]

    def decide(self, wish: Mapping[str, Any]) -> dict[str, object]:
        """Record the decision that the page sent; it is on disk when this returns.

        Raises: Overtaken if `count` differs from the journal's; DataError for an invalid decision; DiskError.
        """
        decision, count = self._read(wish)
        with self._lock:
            item = self._item(decision.prompt)
            if count != self.decisions.count(item.id):
                raise Overtaken
            current = self.decisions.current(item.id)
            if decision.kind == "undo" and current is None:
                raise DataError("This prompt has no decision to undo.")
            if decision.again and (current is None or current.kind != "pick" or current.by != "person"):
                raise DataError("Only a prompt for which a person has picked an answer can be asked again.")
            self.decisions.add(decision)
            return {"row": self._row(item), **self._figures()}

    def summary(self) -> list[str]:
        """Summary and next command for the end of the session. Waits for a decision that is being saved."""
        with self._lock:
            figures, out = self._figures(), self.decisions.out
            habits = read_habits(self.decisions.history)
        kinds = figures["counts"]
        pairs = sum(kinds.get(kind, 0) for kind in MAKES_PAIR)
        left = kinds.get("undecided", 0) + kinds.get("open", 0)
        lines = [
            f"{out}: {pairs:,} pairs ({kinds.get('edit', 0):,} edited), {kinds.get('tie', 0):,} ties, "
            f"{kinds.get('skip', 0):,} skipped, {left:,} undecided"
        ]
        if habits.median_seconds is not None:
            lines.append(f"median {habits.median_seconds:.1f} s per decision")
        if habits.places:
            shares = ", ".join(f"{place.share:.0%} (chance {place.chance:.0%})" for place in habits.places)
            lines.append(f"best answer by place on the page: {shares}")
        lines += [habits.hint] if habits.hint else []
        if habits.asked_again:
            share = habits.agreed / habits.asked_again
            lines.append(f"agreement with yourself: {habits.agreed:,} of {habits.asked_again:,} ({share:.0%})")
        if pairs:
            lines += [f"next: qdpo data check {out}", f"      qdpo run preset=… data.path={out}"]
        return lines

    def order(self, prompt: str, *, again: bool = False) -> list[str]:
        """Ids of the answers in display order: random, the same at every view, but different when asked again."""
        ids = [answer.id for answer in self._item(prompt).answers]
        first = sorted(ids, key=lambda id_: self._draw(prompt, id_))
        if not again:
            return first
        second = sorted(ids, key=lambda id_: self._draw(prompt, id_, "again"))
        return second if second != first else first[::-1]

    def _read(self, wish: Mapping[str, Any]) -> tuple[Decision, int]:
        texts = {name: wish.get(name) for name in ("best", "worst", "text")}
        seconds, count = wish.get("seconds"), wish.get("count")
        try:
            for name, value in {"prompt": wish.get("prompt"), "note": wish.get("note", ""), **texts}.items():
                if value is not None or name in ("prompt", "note"):
                    read_text(value, name)
        except RowProblem as problem:
            raise DataError(f"This cannot be saved: {problem.detail}.") from None
        if wish.get("kind") not in ("pick", "edit", "tie", "skip", "undo"):
            raise DataError(f"{wish.get('kind')!r} is not a decision that a person can make.")
        if seconds is not None and not (isinstance(seconds, int | float) and 0 <= seconds <= LONGEST_SECONDS):
            raise DataError(f"seconds is {seconds!r}, not a time between 0 and a day.")
        if not isinstance(count, int):
            raise DataError(f"count is {count!r}, not the number of entries that the page knows.")
        again = wish.get("again") is True and wish["kind"] != "undo"
        shown = () if wish["kind"] == "undo" else tuple(self.order(wish["prompt"], again=again))
        decision = Decision(
            prompt=wish["prompt"], kind=wish["kind"], best=texts["best"], worst=texts["worst"], text=texts["text"],
            note=wish.get("note", "").strip(), shown=shown, again=again,
            seconds=None if seconds is None else round(seconds, 1),
        )  # fmt: skip
        return decision, count

    def _item(self, prompt: str) -> Candidates:
        found = self.decisions.items.get(prompt)
        if found is None:
            raise DataError(f"No prompt {prompt!r} is among the candidates.")
        return found

    def _row(self, item: Candidates) -> list[Any]:
        current = self.decisions.current(item.id)
        return [
            item.id,
            current.kind if current else "undecided",
            self.decisions.count(item.id),
            any(answer.cut for answer in item.answers),
        ]

    def _view(self, item: Candidates, again: bool) -> dict[str, Any]:
        current = None if again else self.decisions.current(item.id)
        names = {answer.id: answer.origin.name if answer.origin else "" for answer in item.answers}
        is_named = not self.options.is_blind and len(set(names.values())) > 1
        answers = [answer for id_ in self.order(item.id, again=again) if (answer := item.answer(id_))]
        return {
            "id": item.id,
            "again": again,
            "count": self.decisions.count(item.id),
            "turns": [{"role": turn["role"], "text": str(turn.get("content") or "")} for turn in item.turns],
            "answers": [
                {"id": answer.id, "text": answer.text, "cut": answer.cut}
                | ({"model": names[answer.id]} if is_named and names[answer.id] else {})
                for answer in answers
            ],
            "decision": {
                name: getattr(current, name) for name in ("kind", "by", "best", "worst", "text", "note")
            } if current else None,
        }  # fmt: skip

    def _figures(self) -> dict[str, Any]:
        history = self.decisions.history
        kinds = Counter(
            current.kind if (current := self.decisions.current(prompt)) else "undecided"
            for prompt in self.decisions.items
        )
        return {
            "counts": dict(kinds),
            "habits": read_habits(history).to_json(),
            "last": next((one.prompt for one in reversed(history) if self._is_last(one)), None),
            "again": self._due(kinds["undecided"] + kinds["open"]) if self.options.agreement else None,
        }

    def _is_last(self, decision: Decision) -> bool:
        return decision.by == "person" and decision is self.decisions.current(decision.prompt)

    def _due(self, undecided: int) -> str | None:
        """The pick to ask again now: the lowest draw of picks not asked again and not among the newest decisions."""
        history = self.decisions.history
        asked = {one.prompt for one in history if one.again}
        picked = [one.prompt for one in history if one.kind == "pick" and not one.again and self._is_last(one)]
        wanted = len(picked) // AGAIN_EVERY if undecided else max(1, len(picked) // AGAIN_EVERY)
        newest = {one.prompt for one in history[-AGAIN_AFTER:]} if len(picked) > AGAIN_AFTER else set()
        free = [prompt for prompt in picked if prompt not in asked and prompt not in newest]
        if len(asked & set(picked)) >= wanted:
            return None
        return min(free, key=lambda prompt: self._draw(prompt, "again"), default=None)

    def _draw(self, *what: str) -> str:
        return sha256("\0".join((str(self.options.seed), *what)).encode()).hexdigest()

    def _text(self, item: Candidates) -> str:
        if item.id not in self._folded:
            turns = [str(turn.get("content") or "") for turn in item.turns]
            self._folded[item.id] = "\0".join([*turns, *(answer.text for answer in item.answers)]).casefold()
        current = self.decisions.current(item.id)
        return self._folded[item.id] + (f"\0{current.note.casefold()}" if current else "")
