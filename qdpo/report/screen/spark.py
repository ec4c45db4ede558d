"""Draws a trend in one line of text."""

from collections.abc import Sequence

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int = 16) -> str:
    """The values as bars from lowest to highest; if there are more than `width` values, means of neighbours."""
    if not values:
        return ""
    parts = min(width, len(values))
    edges = [round(part * len(values) / parts) for part in range(parts + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    if high == low:
        return BARS[0] * parts
    return "".join(BARS[min(7, int(8 * (mean - low) / (high - low)))] for mean in means)
