"""`qdpo data check`: prepares data exactly as a run does, without a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.data import prepare
from qdpo.data.layouts.notes import RowNote
from qdpo.data.layouts.origin import Origin
from qdpo.data.report import DataReport, make_report, overlap_places, write_report
from qdpo.data.tokens import sieve
from qdpo.data.tokens.store import TokenPair
from qdpo.errors import DataError
from qdpo.run import disk
from qdpo.run.watcher import Watcher
from qdpo.settings.schema import RunConfig

SHOWN = 3


@dataclass(frozen=True)
class Checked:
    """The report, and some pairs to show with their tokenizer."""

    report: DataReport
    shown: list[TokenPair]
    tokenizer: Any


def check_data(config: RunConfig, tokenizer: Any, policy: Origin, watcher: Watcher, report_path: Path) -> Checked:
    """Read data.path as a run would, write the row report to `report_path`, and assess the data.

    `policy` is the model to be trained; on-policy answers are counted by its name.
    Raises: DataError if no pair is usable.
    """
    cache = disk.cache_folder(config.cache.dir)
    found = prepare.read_data(config.data, tokenizer, watcher, scratch=cache)
    notes, overlap = list(found.prepared.notes), None
    if config.data.eval_path or config.data.eval_split:
        held_out = prepare.read_held_out(config.data, tokenizer, watcher, scratch=cache)
        notes += held_out.prepared.notes
        overlap = len(overlap_places(found.prepared.pairs, held_out.prepared.pairs))
    _write(report_path, notes)
    pairs = found.prepared.pairs
    if not len(pairs):
        error = sieve.nothing_usable(found.prepared)
        raise DataError(f"{error} {report_path} lists every row.")
    report = make_report(
        found.prepared,
        found.layouts,
        found.sources,
        prepare.limits_of(config.data),
        max_drop_fraction=config.data.max_drop_fraction,
        overlap=overlap,
        policy=policy,
        template_notes=found.template_notes,
    )
    places = sorted({0, len(pairs) // 2, len(pairs) - 1})[:SHOWN]
    return Checked(report, [pairs[place] for place in places], tokenizer)


def _write(path: Path, notes: list[RowNote]) -> None:
    disk.write_text(path, "")
    write_report(path, notes)
