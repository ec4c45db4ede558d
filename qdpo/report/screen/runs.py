"""Lists runs with state and result, from the run folders alone."""

from pathlib import Path

from qdpo.errors import ConfigError, DiskError
from qdpo.report.accuracy import accuracy_text
from qdpo.run import disk
from qdpo.run.finished import FinishedRun, KnownRun, any_run
from qdpo.run.folder import RunDir


def run_lines(folder: Path) -> list[str]:
    """A table with one line a run of `folder`, newest last. Raises: ConfigError if there is no such folder."""
    if not folder.is_dir():
        raise ConfigError(f"No folder {str(folder)!r}, so there are no runs. `qdpo run preset=demo` makes one.")
    found = [RunDir(path) for path in folder.iterdir() if path.is_dir() and _is_run(RunDir(path))]
    rows = [("run", "state", "accuracy", "margin", "loss")]
    for run in sorted(found, key=_time):
        try:
            known = any_run(run.path)
        except (ConfigError, DiskError):
            rows.append((run.path.name, "damaged: a record cannot be read", "", "", ""))
            continue
        rows.append((run.path.name, _state(known), *_result(known)))
    if len(rows) == 1:
        return [f"{folder} has no runs yet."]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _is_run(run: RunDir) -> bool:
    return any(disk.is_there(path) for path in (run.record, run.prepared, run.checkpoints))


def _time(run: RunDir) -> float:
    return (run.record if disk.is_there(run.record) else run.path).lstat().st_mtime


def _state(known: KnownRun) -> str:
    if isinstance(known, FinishedRun):
        return "finished"
    if known.saved_step:
        return f"stopped, saved after step {known.saved_step} of {known.record.found.steps}"
    return "started, nothing trained yet"


def _result(known: KnownRun) -> tuple[str, str, str]:
    if not isinstance(known, FinishedRun):
        return "", "", ""
    before, after = known.result.before, known.result.after
    accuracy, margin = "rewards/accuracies", "rewards/margins"
    return (
        f"{before[accuracy]:.3f} → {accuracy_text(after[accuracy], known.record.data.held_out_pairs)}",
        f"{before[margin]:+.3f} → {after[margin]:+.3f}",
        f"{before['loss']:.4f} → {after['loss']:.4f}",
    )
