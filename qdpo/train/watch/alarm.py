"""Says what is wrong as soon as the records show it, once each, and stops on the findings asked for."""

from collections.abc import Callable, Sequence
from typing import Any

from qdpo.diagnose.course import Course, Terms
from qdpo.diagnose.rules import Finding, findings
from qdpo.settings.schema import RunConfig


class Alarm:
    """Hears every record of a run; `stops_on` is what train.stop_when names, once that holds."""

    def __init__(self, terms: Terms, stop_when: Sequence[str], say: Callable[[str], None]):
        self._course, self._stop_when, self._say = Course(terms), set(stop_when), say
        self._said: set[str] = set()
        self.stops_on: Finding | None = None

    def recall(self, records: Sequence[dict[str, Any]]) -> None:
        """Takes the records of an earlier start; what holds at their end is said (again)."""
        for record in records:
            self._course.add(record)
        self._look()

    def hear(self, record: dict[str, Any]) -> None:
        """Takes one record more."""
        self._course.add(record)
        self._look()

    def _look(self) -> None:
        found = findings(self._course)
        for finding in found:
            if finding.rule not in self._said:
                self._said.add(finding.rule)
                self._say(f"warning: {finding.sentence}")
        self.stops_on = next((finding for finding in found if finding.rule in self._stop_when), None)


def terms(config: RunConfig, *, steps: int, held_out: int) -> Terms:
    """What the rules must know of a run of these settings."""
    return Terms(steps, config.train.pairs_per_step, held_out, config.loss.beta)
