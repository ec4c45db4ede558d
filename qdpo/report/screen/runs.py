"""The list of runs: state and result, from the run folders alone."""

from pathlib import Path
from typing import Any

from qdpo.errors import ConfigError
from qdpo.run import disk
from qdpo.run.folder import RunDir


def run_lines(folder: Path) -> list[str]:
    """A table with one line a run of `folder`, newest last. Raises: ConfigError if there is no such folder."""
    if not folder.is_dir():
        raise ConfigError(f"No folder {str(folder)!r}, so there are no runs. `qdpo run preset=demo` makes one.")
    found = [RunDir(path) for path in folder.iterdir() if (path / "run.json").is_file()]
    rows = [("run", "state", "accuracy", "margin", "loss")]
    for run in sorted(found, key=lambda run: run.record.stat().st_mtime):
        rows.append((run.path.name, _state(run), *_result(run)))
    if len(rows) == 1:
        return [f"{folder} holds no runs yet."]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _state(run: RunDir) -> str:
    if run.result.exists():
        return "finished"
    steps = disk.read_json(run.record)["found"].get("train.steps")
    saved = sorted(path.name for path in run.checkpoints.glob("step-*")) if run.checkpoints.is_dir() else []
    if saved:
        return f"stopped, saved after step {int(saved[-1].removeprefix('step-'))} of {steps}"
    return "started, nothing trained yet"


def _result(run: RunDir) -> tuple[str, str, str]:
    if not run.result.exists():
        return "", "", ""
    result: dict[str, Any] = disk.read_json(run.result)
    before, after = result["before"], result["after"]
    accuracy, margin = "rewards/accuracies", "rewards/margins"
    return (
        f"{before[accuracy]:.3f} → {after[accuracy]:.3f}",
        f"{before[margin]:+.3f} → {after[margin]:+.3f}",
        f"{before['loss']:.4f} → {after['loss']:.4f}",
    )
