"""The table of presets: what each is made for, its forecast, and what was measured; no torch."""

import tomllib

from qdpo import presets
from qdpo.measure.plan import make_plan
from qdpo.memory import GIB


def preset_table() -> list[str]:
    """A line for each preset: card, longest pair, rows and kept layers that `auto` finds, and its peak."""
    rows = [("preset", "card", "longest pair", "rows", "layers kept", "forecast", "measured", "model")]
    for name in presets.preset_names():
        text = tomllib.loads(presets.preset_text(name))
        plan = make_plan(presets.resolve([f"preset={name}"]), gpu_gib=presets.card_gib(name) or 24, read_data=False)
        peak = text.get("measured", {}).get("peak_gib")
        rows.append(
            (
                name, text["card"], f"{plan.known.lengths.longest:,}", f"{plan.chosen.tokens_per_row:,}",
                str(plan.chosen.run.kept_layers), f"{plan.chosen.peak / GIB:.1f} GiB",
                "not yet" if peak is None else f"{peak} GiB", text["about"],
            )
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
