"""Best and worst of several answers from comparisons of two, with as few of them as will do."""

from collections.abc import Sequence
from itertools import combinations

BestWorst = tuple[int, int]


def comparisons(answers: int) -> BestWorst:
    """How many comparisons a judge that can tell them apart needs at most, and one that never can.

    The first is known to be the least that is enough for both ends: ⌈3n/2⌉ - 2 (Pohl, 1972).
    """
    return -(-3 * answers // 2) - 2, answers * (answers - 1) // 2


class Ranking:
    """Asks about two answers only while either may still be the best, or either the worst.

    So it trusts that what beats the better of two also beats the worse. An answer that has lost cannot be the best, and
    one that has won cannot be the worst; where a comparison says nothing, both stay in the game, and more is asked.
    """

    def __init__(self, answers: int):
        self._answers = range(answers)
        self._asked: set[BestWorst] = set()
        self._beats: set[BestWorst] = set()

    def next_pair(self) -> BestWorst | None:
        """What to compare next: of those that matter, the two that have been asked about least."""
        open_ = {*combinations(self._unbeaten(), 2), *combinations(self._winless(), 2)} - self._asked
        count = [sum(place in pair for pair in self._asked) for place in self._answers]
        return min(open_, key=lambda pair: (count[pair[0]] + count[pair[1]], pair), default=None)

    def record(self, one: int, other: int, better: int | None) -> None:
        """The result of comparing the two that `next_pair` named; None where it says nothing."""
        self._asked.add((one, other))
        if better is not None:
            self._beats.add((better, other if better == one else one))

    def outcome(self) -> BestWorst | None:
        """Best and worst, of which the best is better directly or through others; None where no two are.

        Where several are left at an end, the one that beats most, or is beaten by most.
        """
        found = [(best, worst) for best in self._unbeaten() for worst in self._winless() if worst in self._below(best)]
        above = [sum(place in self._below(other) for other in self._answers) for place in self._answers]
        return max(found, key=lambda pair: len(self._below(pair[0])) + above[pair[1]], default=None)

    def _unbeaten(self) -> Sequence[int]:
        losers = {loser for _winner, loser in self._beats}
        return [place for place in self._answers if place not in losers]

    def _winless(self) -> Sequence[int]:
        winners = {winner for winner, _loser in self._beats}
        return [place for place in self._answers if place not in winners]

    def _below(self, place: int) -> set[int]:
        """All that it beats, directly or through others."""
        found: set[int] = set()
        waiting = [place]
        while waiting:
            here = waiting.pop()
            new = {loser for winner, loser in self._beats if winner == here} - found
            found |= new
            waiting += new
        return found
