"""Parts of a row, each in a process of its own that is forked from this one: a failure stops nothing else.

The process that forks imports what the parts need and computes nothing, so that no pool of threads is lost in a fork.
"""

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.errors import QdpoError

LIMIT_S = 900.0
POLL_S = 0.02


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it printed."""

    code: int
    text: str
    seconds: float
    found: Any = None
    """What a part returned, as JSON; None if it did not return."""

    @property
    def why(self) -> str:
        """The error as it was printed, on one line, without the folders of this machine."""
        lines = [line for line in self.text.splitlines() if line.strip()]
        starts = [number for number, line in enumerate(lines) if line.startswith("qdpo: ")]
        if self.code < 0:
            return f"ended by {signal.Signals(-self.code).name} after {self.seconds:.0f} s"
        said = lines[starts[-1] :] if starts else lines[-1:]
        return one_line(" ".join(said).removeprefix("qdpo: "))


def one_line(text: str) -> str:
    """A message without control codes and without the places of this machine."""
    return re.sub(r"(?<![\w.])(/[\w.+-]+)+/(?=[\w.+-]+)", "", " ".join(text.split()))


def part(act: Callable[[], Any], log: Path, limit_s: float = LIMIT_S) -> Ended:
    """Runs `act` in a process of its own; what it returns must be JSON."""
    result = log.with_suffix(".json")
    result.unlink(missing_ok=True)

    def run() -> int:
        try:
            found = act()
        except Exception as error:
            traceback.print_exc()
            kind = "" if isinstance(error, QdpoError) else f"{type(error).__name__}: "
            print(f"qdpo: {kind}{error}", flush=True)
            return 1
        result.write_text(json.dumps(found), encoding="utf-8")
        return 0

    ended = _forked(run, log, limit_s)
    found = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else None
    return Ended(ended.code, ended.text, ended.seconds, found)


def qdpo(words: Sequence[str], place: Path, log: Path, limit_s: float = LIMIT_S) -> Ended:
    """The command line with these words, in the folder `place`."""

    def run() -> int:
        from qdpo.cli.main import main

        os.chdir(place)
        home = place / "home"
        home.mkdir(exist_ok=True)
        os.environ |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache"), "TMPDIR": str(home)}
        sys.argv = ["qdpo", *words]
        print("$ qdpo", *words, flush=True)
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0)
        return 0

    return _forked(run, log, limit_s)


def _forked(run: Callable[[], int], log: Path, limit_s: float) -> Ended:
    sys.stdout.flush()
    sys.stderr.flush()
    begun = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _alone(run, log)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() - begun > limit_s:
            os.killpg(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    text = log.read_bytes().decode("utf-8", "replace")
    return Ended(os.waitstatus_to_exitcode(status), text, time.monotonic() - begun)


def _alone(run: Callable[[], int], log: Path) -> None:
    """Runs and never returns: a process group of its own, whose terminal is the file `log`."""
    code = 70
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin = open(0, encoding="utf-8", closefd=False)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False, buffering=1)
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1, errors="backslashreplace")
        code = run()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
