"""metrics.jsonl as records."""

from pathlib import Path

from qdpo.diagnose.course import Record
from qdpo.run import disk


def read_metrics(path: Path) -> list[Record]:
    """All complete lines of a metrics file."""
    return [record_of(line) for line in disk.read_lines(path)]


def record_of(line: dict[str, float | None]) -> Record:
    """The line's record, without metrics that are null in the file because they were not finite."""
    return {name: value for name, value in line.items() if value is not None}
