"""What happens when the disk is full or gone: training goes on, and what is trained is not lost."""

import time
from collections.abc import Callable

from qdpo.errors import DiskError
from qdpo.train.keep.stop import StopRequest

RETRY_S = 15.0


class Saver:
    """Writes of a run. Those on the way may fail; the last ones wait until there is room again."""

    def __init__(self, say: Callable[[str], None], stop: StopRequest, on_disk_full: str):
        self._say, self._stop, self._waits = say, stop, on_disk_full == "wait"

    def attempt(self, write: Callable[[], object]) -> bool:
        """Whether it could be written; if not, that is said and the run goes on."""
        try:
            write()
        except DiskError as error:
            self._say(
                f"not saved: {error} Training goes on; the checkpoint before is whole, the next save tries again."
            )
            return False
        return True

    def insist(self, write: Callable[[], object]) -> None:
        """Writes, however long it takes until there is room.

        Raises: DiskError with output.on_disk_full=stop, or if a stop is asked for while waiting.
        """
        said = False
        while True:
            try:
                write()
                return
            except DiskError as error:
                if not self._waits or self._stop.number is not None:
                    raise
                if not said:
                    self._say(f"waiting for the disk: {error} It is tried every {RETRY_S:g} s; Ctrl-C gives up.")
                    said = True
            until = time.monotonic() + RETRY_S
            while time.monotonic() < until and self._stop.number is None:
                time.sleep(0.1)
