"""What was done to the rows that were not taken as they are."""

from dataclasses import dataclass
from typing import Literal

from qdpo.data.read.files import Place

Action = Literal["dropped", "cut", "mended"]


@dataclass(frozen=True)
class RowNote:
    """What was done to a row, for the data report."""

    row: int
    action: Action
    reason: str
    detail: str
    source: str = ""
    place: Place | None = None


@dataclass(frozen=True)
class Where:
    """Which row of which source a note is about."""

    row: int
    source: str
    place: Place | None

    def note(self, action: Action, reason: str, detail: str) -> RowNote:
        """A note on this row."""
        return RowNote(self.row, action, reason, detail, self.source, self.place)
