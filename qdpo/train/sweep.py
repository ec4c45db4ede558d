"""A sweep: one ordinary run for each combination of comma-separated values, one after another.

Imports nothing heavy. Each run is a separate process: it frees its memory when it ends, has its own peak, and can be
killed without ending the other runs.
"""

import hashlib
import itertools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.errors import ConfigError
from qdpo.run import identity
from qdpo.run.finished import is_finished
from qdpo.run.folder import RunDir
from qdpo.run.record import Result, read_result
from qdpo.settings import layered

STOPPED = (130, 143)


@dataclass(frozen=True)
class PlannedRun:
    """One combination: the command's arguments, the settings that distinguish it, and its run folder."""

    arguments: list[str]
    differs: dict[str, str]
    run: RunDir


@dataclass(frozen=True)
class Sweep:
    """All combinations, in the order of the command line; the last setting varies fastest."""

    folder: Path
    runs: list[PlannedRun]


@dataclass(frozen=True)
class Ended:
    """The outcome of one combination. `exit_code` is None if it was not started."""

    planned: PlannedRun
    exit_code: int | None

    @property
    def result(self) -> Result | None:
        """The contents of result.json, once the run is finished."""
        return read_result(self.planned.run) if self.exit_code == 0 and is_finished(self.planned.run) else None


def plan_sweep(arguments: list[str]) -> Sweep:
    """All combinations, resolved and checked before the first run starts.

    Raises: ConfigError with all problems; also if two combinations would be the same run, or nothing varies.
    """
    given = [(argument, layered.comma_values(argument)) for argument in arguments]
    varied = [argument.removeprefix("--").partition("=")[0] for argument, values in given if len(values) > 1]
    if not varied:
        raise ConfigError("Nothing to sweep: no setting has several values. Write them with commas: loss.beta=0.1,0.3.")
    runs: list[PlannedRun] = []
    problems: list[str] = []
    for words in itertools.product(*(values for _, values in given)):
        differs = dict(word.removeprefix("--").split("=", 1) for word in words if word.partition("=")[0] in varied)
        try:
            runs.append(_planned(list(words), differs))
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    problems += _same_runs(runs)
    if problems:
        raise ConfigError(problems)
    return Sweep(runs[0].run.path.parent, runs)


def _planned(words: list[str], differs: dict[str, str]) -> PlannedRun:
    resolved = layered.resolve(words)
    if resolved.config.output.name is not None:
        # One name for several runs: each gets the hex digits of a run without a name.
        settings = str(sorted(identity.trajectory_settings(resolved).items()))
        name = f"{resolved.config.output.name}-{hashlib.sha256(settings.encode()).hexdigest()[:6]}"
        words = [word for word in words if not word.removeprefix("--").startswith("output.name=")]
        words.append(f"output.name={name}")
        resolved = layered.resolve(words)
    return PlannedRun(words, differs, identity.run_folder(resolved))


def _same_runs(runs: list[PlannedRun]) -> Iterator[str]:
    seen: dict[Path, PlannedRun] = {}
    for planned in runs:
        first = seen.setdefault(planned.run.path, planned)
        if first is not planned:
            yield (
                f"{words_of(planned.differs)} and {words_of(first.differs)} would be the same run: the values are "
                "equal, or do not affect training."
            )


def run_sweep(sweep: Sweep, say: Callable[[str], None]) -> tuple[list[Ended], int]:
    """Runs the unfinished combinations in turn; returns each outcome, and one exit code: that of a stop, if any.

    After a failed run the others still run; after a stop they do not.
    """
    ended: list[Ended] = []
    with _passed_on() as stop:
        for number, planned in enumerate(sweep.runs, 1):
            if stop.code is not None:
                ended.append(Ended(planned, None))
                continue
            say(f"\nrun {number} of {len(sweep.runs)}: {words_of(planned.differs)} → {planned.run.path}")
            # -P: no file in the user's folder may shadow a library.
            stop.process = subprocess.Popen([sys.executable, "-P", "-m", "qdpo", "run", *planned.arguments])
            code = stop.process.wait()
            code = 128 - code if code < 0 else code
            if code in STOPPED:
                stop.code = code
            ended.append(Ended(planned, code))
    return ended, stop.code or max(one.exit_code or 0 for one in ended)


def words_of(differs: dict[str, str]) -> str:
    """The settings that differ, as typed on a command line."""
    return " ".join(f"{name}={value}" for name, value in differs.items())


@dataclass
class _Stop:
    code: int | None = None
    process: subprocess.Popen[bytes] | None = None


@contextmanager
def _passed_on() -> Iterator[_Stop]:
    """Makes a signal end the sweep after the current run, which saves first.

    A terminal sends Ctrl-C to the run as well; SIGTERM reaches only this process, and is passed on.
    """
    stop = _Stop()

    def note(number: int, _frame: Any) -> None:
        stop.code = 128 + number
        if number == signal.SIGTERM and stop.process is not None and stop.process.poll() is None:
            stop.process.send_signal(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
