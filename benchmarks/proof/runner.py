"""Runs the items of a stage within its time, each in a process of its own, and keeps each result at once."""

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.proof.items import CRASHED, NOT_APPLICABLE, OK, TIMED_OUT, Item, Options, Result
from benchmarks.proof.records import Records
from benchmarks.rounds import ENVIRONMENT, ROOT

Say = Callable[[str], None]
# A result of the same commit that another try may change.
RETRIED = frozenset({"out of memory", "failed", CRASHED, TIMED_OUT, "not measured"})


@dataclass(frozen=True)
class Answer:
    """What became of a process."""

    status: str
    values: dict[str, Any]
    said: str


def run_stage(
    items: Iterator[Item], options: Options, records: Records, about: dict[str, Any], *, budget_s: float, retry: bool,
    say: Say,
) -> list[str]:  # fmt: skip
    """Measures what this commit lacks. Returns the names of items that are left for another call."""
    end = time.monotonic() + budget_s
    left = []
    for item in items:
        known = records.now(item.stage, item.name)
        if known is not None and not (retry and known.status in RETRIED):
            continue
        room = end - time.monotonic()
        whole = room > budget_s - 1
        if room < item.expected_s and not whole:
            left.append(item.name)
            continue
        begun = time.monotonic()
        answer = run_process(item, min(item.limit_s, room))
        if answer is None and room < item.limit_s and not whole:
            left.append(item.name)  # it had less time than it may take: no result
            continue
        answer = answer or Answer(TIMED_OUT, {}, f"no answer within {min(item.limit_s, room):.0f} s")
        result = Result(
            item.stage, item.name, records.commit, datetime.datetime.now(datetime.UTC).date().isoformat(),
            about["device"], options.cuda, options.tiny, answer.status, round(time.monotonic() - begun, 1),
            answer.values, answer.said,
        )  # fmt: skip
        records.add(result, about)
        why = "" if result.status in (OK, NOT_APPLICABLE) else f": {result.said[:160]}"
        say(f"{item.name}: {result.status} in {result.seconds:.0f} s{why}")
    return left


def run_process(item: Item, limit_s: float) -> Answer | None:
    """The item's answer; None if the time was up. Everything that it started is ended with it."""
    job = json.dumps({"module": item.module, "function": item.function, "job": item.job})
    with (
        tempfile.TemporaryDirectory(prefix="qdpo-proof-") as work,
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
    ):
        with subprocess.Popen(
            [sys.executable, "-m", "benchmarks.proof.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log, text=True, cwd=ROOT, env={**os.environ, **ENVIRONMENT, "TMPDIR": work}, start_new_session=True,
        ) as process:  # fmt: skip
            try:
                answer, _ = process.communicate(job + "\n", timeout=limit_s)
            except subprocess.TimeoutExpired:
                return None
            finally:
                _end(process)
        if answer.strip():
            return Answer(**json.loads(answer))
        log.seek(0)
        tail = " | ".join(log.read().strip().splitlines()[-4:])
        return Answer(CRASHED, {}, f"exit code {process.returncode}: {tail[-1200:]}")


def _end(process: "subprocess.Popen[str]") -> None:
    """Ends the process and all that it started, which are a session of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
