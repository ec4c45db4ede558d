"""Writes a run's metrics.jsonl."""

import contextlib
import json
import math
from pathlib import Path

from qdpo.diagnose.course import Record
from qdpo.errors import DiskError
from qdpo.run import disk
from qdpo.run.lines import is_metric, mend_lines
from qdpo.run.metrics import record_of
from qdpo.run.watcher import Say
from qdpo.train.watch.tracker import Tracker

SCHEMA = 1


class Metrics:
    """The run's metrics.jsonl: one JSON object per line, flushed on every write."""

    def __init__(
        self, path: Path, *, keep_through: int, tracker: Tracker | None = None, say: Say = lambda line: None
    ):  # fmt: skip
        """Opens the file for appending, dropping records after step `keep_through` and a partial last line.

        `tracker` receives the kept records that it lacks, and every record written. Damaged lines are set aside.
        """
        self.path = path
        sound = mend_lines(path, is_metric, say, due=keep_through > 0)
        lines = [line for line in sound if line["step"] <= keep_through]
        disk.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        kept = [record_of(line) for line in lines]
        self._waiting, self._tracker = "", tracker
        if tracker is not None:
            tracker.begin(kept)
        self.last_tokens = int(max((record.get("num_tokens", 0) for record in kept), default=0))
        self.evaluated = {record["step"] for record in kept if "eval_loss" in record}
        self.kept = kept

    def write(self, record: Record) -> None:
        """Appends a line. On a full disk, lines wait in memory and are written with the next one."""
        if self._tracker is not None:
            self._tracker.record(record)
        self._waiting += _line({"schema": SCHEMA, **record})
        with contextlib.suppress(DiskError):
            self.flush()

    def flush(self) -> None:
        """Appends the lines that wait. Called before a checkpoint, which must not be ahead of its steps.

        Raises: DiskError.
        """
        if self._waiting:
            disk.append_text(self.path, self._waiting)
            self._waiting = ""


def _line(record: Record) -> str:
    """JSON with null for numbers that are not finite."""
    return json.dumps({name: value if math.isfinite(value) else None for name, value in record.items()}) + "\n"
