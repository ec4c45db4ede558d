"""Notes of a plan: settings and layers that its forecast does not count as they are. No torch."""

from qdpo.families.kernels import KERNELS, is_installed
from qdpo.families.shapes import AnyShape
from qdpo.families.traced import TracedShape
from qdpo.settings.schema import AdapterConfig

ALL_LINEAR = AdapterConfig().targets


def notes(adapter: AdapterConfig, shape: AnyShape, *, timed: bool) -> list[str]:
    """Facts that a reader of a forecast must know; `timed` if it holds a time on a card."""
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
    """Words for models whose rows cannot share a prompt: their layers have kernels of their own, if installed."""
    names = ", ".join(about.name for about in KERNELS.values())
    missing = [about.name for package, about in KERNELS.items() if not is_installed(package)]
    here = f"; not installed here: {', '.join(missing)}" if 0 < len(missing) < len(KERNELS) else ""
    here = "; none of them is installed here" if len(missing) == len(KERNELS) else here
    return (
        f"kernels: the time counts layers other than attention as if kernels computed them ({names}{here}). Without "
        "those that this model calls it takes longer, by a factor not yet measured; `qdpo doctor` explains"
    )
