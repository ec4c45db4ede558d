"""Runs cases, each in a process of its own that is forked from this one, and judges what came of them.

This process imports what the cases need and computes nothing: a pool of threads would not survive a fork. Each case has
a supervisor, also forked, which makes the inputs in one process, runs qdpo in a second one, watches its time and
memory, and leaves an Outcome. Files of a case: NNN/ is its working directory, NNN.txt its terminal.
"""

import contextlib
import importlib
import itertools
import json
import os
import pkgutil
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tests.faults.base import Case, Good, SkippedError

LIMIT_S = 60.0
ROOM_BYTES = 2 << 30
REFUSALS = {2, 3, 5, 6, 7, 9}
NOT_FINITE_CODE = 4
DRAWN = 600
SKIP, BROKEN = 77, 78
POLL_S = 0.02
WORDS = "words.json"
Entry = Callable[[], None]


@dataclass(frozen=True)
class Limits:
    """What a case may use."""

    seconds: float = LIMIT_S
    bytes: int = 4 << 30


@dataclass(frozen=True)
class Outcome:
    """What came of a case; `wrong` is empty if that is right."""

    kind: str
    name: str
    wrong: str
    skipped: str = ""
    last_line: str = ""
    exit_code: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


def kinds() -> dict[str, Callable[[random.Random, Good], Iterator[Case]]]:
    """Every module of this package with a function `cases`, by its name."""
    package = Path(__file__).parent
    names = sorted(found.name for found in pkgutil.iter_modules([str(package)]))
    modules = {
        name: importlib.import_module(f"tests.faults.{name}")
        for name in names
        if not name.startswith(("test_", "base"))
    }
    return {name: module.cases for name, module in modules.items() if hasattr(module, "cases")}


def draw(kind: str, good: Good, *, seed: int, each: int) -> list[Case]:
    """`each` of a kind's cases, by chance; two kinds of the same seed draw independently."""
    rng = random.Random(f"{seed} {kind}")
    found = list({case.name: case for case in itertools.islice(kinds()[kind](rng, good), DRAWN)}.values())
    chosen = sorted(rng.sample(range(len(found)), min(each, len(found))))
    return [found[place] for place in chosen]


def run_cases(
    cases: Sequence[Case], folder: Path, *, limits: Limits, adapter: bytes, jobs: int, entry: Entry, keep: bool = False
) -> Iterator[Outcome]:
    """Runs the cases, `jobs` at a time, in folders below `folder`; folders of right cases are removed."""
    waiting, active = list(enumerate(cases)), dict[int, tuple[Case, Path]]()
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                number, case = waiting.pop(0)
                place = folder / f"{number:03d}"
                pid = _fork(lambda case=case, place=place: _supervise(case, place, limits, adapter, entry))
                active[pid] = (case, place)
            for pid in list(active):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    case, place = active.pop(pid)
                    outcome = _left(case, place)
                    if not outcome.wrong and not keep:
                        shutil.rmtree(place, ignore_errors=True)
                        place.with_suffix(".txt").unlink(missing_ok=True)
                    yield outcome
            time.sleep(POLL_S)
    finally:
        for pid in active:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
                os.waitpid(pid, 0)


def run_case(case: Case, place: Path, *, limits: Limits, adapter: bytes, entry: Entry) -> Outcome:
    """One case in `place`, which is kept."""
    cases = run_cases(
        [case], place.parent / f"{place.name}.case", limits=limits, adapter=adapter, jobs=1, entry=entry, keep=True
    )
    outcome = next(cases)
    for _ in cases:
        pass
    (place.parent / f"{place.name}.case" / "000").rename(place)
    return outcome


def _left(case: Case, place: Path) -> Outcome:
    try:
        return Outcome(**json.loads(place.with_suffix(".json").read_text()))
    except (OSError, ValueError) as error:
        return Outcome(case.kind, case.name, f"its supervisor left no outcome: {error}")


def _fork(act: Callable[[], int | None]) -> int:
    """Runs `act` in a new process; returns the process's id here, and never returns there."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = BROKEN
    try:
        code = act() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _supervise(case: Case, place: Path, limits: Limits, adapter: bytes, entry: Entry) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    place.mkdir(parents=True)
    terminal = place.with_suffix(".txt")
    making = _watch(_fork(lambda: _make(case, place, terminal)), Limits(limits.seconds, 64 << 30))
    if making.code != 0 or making.end:
        outcome = Outcome(case.kind, case.name, f"its inputs cannot be made: {making.end or making.code}")
    else:
        ended = _watch(_fork(lambda: _run(case, place, terminal, entry)), limits)
        outcome = _judge(case, place, ended, terminal, adapter)
    place.with_suffix(".json").write_text(json.dumps(asdict(outcome)))


def _make(case: Case, place: Path, terminal: Path) -> None:
    _alone(terminal)
    words = case.make(place)
    place.with_suffix(".words").write_text(json.dumps(words))


def _run(case: Case, place: Path, terminal: Path, entry: Entry) -> int:
    """qdpo's command line in the case's folder; returns its exit code."""
    words = json.loads(place.with_suffix(".words").read_text())
    _alone(terminal, case.typed)
    home = place / "home"
    home.mkdir(exist_ok=True)
    os.chdir(place)
    os.environ |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "TMPDIR": str(home)}
    sys.argv = ["qdpo", *words]
    print("$ qdpo", *(ascii(word)[1:-1] for word in words), flush=True)
    try:
        with case.around(place) if case.around else contextlib.nullcontext():
            entry()
    except SkippedError as why:
        print(f"skipped: {why}")
        return SKIP
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _alone(terminal: Path, typed: str = "") -> None:
    """A process group of its own; what it prints goes to `terminal`, and it reads `typed`."""
    os.setsid()
    out = os.open(terminal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    # A file and no pipe: it is read from a process that is forked away.
    source = terminal.with_suffix(".in")
    source.write_text(typed, encoding="utf-8")
    os.dup2(os.open(source, os.O_RDONLY), 0)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1, errors="backslashreplace")


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, negative for a signal, or the limit that it crossed."""

    code: int
    end: str
    seconds: float
    peak_bytes: int


def _watch(pid: int, limits: Limits) -> Ended:
    """Waits for a process; ends it and its group where it takes too long or too much memory."""
    begun, peak, end = time.monotonic(), 0, ""
    try:
        while True:
            done, status, used = os.wait4(pid, os.WNOHANG)
            seconds = time.monotonic() - begun
            if done:
                peak = max(peak, used.ru_maxrss << 10)
                if not end and peak > limits.bytes:
                    end = f"took {peak / 2**30:.2f} GiB of memory, {limits.bytes / 2**30:.2f} are allowed"
                return Ended(os.waitstatus_to_exitcode(status), end, seconds, peak)
            peak = max(peak, _resident(pid))
            if not end and (seconds > limits.seconds or peak > limits.bytes):
                end = (
                    f"took over {limits.seconds:g} s"
                    if seconds > limits.seconds
                    else (f"took {peak / 2**30:.2f} GiB of memory, {limits.bytes / 2**30:.2f} are allowed")
                )
                _kill(pid)
            time.sleep(POLL_S)
    finally:
        _kill(pid)


def _kill(pid: int) -> None:
    """Ends the group that the process made for itself, and the process."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _resident(pid: int) -> int:
    """Bytes of a process and of those that it started."""
    total = 0
    with contextlib.suppress(psutil.Error):
        whole = psutil.Process(pid)
        for process in (whole, *whole.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def _judge(case: Case, place: Path, ended: Ended, terminal: Path, adapter: bytes) -> Outcome:
    text = terminal.read_bytes().decode("utf-8", "replace")
    lines = [line for line in text.splitlines() if line.strip()]
    wrong = "" if ended.code == SKIP else _wrong(case, place, ended, text, adapter)
    return Outcome(
        case.kind, case.name, wrong, skipped=lines[-1] if ended.code == SKIP else "",
        last_line=lines[-1] if lines else "", exit_code=ended.code, seconds=ended.seconds, peak_bytes=ended.peak_bytes,
    )  # fmt: skip


def _wrong(case: Case, place: Path, ended: Ended, text: str, adapter: bytes) -> str:
    """What is wrong with how a case ended, or nothing."""
    if ended.end:
        return ended.end
    if ended.code < 0:
        return f"ended by {signal.Signals(-ended.code).name}"
    if "Traceback (most recent call last)" in text:
        return f"a traceback on the terminal, exit code {ended.code}"
    if "bug in qdpo" in text or ended.code == 1:
        return f"called a bug, exit code {ended.code}"
    if "\x1b" in text:
        return "a control code on the terminal"
    if ended.code in REFUSALS:
        if "refused" not in case.right:
            return f"refused with exit code {ended.code}"
        lacks = case.near is not None and case.near not in " ".join(text.split())
        return f"the refusal does not name {case.near!r}" if lacks and case.near not in text else ""
    if ended.code == NOT_FINITE_CODE and "not finite" in case.right:
        return ""
    if ended.code != 0:
        return f"exit code {ended.code}"
    if "done" in case.right:
        return ""
    if "same" not in case.right:
        return "taken: exit code 0"
    made = place / case.adapter
    if not made.is_file():
        return f"exit code 0 without {case.adapter}"
    return "" if made.read_bytes() == adapter else "taken, and another adapter came out"
