"""metrics.jsonl as records."""

from pathlib import Path

from qdpo.diagnose.course import Record
from qdpo.run import disk


def read_metrics(path: Path) -> list[Record]:
    """All whole lines of a metrics file."""
    return [record_of(line) for line in disk.read_lines(path)]


def record_of(line: dict[str, float | None]) -> Record:
    """A metric that is null in the file, since it was not finite, is left out."""
    return {name: value for name, value in line.items() if value is not None}
