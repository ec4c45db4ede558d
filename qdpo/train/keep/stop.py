"""Handles Ctrl-C and SIGTERM during a run: the first requests a stop at a safe point, the second exits at once."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


class StopRequest:
    """`number` is the signal that requested a stop, or None."""

    def __init__(self) -> None:
        self.number: int | None = None


@contextlib.contextmanager
def catch_signals(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Makes signals set a flag only. Works in the main thread; in other threads nothing changes."""
    request = StopRequest()

    def note(number: int, _frame: Any) -> None:
        if request.number is not None:
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        request.number = number
        say("stopping: after this step is finished and saved (once more: exit at once)")

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
