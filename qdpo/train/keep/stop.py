"""Handles Ctrl-C and SIGTERM during a run: the first requests a stop at a safe point, the second exits at once."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from qdpo.diagnose.course import Record
from qdpo.errors import Interrupted
from qdpo.run.watcher import Watcher


class StopRequest:
    """`number` is the signal that requested a stop, or None."""

    def __init__(self) -> None:
        self.number: int | None = None

    def check(self, where: str) -> None:
        """Ends the run here, at a point that the same command can continue from or begins again.

        Raises: Interrupted if a stop was requested.
        """
        if self.number is not None:
            raise Interrupted(
                f"Stopped {where}. What was saved before is intact; the same command continues.", self.number
            )


@dataclass(frozen=True)
class StoppableWatcher:
    """Passes a stage's events on, and ends the run after any unit of it if a stop was requested."""

    watcher: Watcher
    stop: StopRequest
    where: str

    def say(self, line: str) -> None:
        """As the watcher."""
        self.watcher.say(line)

    def begin(self, what: str, total: int, unit: str) -> None:
        """As the watcher."""
        self.watcher.begin(what, total, unit)

    def advance(self, units: int) -> None:
        """Raises: Interrupted if a stop was requested."""
        self.watcher.advance(units)
        self.stop.check(self.where)

    def finish(self) -> None:
        """As the watcher."""
        self.watcher.finish()

    def step(self, record: Record) -> None:
        """As the watcher."""
        self.watcher.step(record)


@contextlib.contextmanager
def catch_signals(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Makes signals set a flag only. Works in the main thread; in other threads nothing changes."""
    request = StopRequest()

    def note(number: int, _frame: Any) -> None:
        if request.number is not None:
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        request.number = number
        say("stopping: at the next safe point, with what is done by then saved (once more: exit at once)")

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
