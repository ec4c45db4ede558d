"""What the page of `qdpo label` shows and takes: one prompt at a time, answers in random order, and how it goes."""

import random
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdpo.collect.candidates import Candidates
from qdpo.collect.decisions import MAKES_PAIR, Decision, Decisions
from qdpo.data.turns import RowProblem, excerpt, read_text
from qdpo.errors import DataError

ASKED_AGAIN = 0.05
"""Share of the picks that --agreement asks a second time."""
AFTER = 10
"""So many other decisions lie between the first and the second asking, if there are as many."""
FEW_PICKS = 20
NOTABLE = 3.0
"""Standard deviations above chance: of a person without bias, 1 in 180 would be told so at four places."""
TAKEN = ("pick", "edit", "tie", "skip", "undo")


class Stale(DataError):
    """The page did not know the newest decision about a prompt: another tab has taken it."""


@dataclass
class Place:
    """One place on the page: picks of the answer that stood there, and what chance would give."""

    picked: int = 0
    expected: float = 0.0
    variance: float = 0.0


def bias(places: list[Place]) -> str:
    """A sentence where a place is picked more often than chance explains; else nothing."""
    if sum(place.picked for place in places) < FEW_PICKS:
        return ""
    for number, place in enumerate(places, 1):
        if place.picked - place.expected > NOTABLE * place.variance**0.5:
            return f"the answer in place {number} is picked more often than chance explains: read all before picking"
    return ""


@dataclass(frozen=True)
class Labelling:
    """The session of one person; `seed` decides the order of answers and who is asked again."""

    decisions: Decisions
    seed: int = 0
    blind: bool = False
    agreement: bool = False

    def index(self) -> list[dict[str, Any]]:
        """One short entry a prompt, in order: its state, and what a search looks into."""
        return [
            {
                "id": item.id,
                "state": self._state(item),
                "cut": any(answer.cut for answer in item.answers),
                "title": excerpt(str(item.turns[-1]["content"]), 90),
                "note": bool((current := self.decisions.current(item.id)) and current.note),
            }
            for item in self.decisions.items.values()
        ]

    def search(self, text: str) -> list[str]:
        """Ids of the prompts that hold the text in a turn, an answer or a note; letters' case is no matter."""
        wanted = text.casefold()
        return [item.id for item in self.decisions.items.values() if wanted in self._text(item).casefold()]

    def view(self, prompt: str, *, again: bool = False) -> dict[str, Any]:
        """All that the page shows of one prompt, without its decision where it is asked `again`.

        Raises: DataError for an unknown one.
        """
        item, again = self._item(prompt), again and prompt in self._due()
        names = {answer.origin.name for answer in item.answers if answer.origin}
        current = self.decisions.current(prompt)
        return {
            "id": prompt,
            "turns": [{"role": turn["role"], "content": turn["content"]} for turn in item.turns],
            "answers": [
                {"id": answer.id, "text": answer.text, "cut": answer.cut, "tokens": answer.tokens}
                | ({"model": answer.origin.name} if answer.origin and len(names) > 1 and not self.blind else {})
                for answer in self._order(item, again)
            ],
            "count": self.decisions.count(prompt),
            "state": self._state(item),
            "again": again,
            "decision": None if current is None or again else _shown(current),
        }

    def take(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Takes a decision as the page sends it; on disk when this returns what the page needs next.

        Raises: Stale where the page did not know the newest decision; DataError for one that means nothing; DiskError.
        """
        item = self._item(str(asked.get("prompt")))
        kind, seconds, note = asked.get("kind"), asked.get("seconds"), _text(asked, "note")
        if kind not in TAKEN:
            raise DataError(f"A decision of the kind {kind!r} cannot be taken here.")
        if asked.get("count") != self.decisions.count(item.id):
            raise Stale("This prompt has been decided elsewhere meanwhile.")
        best, worst, text = (_text(asked, name) for name in ("best", "worst", "text"))
        if seconds is not None and not (isinstance(seconds, int | float) and 0 <= seconds < 1e6):
            raise DataError(f"seconds={seconds!r} is no number of seconds.")
        again = asked.get("again") is True and item.id in self._due() and kind in ("pick", "tie", "skip")
        self.decisions.add(
            Decision(
                item.id,
                kind,
                best=best,
                worst=worst,
                text=text,
                note=note or "",
                shown=() if kind == "undo" else tuple(answer.id for answer in self._order(item, again)),
                seconds=None if seconds is None else round(float(seconds), 2),
                again=again,
            )
        )
        return {"entry": {"id": item.id, "state": self._state(item)}, "stats": self.stats(), "again": self.due()}

    def stats(self) -> dict[str, Any]:
        """Counts by state, median seconds, how often each place was picked, and agreement with oneself."""
        states = Counter(self._state(item) for item in self.decisions.items.values())
        taken = [d for d in self.decisions.history if d.by == "person" and d.kind in ("pick", "edit", "tie")]
        seconds = [decision.seconds for decision in taken if decision.seconds is not None]
        return {
            "states": dict(states),
            "total": len(self.decisions.items),
            "pairs": sum(1 for _pair in self.decisions.pairs()),
            "median_seconds": statistics.median(seconds) if seconds else None,
            "places": [{"picked": place.picked, "expected": place.expected} for place in self.places()],
            "bias": bias(self.places()),
            "agreement": self._agreement(),
        }

    def summary(self) -> list[str]:
        """How it went, and what comes next, for the terminal."""
        found = self.stats()
        states = found["states"]
        left = states.get("undecided", 0) + states.get("open", 0)
        others = [f"{states[kind]:,} {word}" for kind, word in (("tie", "ties"), ("skip", "skipped")) if kind in states]
        lines = [", ".join([f"{found['pairs']:,} pairs in {self.decisions.out}", *others, f"{left:,} left to decide"])]
        if found["median_seconds"] is not None:
            lines.append(f"{found['median_seconds']:.1f} seconds a decision (median)")
        if found["agreement"]["asked"]:
            asked, same = found["agreement"]["asked"], found["agreement"]["same"]
            lines.append(f"asked again, you agreed with yourself in {same} of {asked} ({same / asked:.0%})")
        if found["bias"]:
            lines.append(f"warning: {found['bias']}")
        if found["pairs"]:
            lines.append(f"Next: qdpo data check {self.decisions.out} model.path=… , then qdpo run data.path=…")
        return lines

    def due(self) -> str | None:
        """The prompt that is to be asked a second time next."""
        return next(iter(self._due()), None)

    def last(self) -> str | None:
        """The prompt whose standing decision a person took last."""
        for decision in reversed(self.decisions.history):
            if decision is self.decisions.current(decision.prompt) and decision.by == "person":
                return decision.prompt
        return None

    def _due(self) -> list[str]:
        """Picked prompts whose second asking is due: chosen by their id, once enough others lie between."""
        if not self.agreement:
            return []
        picked: dict[str, int] = {}
        for place, decision in enumerate(self.decisions.history):
            if decision.again:
                picked[decision.prompt] = -1
            elif picked.get(decision.prompt) != -1 and decision.kind == "pick" and decision.by == "person":
                picked[decision.prompt] = place
        waiting = {id_: place for id_, place in picked.items() if place >= 0 and self._stands(id_)}
        allowed = max(1, round(len(picked) * ASKED_AGAIN)) - (
            len(picked) - sum(place >= 0 for place in picked.values())
        )
        everyone_done = all(self.decisions.is_settled(item) for item in self.decisions.items)
        ripe = [id_ for id_, place in waiting.items() if len(self.decisions.history) - place > AFTER or everyone_done]
        return sorted(ripe, key=lambda id_: random.Random(f"{self.seed} again {id_}").random())[: max(0, allowed)]

    def _stands(self, prompt: str) -> bool:
        current = self.decisions.current(prompt)
        return current is not None and current.kind == "pick"

    def _agreement(self) -> dict[str, int]:
        """How many were asked again, and how many of them got the same best answer."""
        asked = [decision for decision in self.decisions.history if decision.again and decision.kind != "skip"]
        first = {d.prompt: d.best for d in self.decisions.history if d.kind == "pick" and not d.again}
        return {"asked": len(asked), "same": sum(first.get(decision.prompt) == decision.best for decision in asked)}

    def places(self) -> list[Place]:
        """For each place on the page: how often its answer was picked as best, and how often chance would."""
        found: list[Place] = []
        for decision in self.decisions.history:
            if decision.kind == "pick" and decision.by == "person" and decision.best in decision.shown:
                count = len(decision.shown)
                found += [Place() for _ in range(count - len(found))]
                found[decision.shown.index(decision.best)].picked += 1
                for place in found[:count]:
                    place.expected += 1 / count
                    place.variance += (1 - 1 / count) / count
        return found

    def _order(self, item: Candidates, again: bool) -> list[Any]:
        """The answers as they are shown: in an order of the prompt's own, and in another one when asked again."""
        answers = list(item.answers)
        random.Random(f"{self.seed} {'again' if again else 'first'} {item.id}").shuffle(answers)
        return answers

    def _state(self, item: Candidates) -> str:
        current = self.decisions.current(item.id)
        return "undecided" if current is None else current.kind

    def _item(self, prompt: str) -> Candidates:
        if prompt not in self.decisions.items:
            raise DataError(f"There is no prompt {excerpt(prompt, 20)!r} among the candidates.")
        return self.decisions.items[prompt]

    def _text(self, item: Candidates) -> str:
        current = self.decisions.current(item.id)
        texts = [str(turn["content"]) for turn in item.turns] + [answer.text for answer in item.answers]
        return "\n".join([*texts, current.note if current else ""])


def _text(asked: Mapping[str, Any], name: str) -> str | None:
    value = asked.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{name}={excerpt(value)}: {name} must be a text.")
    try:
        return read_text(value, name)
    except RowProblem as problem:
        raise DataError(f"This cannot be kept: {problem.detail}.") from None


def _shown(decision: Decision) -> dict[str, Any]:
    kept = {name: getattr(decision, name) for name in ("kind", "best", "worst", "text", "note", "by")}
    return kept | {"pair": decision.kind in MAKES_PAIR}
