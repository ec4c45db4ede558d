"""Output of `qdpo sweep`: a table of its runs, and sweep.json next to them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from qdpo.report.accuracy import accuracy_text
from qdpo.report.screen.console import Screen
from qdpo.run import disk
from qdpo.run.record import read_record

if TYPE_CHECKING:
    from qdpo.train.sweep import Ended

COLUMNS = {"accuracy": "rewards/accuracies", "margin": "rewards/margins", "loss": "loss"}


def write_sweep(folder: Path, ended: Sequence["Ended"]) -> Path:
    """Write sweep.json into `folder`, replacing an earlier sweep's; the run folders themselves have all the data."""
    path = folder / "sweep.json"
    disk.write_json(path, {"runs": [_row(one) for one in ended]})
    return path


def print_sweep(ended: Sequence["Ended"], path: Path) -> None:
    """Print a line for each run: differing settings, held-out figures, minutes of training, and state."""
    console = Screen()
    names = list(ended[0].planned.differs)
    table = Table(*names, *COLUMNS, "minutes", "run", title="sweep, on held-out pairs", title_justify="left")
    for one in ended:
        row = _row(one)
        figures = [
            accuracy_text(row[name], row["held_out_pairs"] if name == "accuracy" else None)
            if row[name] is not None
            else "–"
            for name in COLUMNS
        ]
        minutes = "–" if row["training_seconds"] is None else f"{row['training_seconds'] / 60:.1f}"
        state = one.planned.run.path.name if row["state"] == "finished" else row["state"]
        table.add_row(*(one.planned.differs[name] for name in names), *figures, minutes, state)
    console.print(table)
    console.print(f"{path}; `qdpo runs {path.parent}` lists the runs", markup=False)


def _row(one: "Ended") -> dict[str, Any]:
    result = one.result
    code = one.exit_code
    state = "finished" if result else "not started" if code is None else f"exit code {code}"
    after = {name: result.after[metric] if result else None for name, metric in COLUMNS.items()}
    return {
        "settings": one.planned.differs,
        "run": str(one.planned.run.path),
        "state": state,
        "exit_code": code,
        **after,
        "held_out_pairs": read_record(one.planned.run).data.held_out_pairs if result else None,
        "training_seconds": result.training_seconds if result else None,
    }
