"""Reports problems once each, as soon as the records show them, and stops the run on the requested findings."""

from collections.abc import Callable, Sequence
from typing import Any

from qdpo.diagnose.course import Course, Terms
from qdpo.diagnose.rules import Finding, findings
from qdpo.settings.schema import RunConfig


class Alarm:
    """Checks every record of a run; `stops_on` is the finding named by train.stop_when, once it holds."""

    def __init__(self, terms: Terms, stop_when: Sequence[str], say: Callable[[str], None]):
        self._course, self._stop_when, self._say = Course(terms), set(stop_when), say
        self._said: set[str] = set()
        self.stops_on: Finding | None = None

    def replay(self, records: Sequence[dict[str, Any]]) -> None:
        """Adds the records of an earlier start, and reports (again) the findings that hold at their end."""
        for record in records:
            self._course.add(record)
        self._update()

    def check(self, record: dict[str, Any]) -> None:
        """Adds one record and reports new findings."""
        self._course.add(record)
        self._update()

    def _update(self) -> None:
        found = findings(self._course)
        for finding in found:
            if finding.rule not in self._said:
                self._said.add(finding.rule)
                self._say(f"warning: {finding.sentence}")
        self.stops_on = next((finding for finding in found if finding.rule in self._stop_when), None)


def terms(config: RunConfig, *, steps: int, held_out: int) -> Terms:
    """The facts about a run with these settings that the rules need."""
    return Terms(steps, config.train.pairs_per_step, held_out, config.loss.beta)
