"""metrics.jsonl, and the memory that a device reports."""

import contextlib
import json
from pathlib import Path
from typing import Any

from qdpo.errors import DiskError
from qdpo.run import disk
from qdpo.train.watch.tracker import Tracker

SCHEMA = 1


class Metrics:
    """The run's metrics.jsonl: one JSON object a line, flushed as it is written."""

    def __init__(self, path: Path, *, keep_through: int, tracker: Tracker | None = None):
        """Opens the file for appending, without the records after step `keep_through`, nor a torn last line.

        `tracker` gets what it lacks of the records kept, and every record that is written.
        """
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= keep_through]
        disk.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._waiting, self._tracker = "", tracker
        if tracker is not None:
            tracker.begin(kept)
        self.last_tokens = max((record.get("num_tokens", 0) for record in kept), default=0)
        self.evaluated = {record["step"] for record in kept if "eval_loss" in record}
        self.kept = kept

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line. On a full disk lines wait here, and go with the next one that can be written."""
        if self._tracker is not None:
            self._tracker.record(record)
        self._waiting += json.dumps({"schema": SCHEMA, **record}) + "\n"
        with contextlib.suppress(DiskError):
            disk.append_text(self.path, self._waiting)  # a checkpoint must not be ahead of its steps after a power cut
            self._waiting = ""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics file."""
    return disk.read_lines(path)
