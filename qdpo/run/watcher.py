"""The events of a run, as an observer receives them."""

from collections.abc import Callable
from typing import Protocol

from qdpo.diagnose.course import Record

# One line that stays on screen.
Say = Callable[[str], None]


# In a record that is shown, not stored: the number of pairs behind its means.
PAIRS = "pairs"


class Watcher(Protocol):
    """Receives a run's events; implemented by the terminal display and the tests."""

    def say(self, line: str) -> None:
        """One line that stays on screen."""

    def begin(self, what: str, total: int, unit: str) -> None:
        """A stage of `total` units starts."""

    def advance(self, units: int) -> None:
        """Units of the current stage are done."""

    def finish(self) -> None:
        """The current stage is over."""

    def step(self, record: Record) -> None:
        """A training step or an evaluation was recorded."""
