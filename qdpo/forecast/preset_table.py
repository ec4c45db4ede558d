"""The table of presets: the purpose of each, its forecast, and its measurements; no torch."""

import tomllib
from pathlib import Path
from typing import Any

from qdpo.forecast.memory import GIB
from qdpo.forecast.plan import make_plan
from qdpo.settings import layered


def preset_table(folder: Path | None = None) -> list[str]:
    """A line for each preset: card, longest pair, the rows and kept layers that `auto` chooses, and its peak.

    `folder` holds the presets' files whose figures are shown; default: those that ship.
    """
    rows = [("preset", "card", "longest pair", "rows", "layers kept", "forecast", "measured", "model")]
    for name in layered.preset_names():
        file = layered.preset_text(name) if folder is None else (folder / f"{name}.toml").read_text(encoding="utf-8")
        text = tomllib.loads(file)
        plan = make_plan(layered.resolve([f"preset={name}"]), gpu_gib=layered.card_gib(name) or 24, read_data=False)
        rows.append(
            (
                name, text["card"], f"{plan.known.lengths.longest:,}", f"{plan.chosen.tokens_per_row:,}",
                str(plan.chosen.run.kept_layers), f"{plan.chosen.peak / GIB:.1f} GiB",
                _measured(text.get("measured", {})), text["about"],
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _measured(figures: dict[str, Any]) -> str:
    """The measured peak with its GPU, memory cap, commit and date; "not yet" without a measurement."""
    if "peak_gib" not in figures:
        return "not yet"
    card = f" as {figures['limit_gib']:g} GiB" if "limit_gib" in figures else ""
    return f"{figures['peak_gib']} GiB ({figures['gpu']}{card}, {figures['commit']}, {figures['date']})"
