"""Ctrl-C and SIGTERM during a run: the first asks for a stop at the next safe point, the second leaves at once."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any


class StopRequest:
    """`number` is the signal that asked for a stop, or None."""

    def __init__(self) -> None:
        self.number: int | None = None


@contextlib.contextmanager
def listen(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """Inside, signals only set a flag. Only the main thread may listen; elsewhere nothing is changed."""
    request = StopRequest()

    def note(number: int, _frame: Any) -> None:
        if request.number is not None:
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        request.number = number
        say("stopping: this step is finished and saved first (again: leave at once)")

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
