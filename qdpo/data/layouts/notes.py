"""Notes on rows that were dropped, cut or mended."""

from dataclasses import dataclass
from typing import Literal

from qdpo.data.read.files import Place

Action = Literal["dropped", "cut", "mended"]


@dataclass(frozen=True)
class RowNote:
    """A note on what was done to a row, for the data report."""

    row: int
    action: Action
    reason: str
    detail: str
    source: str = ""
    place: Place | None = None


@dataclass(frozen=True)
class Where:
    """The row, and its source, that a note is about."""

    row: int
    source: str
    place: Place | None

    def note(self, action: Action, reason: str, detail: str) -> RowNote:
        """A note on this row."""
        return RowNote(self.row, action, reason, detail, self.source, self.place)
