"""Saves files on a disk that may be full or gone: training continues, and no trained step is lost."""

import time
from collections.abc import Callable

from qdpo.errors import DiskError
from qdpo.run import disk
from qdpo.train.keep.stop import StopRequest

RETRY_S = 15.0


class Saver:
    """Saves a run's files. Saves during training may fail; the final ones wait for free space."""

    def __init__(self, say: Callable[[str], None], stop: StopRequest, on_disk_full: str):
        self._say, self._stop, self._waits = say, stop, on_disk_full == "wait"

    def try_save(self, write: Callable[[], object]) -> bool:
        """Writes once. If the disk refuses, reports that and returns False; the run continues."""
        try:
            write()
        except DiskError as error:
            self._say(
                f"not saved: {error} Training continues. The previous checkpoint is intact; the next save tries again."
            )
            return False
        return True

    def save_or_wait(self, write: Callable[[], object]) -> None:
        """Writes, retrying until there is free space.

        Raises: DiskError with output.on_disk_full=stop, if a stop is requested while waiting, or if something else is
        in the place of the file, which no free space heals.
        """
        said = False
        while True:
            try:
                write()
                return
            except DiskError as error:
                if not self._waits or self._stop.number is not None or not disk.may_heal(error):
                    raise
                if not said:
                    self._say(f"waiting for the disk: {error} Retrying every {RETRY_S:g} s; Ctrl-C gives up.")
                    said = True
            until = time.monotonic() + RETRY_S
            while time.monotonic() < until and self._stop.number is None:
                time.sleep(0.1)
