"""Statistics of a person's decisions, from the journal alone: time, picks by place on the page, self-agreement."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import median
from typing import Any

from qdpo.collect.decisions import Decision

ENOUGH_PICKS = 20
"""With fewer picks, shares by place are mostly chance."""
NOTABLE_DEVIATIONS = 3.0
"""Standard deviations from chance. With four places, 1 of 90 unbiased labellers is reported as biased by mistake."""


@dataclass(frozen=True)
class PlaceShare:
    """Share of picks in which the answer at one place was best, among the picks that showed the place."""

    share: float
    chance: float
    is_notable: bool


@dataclass(frozen=True)
class Habits:
    """Statistics of the person who decided."""

    decisions: int
    median_seconds: float | None
    places: list[PlaceShare]
    """By place on the page, from the first; undone picks count too."""
    asked_again: int
    agreed: int
    """Of those asked again, how often the same answer was best."""

    @property
    def hint(self) -> str:
        """A sentence on position bias; empty if nothing is notable."""
        return " ".join(
            f"Place {number} was picked {place.share:.0%} of the time; chance would be {place.chance:.0%}. Answers are "
            "shown in random order, so check whether you read all of them before choosing."
            for number, place in enumerate(self.places, 1)
            if place.is_notable and place.share > place.chance
        )

    def to_json(self) -> dict[str, Any]:
        """The statistics as plain values, for the page."""
        places = [vars(place) for place in self.places]
        return vars(self) | {"places": places, "hint": self.hint}


def read_habits(history: Iterable[Decision]) -> Habits:
    """Compute the statistics from a person's journal entries; entries of judges are ignored."""
    taken = [one for one in history if one.by == "person" and one.kind not in ("undo", "open")]
    picks = [one for one in taken if one.kind == "pick" and one.best in one.shown]
    seconds = [one.seconds for one in taken if one.seconds is not None]
    answered = [(first, second) for first, second in asked_again(taken) if second.kind != "skip"]
    return Habits(
        decisions=len(taken),
        median_seconds=median(seconds) if seconds else None,
        places=_places(picks),
        asked_again=len(answered),
        agreed=sum(second.kind == "pick" and first.best == second.best for first, second in answered),
    )


def asked_again(taken: Iterable[Decision]) -> list[tuple[Decision, Decision]]:
    """For each prompt that was asked a second time, the first and the second decision."""
    first: dict[str, Decision] = {}
    found = []
    for one in taken:
        if not one.again:
            first[one.prompt] = one
        elif one.prompt in first:
            found.append((first[one.prompt], one))
    return found


def _places(picks: list[Decision]) -> list[PlaceShare]:
    if len(picks) < ENOUGH_PICKS:
        return []
    shown: Mapping[int, list[tuple[bool, float]]] = {
        place: [(one.shown[place] == one.best, 1 / len(one.shown)) for one in picks if place < len(one.shown)]
        for place in range(max(len(one.shown) for one in picks))
    }
    found = []
    for there in shown.values():
        picked, expected = sum(is_best for is_best, _ in there), sum(chance for _, chance in there)
        deviation = sqrt(sum(chance * (1 - chance) for _, chance in there))
        is_notable = len(there) >= ENOUGH_PICKS and abs(picked - expected) > NOTABLE_DEVIATIONS * deviation
        found.append(PlaceShare(picked / len(there), expected / len(there), is_notable))
    return found
