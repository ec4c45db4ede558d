"""Where an answer came from: the model that wrote it, as pairs that were collected with qdpo carry it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

COLUMNS = ("chosen_from", "rejected_from")
"""The columns of a pair that say it, one for each answer."""


@dataclass(frozen=True)
class Origin:
    """The model that wrote an answer. On-policy are the answers of the very model that is to be trained."""

    model: str
    """As model.path named it."""
    weights: str | None = None
    """Identity of the base's weights as they were loaded."""
    run: str | None = None
    """Name of the run, or end of the folder of adapter.start, whose adapter was on; None for the base."""
    adapter: str | None = None
    """SHA-256 of that adapter's weights."""
    edited: bool = False
    """True where a person rewrote the answer: then no model wrote it."""
    cut: bool = False
    """True where the answer ends at the length limit of its drawing, and not by itself."""

    @property
    def name(self) -> str:
        """For the reader."""
        return self.model if self.run is None else f"{self.model} with {self.run}"

    def is_of(self, policy: "Origin") -> bool:
        """Whether this model wrote the answer, as far as names tell: same base, same adapter, not edited."""
        return (self.model, self.adapter, self.edited) == (policy.model, policy.adapter, False)

    def to_json(self) -> dict[str, object]:
        """What is set, as plain values."""
        return {name: value for name, value in asdict(self).items() if value not in (None, False)}


Origins = tuple[Origin | None, Origin | None]
"""Of the chosen and the rejected answer."""


def origins_of(row: Mapping[str, Any]) -> Origins:
    """Where both answers of a row came from, as far as the row says."""
    chosen, rejected = (read_origin(row.get(column)) for column in COLUMNS)
    return chosen, rejected


def read_origin(cell: Any) -> Origin | None:
    """The origin that a cell holds; None for anything else, since a column of this name may be anyone's."""
    if not isinstance(cell, Mapping) or not isinstance(cell.get("model"), str):
        return None
    texts = {name: cell.get(name) for name in ("weights", "run", "adapter")}
    if not all(value is None or isinstance(value, str) for value in texts.values()):
        return None
    return Origin(cell["model"], **texts, edited=cell.get("edited") is True, cut=cell.get("cut") is True)
