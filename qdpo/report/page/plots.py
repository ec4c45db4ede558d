"""Draws curves and distributions as SVG that takes its colours from the page, light or dark.

matplotlib draws with placeholder colours, which are then replaced by CSS variables. No text of users is drawn.
"""

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qdpo.errors import ConfigError

WIDTH_IN, HEIGHT_IN = 5.2, 2.5
MOST_POINTS = 400
# Placeholder colours, which nothing else would use; the page's CSS variables replace them.
INK, FAINT = "#010203", "#010204"
NAMES = ("chosen", "rejected", "train", "held", "run-0", "run-1", "run-2", "run-3", "run-4", "run-5")
COLOURS = {name: f"#0102{place + 16:02x}" for place, name in enumerate(NAMES)}


@dataclass(frozen=True)
class Line:
    """Points in one colour: a curve, or evaluations as dots joined by a thin line."""

    x: Sequence[float]
    y: Sequence[float | None]
    colour: str
    """One of NAMES."""
    dots: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture of the page."""

    title: str
    unit: str
    lines: list[Line]
    legend: list[tuple[str, str]] = field(default_factory=list)
    """(colour name, label)."""
    level: float | None = None
    """A value to mark with a line, such as 0."""
    band: float = 0.0
    """Half the height of a band around that line."""
    logarithmic: bool = False
    """True if the axis may be logarithmic, depending on the values."""
    help: str = ""
    """The metric that `qdpo metrics` explains."""


@dataclass(frozen=True)
class Histogram:
    """Several distributions on one axis."""

    title: str
    unit: str
    values: Mapping[str, Sequence[float]]
    """Colour name → values."""
    legend: list[tuple[str, str]]
    level: float | None = 0.0


def draw_panel(panel: Panel) -> str:
    """The panel as an <svg> element. Raises: ConfigError if matplotlib is not installed."""
    figure, axes = _axes()
    from matplotlib import ticker

    for line in panel.lines:
        x, y = _thinned(line.x, line.y)
        colour = COLOURS[line.colour]
        if line.dots:
            axes.plot(x, y, color=colour, linewidth=1.1, linestyle=(0, (5, 3)), alpha=0.8, zorder=4)
            axes.plot(x, y, color=colour, linestyle="none", marker="o", markersize=5, zorder=5)
        else:
            axes.plot(x, y, color=colour, linewidth=1.7, zorder=3)
    if panel.level is not None:
        axes.axhline(panel.level, color=INK, linewidth=0.8, linestyle=(0, (1, 2)), zorder=2)
        if panel.band:
            axes.axhspan(panel.level - panel.band, panel.level + panel.band, color=INK, alpha=0.1, lw=0, zorder=1)
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(numticks=6))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(_number))
    axes.set_xlabel("step")
    return _svg(figure, panel.title)


def draw_histogram(histogram: Histogram) -> str:
    """The distributions as an <svg> element."""
    figure, axes = _axes()
    everything = [value for values in histogram.values.values() for value in values]
    low, high = min(everything), max(everything)
    bins = min(30, max(6, 2 * math.isqrt(len(everything))))
    edges = [low + (high - low or 1.0) * place / bins for place in range(bins + 1)]
    for name, values in histogram.values.items():
        axes.hist(
            values, bins=edges, color=COLOURS[name], alpha=0.45, histtype="stepfilled", edgecolor=COLOURS[name], lw=1.2
        )
    if histogram.level is not None:
        axes.axvline(histogram.level, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.set_xlabel(histogram.unit)
    axes.yaxis.get_major_locator().set_params(integer=True)
    return _svg(figure, histogram.title)


def _axes() -> tuple[Any, Any]:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "The report's curves need matplotlib, which is not installed. Run `pip install 'qdpo[report]'`."
        ) from error
    matplotlib.rcParams.update({"svg.fonttype": "none", "path.simplify": True, "text.parse_math": False})
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=11, length=0, pad=5)
    axes.xaxis.label.set(color=INK, fontsize=11)
    axes.margins(x=0.02)
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=7)
    return figure, axes


def _number(value: float, _place: int) -> str:
    """Label of a tick; very small and very large values in scientific notation, which is easier to read."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "−")
    return f"{value:g}".replace("-", "−")


def _svg(figure: Any, title: str) -> str:
    """The figure as SVG, without document head, fixed size, identifiers of groups and fixed colours."""
    import matplotlib

    # Identifiers are hashes: a salt for each figure makes them unique on the page, and the page reproducible.
    matplotlib.rcParams["svg.hashsalt"] = title
    content = io.StringIO()
    figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    for attribute in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {attribute}="[^"]*"', r"\1", text, count=1)
    for colour, meant in ((INK, "var(--soft)"), (FAINT, "var(--line)")):
        text = text.replace(colour, meant)
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)


def _thinned(x: Sequence[float], y: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """The known points, thinned to as many as can be told apart."""
    known = [(a, b) for a, b in zip(x, y, strict=True) if b is not None and math.isfinite(b)]
    every = max(1, math.ceil(len(known) / MOST_POINTS))
    kept = known[::every] + (known[-1:] if every > 1 else [])
    return [a for a, _ in kept], [b for _, b in kept]
