"""Finds best and worst of several answers with as few pairwise comparisons as possible."""

from collections.abc import Sequence
from itertools import combinations

BestWorst = tuple[int, int]


def comparisons(answers: int) -> BestWorst:
    """Most comparisons needed with a judge that can tell all answers apart, and with a judge that never can.

    The first is the known minimum for finding both ends: ⌈3n/2⌉ - 2 (Pohl, 1972).
    """
    return -(-3 * answers // 2) - 2, answers * (answers - 1) // 2


class Ranking:
    """Compares two answers only while both may still be the best, or both the worst.

    This assumes transitivity: an answer that beats the better of two also beats the worse. An answer that has lost
    cannot be the best, and an answer that has won cannot be the worst. If a comparison is undecided, both answers stay
    candidates, and more comparisons are needed.
    """

    def __init__(self, answers: int):
        self._answers = range(answers)
        self._asked: set[BestWorst] = set()
        self._beats: set[BestWorst] = set()

    def next_pair(self) -> BestWorst | None:
        """The next pair to compare: of those that matter, the one with the least compared answers; None at the end."""
        open_ = {*combinations(self._unbeaten(), 2), *combinations(self._winless(), 2)} - self._asked
        count = [sum(place in pair for pair in self._asked) for place in self._answers]
        return min(open_, key=lambda pair: (count[pair[0]] + count[pair[1]], pair), default=None)

    def record(self, one: int, other: int, better: int | None) -> None:
        """Record the result for the pair from `next_pair`; `better` is None if the comparison was undecided."""
        self._asked.add((one, other))
        if better is not None:
            self._beats.add((better, other if better == one else one))

    def outcome(self) -> BestWorst | None:
        """Best and worst, where best beats worst directly or through others; None if there is no such pair.

        If several answers remain at an end, take the one that beats most, or is beaten by most.
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
        """All answers that this one beats, directly or through others."""
        found: set[int] = set()
        waiting = [place]
        while waiting:
            here = waiting.pop()
            new = {loser for winner, loser in self._beats if winner == here} - found
            found |= new
            waiting += new
        return found
