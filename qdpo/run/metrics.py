"""metrics.jsonl as records."""

import math
from pathlib import Path

from qdpo.diagnose.course import Record
from qdpo.run.lines import MEASURED, is_metric, read_lines


def read_metrics(path: Path) -> list[Record]:
    """All complete lines of a metrics file. Raises: DiskError that names a damaged line."""
    return [record_of(line) for line in read_lines(path, is_metric)]


def record_of(line: dict[str, float | None]) -> Record:
    """The line's record, without metrics that are null in the file because they were not finite.

    Those that every record has are NaN instead.
    """
    always = {
        name: math.nan for name, value in line.items() if value is None and name.removeprefix("eval_") in MEASURED
    }
    return {name: value for name, value in line.items() if value is not None} | always
