"""The origin of an answer: the model that wrote it, as recorded in pairs that were collected with qdpo."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

COLUMNS = ("chosen_from", "rejected_from")
"""The columns of a pair that hold the origins, one for each answer."""


@dataclass(frozen=True)
class Origin:
    """The model that wrote an answer. An answer is on-policy if the model to be trained wrote it."""

    model: str
    """The model's name, as in model.path."""
    weights: str | None = None
    """Checksum of the base's weights as loaded."""
    run: str | None = None
    """Name of the run, or end of the folder of adapter.start, whose adapter was used; None for the base."""
    adapter: str | None = None
    """SHA-256 of that adapter's weights."""
    edited: bool = False
    """True if a person rewrote the answer, so no model wrote it."""
    cut: bool = False
    """True if the answer was cut at the length limit when it was drawn."""

    @property
    def name(self) -> str:
        """The model's name for the user, with its run if there is one."""
        return self.model if self.run is None else f"{self.model} with {self.run}"

    def is_of(self, policy: "Origin") -> bool:
        """True if `policy` wrote the answer, as far as names tell: same base, same adapter, not edited."""
        return (self.model, self.adapter, self.edited) == (policy.model, policy.adapter, False)

    def to_json(self) -> dict[str, object]:
        """The fields that are set, as plain values."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}


Origins = tuple[Origin | None, Origin | None]
"""Origins of the chosen and the rejected answer."""


def origins_of(row: Mapping[str, Any]) -> Origins:
    """Origins of both answers of a row, as far as the row says."""
    chosen, rejected = (read_origin(row.get(column)) for column in COLUMNS)
    return chosen, rejected


def read_origin(cell: Any) -> Origin | None:
    """The origin in a cell; None for anything else, since other data sets may use these column names too."""
    if not isinstance(cell, Mapping) or not isinstance(cell.get("model"), str):
        return None
    texts = {name: cell.get(name) for name in ("weights", "run", "adapter")}
    if not all(value is None or isinstance(value, str) for value in texts.values()):
        return None
    return Origin(cell["model"], **texts, edited=cell.get("edited") is True, cut=cell.get("cut") is True)
