"""Rows of the matrix and their cells, as benchmarks/families.json holds them. No torch: the pages are made from it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

COLUMNS = (
    "loads", "trains", "attention", "fast parts", "4 bit", "LoRA", "exact", "forecast", "merge", "served", "GGUF",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """`good` is None where it was not tried, or another program does it: `why` says so."""

    good: bool | None
    text: str
    why: str = ""


@dataclass
class Row:
    """What became of a family, column by column."""

    kind: str
    name: str
    model_type: str
    model: str = ""
    """The class that is trained."""
    commit: str = ""
    seconds: float = 0.0
    cells: dict[str, Cell] = field(default_factory=dict)
    bugs: list[str] = field(default_factory=list)
    """Commands that ended with exit code 1, a signal or a traceback."""

    @property
    def key(self) -> str:
        return f"{self.kind} {self.name}"


def read_rows(path: Path) -> dict[str, Row]:
    """Rows by name; none where there is no file yet."""
    if not path.exists():
        return {}
    found = [
        Row(**{**row, "cells": {name: Cell(**cell) for name, cell in row["cells"].items()}})
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]
    ]
    return {row.key: row for row in found}


def write_rows(path: Path, rows: list[Row], head: dict[str, Any]) -> None:
    """Writes a line for each row, below `head`: whole, or not at all."""
    lines = ",\n".join(json.dumps(asdict(row), ensure_ascii=False) for row in rows)
    begin = json.dumps(head, ensure_ascii=False, indent=1).removesuffix("\n}")
    part = path.with_name(f".{path.name}.part")
    part.write_text(f'{begin},\n "rows": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    part.replace(path)
