"""The errors that a user may see, and the exit code of each.

QdpoError
├── ConfigError          2   a setting, a preset, a file name, a changed setting on resume
├── DataError            3   preference data that cannot be used
├── NonFiniteError       4   a loss or gradient that is NaN or infinite
├── OutOfMemoryError     5   the card or the host has too little memory
├── DiskError            6   no space, read-only, gone, damaged
├── VerificationError    7   a self-check failed: reference cache, adapter, export
├── StoppedByFinding     8   a finding named in train.stop_when, after saving
├── ServerError          9   a server, such as a judge's, gives no usable answer
├── Interrupted        130   Ctrl-C (130) or SIGTERM (143), after saving
└── ShapeError           1   a bug in qdpo: tensors whose shapes do not match

A message has three parts: the value and what is wrong with it, where it came from, and what to do next.
"""

from collections.abc import Sequence


class QdpoError(Exception):
    """Base class of all errors that a user may see; `exit_code` is the process's exit status."""

    exit_code = 1


class ConfigError(QdpoError):
    """One or more invalid settings, reported together."""

    exit_code = 2

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
            super().__init__(f"{len(self.problems)} problems with the settings:\n{lines}")


class DataError(QdpoError):
    """The preference data cannot be read, recognised or used."""

    exit_code = 3


class NonFiniteError(QdpoError):
    """A loss or a gradient norm is NaN or infinite; the adapter is as it was before the step."""

    exit_code = 4


class OutOfMemoryError(QdpoError):
    """The step does not fit in the device's memory."""

    exit_code = 5


class DiskError(QdpoError):
    """A file cannot be written (disk full, read-only, gone), or is not as qdpo wrote it."""

    exit_code = 6


class VerificationError(QdpoError):
    """A self-check failed, so the result cannot be trusted."""

    exit_code = 7


class StoppedByFinding(QdpoError):
    """A finding named in train.stop_when holds; everything needed to continue is on disk."""

    exit_code = 8


class ServerError(QdpoError):
    """A server that qdpo calls, such as a judge's, gave no usable answer after all retries."""

    exit_code = 9


class Interrupted(QdpoError):
    """The user or the system asked the run to stop; everything needed to continue is on disk."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class ShapeError(QdpoError):
    """A function received tensors whose shapes do not match: a bug in qdpo, not the user's mistake."""
