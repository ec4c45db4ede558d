"""metrics.jsonl as records."""

from pathlib import Path

from qdpo.diagnose.course import Record
from qdpo.run.lines import is_metric, read_lines


def read_metrics(path: Path) -> list[Record]:
    """All complete lines of a metrics file. Raises: DiskError that names a damaged line."""
    return [record_of(line) for line in read_lines(path, is_metric)]


def record_of(line: dict[str, float | None]) -> Record:
    """The line's record, without metrics that are null in the file because they were not finite."""
    return {name: value for name, value in line.items() if value is not None}
