"""What the proof measures, one item a process, and what is known of each: a result."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK, OUT_OF_MEMORY, FAILED, CRASHED = "ok", "out of memory", "failed", "crashed"
TIMED_OUT, NOT_APPLICABLE, NOT_MEASURED = "timed out", "not applicable", "not measured"


class NotApplicable(Exception):
    """An item that only a GPU can measure, asked for on a CPU."""


class NotMeasured(Exception):
    """Something is missing here, which the message names."""


class Failed(Exception):
    """It ran, and what it found is wrong; `values` say what."""

    def __init__(self, message: str, values: dict[str, Any]) -> None:
        super().__init__(message)
        self.values = values


@dataclass(frozen=True)
class Options:
    """How the proof runs. `tiny` takes shapes and lengths that a CPU can do in seconds: to try the script out."""

    device: str
    tiny: bool
    trl_python: str | None
    folder: Path
    """Where results are kept."""
    presets: Path
    readme: Path

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def job(self) -> dict[str, Any]:
        """What every job holds."""
        return {"device": self.device, "tiny": self.tiny}


@dataclass(frozen=True)
class Item:
    """One measurement in a process of its own: `function` of `module`, called with `job`."""

    stage: int
    name: str
    module: str
    function: str
    job: dict[str, Any]
    expected_s: float = 60.0
    """It is not begun with less than this left of the stage's time."""
    limit_s: float = 240.0
    """A process that had this long and has not answered is a result: it timed out."""


@dataclass(frozen=True)
class Result:
    """What an item found, on which commit and device; `values` are numbers where the status is "ok"."""

    stage: int
    item: str
    commit: str
    date: str
    device: str
    cuda: bool
    tiny: bool
    status: str
    seconds: float
    values: dict[str, Any] = field(default_factory=dict)
    said: str = ""
    """Why it is not "ok"."""


@dataclass(frozen=True)
class Verdict:
    """A goal, what was found, and whether it is met; None where it was not, or could not be, measured."""

    goal: str
    found: str
    met: bool | None
