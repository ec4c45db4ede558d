"""The progress of a run: the part of a checkpoint that is not tensors."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Totals over all steps so far, across every start of the run."""

    step: int = 0
    """Steps done."""
    overflows: int = 0
    """Steps whose update was skipped: an fp16 gradient was not finite."""
    seconds: float = 0.0
    """Spent on steps."""
    peak_gib: float = 0.0
    """Peak of the device's memory."""

    def to_json(self) -> dict[str, float]:
        return asdict(self)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> "Progress":
        """Ignores the keys of a newer version; keys that an older version did not save get their defaults."""
        return cls(**{name: values[name] for name in cls.__dataclass_fields__ if name in values})
