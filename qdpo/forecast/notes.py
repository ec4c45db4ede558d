"""Notes of a plan: settings and layers that its forecast does not count as they are. No torch."""

from qdpo.families.kernels import KERNELS, is_installed
from qdpo.families.shapes import AnyShape
from qdpo.families.traced import TracedShape
from qdpo.settings.schema import AdapterConfig

ALL_LINEAR = AdapterConfig().targets


def notes(adapter: AdapterConfig, shape: AnyShape, *, timed: bool) -> list[str]:
    """Lines that a reader of a forecast needs; `timed` if it holds a time on a card."""
    found = []
    if adapter.targets != ALL_LINEAR and adapter.start is None:
        found.append(
            f"adapter.targets={','.join(adapter.targets)}: adapter, optimizer and kept layers are forecast as for "
            f"{','.join(ALL_LINEAR)}, which is more where fewer layers are adapted"
        )
    if timed and isinstance(shape, TracedShape) and shape.states:
        found.append(_slower())
    return found


def _slower() -> str:
    """Layers that carry a state from token to token have kernels of their own."""
    missing = [about.name for package, about in KERNELS.items() if not is_installed(package)]
    here = f"not installed here: {', '.join(missing)}" if missing else "all are installed here"
    return (
        "time: supposes the GPU kernels for layers other than attention that this model would use; without them it "
        f"takes longer, by how much is not measured ({here})"
    )
