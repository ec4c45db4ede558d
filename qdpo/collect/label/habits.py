"""How a person decides, read from the journal alone: time, picks by place on the page, and agreement with themself."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from statistics import median
from typing import Any

from qdpo.collect.decisions import Decision

ENOUGH_PICKS = 20
"""Below this, any share of picks by place is chance."""
NOTABLE_DEVIATIONS = 3.0
"""Standard deviations from chance: with four places, one labeller without a bias in 90 is told of one by mistake."""


@dataclass(frozen=True)
class PlaceShare:
    """How often the answer shown at one place was picked as best, as shares of the picks that showed the place."""

    share: float
    chance: float
    is_notable: bool


@dataclass(frozen=True)
class Habits:
    """What the journal says of the person who decided."""

    decisions: int
    median_seconds: float | None
    places: list[PlaceShare]
    """By place on the page, the first one first; undone picks count too, since they were made."""
    asked_again: int
    agreed: int
    """Of those asked again: the same answer was best."""

    @property
    def hint(self) -> str:
        """A sentence on position bias; empty where nothing is notable."""
        return " ".join(
            f"Place {number} was picked {place.share:.0%} of the time, where chance gives {place.chance:.0%}. Answers "
            "stand in random order, so look whether you read all of them before choosing."
            for number, place in enumerate(self.places, 1)
            if place.is_notable and place.share > place.chance
        )

    def to_json(self) -> dict[str, Any]:
        """For the page."""
        places = [vars(place) for place in self.places]
        return vars(self) | {"places": places, "hint": self.hint}


def read_habits(history: Iterable[Decision]) -> Habits:
    """What a person's entries of the journal show; those of judges are left aside."""
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
    """Each prompt that was asked a second time: what was said first, and then."""
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
