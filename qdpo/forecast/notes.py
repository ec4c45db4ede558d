"""Notes of a plan: settings and layers that its forecast does not count as they are. No torch."""

from qdpo.families.kernels import KERNELS, is_installed
from qdpo.families.shapes import AnyShape
from qdpo.families.traced import TracedShape
from qdpo.settings.schema import AdapterConfig

ALL_LINEAR = AdapterConfig().targets


def notes(adapter: AdapterConfig, shape: AnyShape, *, timed: bool) -> list[str]:
    """What a reader must know of a forecast; `timed` if it holds a time on a card."""
    found = []
    if adapter.targets != ALL_LINEAR and adapter.start is None:
        found.append(
            f"adapter.targets={','.join(adapter.targets)}: adapter, optimizer and kept layers are forecast as for "
            f"{','.join(ALL_LINEAR)}, which is more where fewer layers are adapted"
        )
    if timed and isinstance(shape, TracedShape) and not shape.shared:
        found.append(_slower())
    return found


def _slower() -> str:
    """Where rows cannot share a prompt, layers are no attention: they have kernels of their own, if installed."""
    names = ", ".join(about.name for about in KERNELS.values())
    missing = ", ".join(about.name for package, about in KERNELS.items() if not is_installed(package))
    here = f" (not installed here: {missing})" if missing else ""
    return (
        f"time    is counted as if kernels computed every layer: those that are no attention need {names}{here}, as "
        "`qdpo doctor` explains. Without those that this model calls it takes longer, by a factor not yet measured"
    )
