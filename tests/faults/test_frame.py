"""The generator of faulty inputs itself: that each way to be wrong is seen, and what is right is not called wrong."""

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.faults.base import ADAPTER, DONE, REFUSED, SAME, Case, SkippedError
from tests.faults.runner import Limits, Outcome, run_case

HASTY = Limits(seconds=1.0, bytes=8 << 30)
# Other tests leave pools of threads in this process; the forked ones run Python alone.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


def end(code: int, *said: str, adapter: bytes | None = None) -> Callable[[], None]:
    """A command line that prints, writes an adapter, and ends."""

    def act() -> None:
        print(*said, file=sys.stderr)
        if adapter is not None:
            Path(ADAPTER).parent.mkdir(parents=True)
            Path(ADAPTER).write_bytes(adapter)
        sys.exit(code)

    return act


def crash() -> None:
    raise ValueError("odd")


def hang() -> None:
    time.sleep(600)


def hang_in_a_child() -> None:
    if os.fork() == 0:
        hang()
    hang()


def eat() -> None:
    held = []
    while True:
        held.append(b"x" * (64 << 20))


def fall() -> None:
    faulthandler.disable()
    os.kill(os.getpid(), signal.SIGSEGV)


def outcome(tmp_path: Path, entry: Callable[[], None], right: frozenset[str], near: str | None = None) -> Outcome:
    case = Case("frame", "a case", lambda place: ["run"], right, near)
    limits = (
        HASTY if entry in (hang, hang_in_a_child) else Limits(bytes=psutil.Process().memory_info().rss + (256 << 20))
    )
    return run_case(case, tmp_path / "case", limits=limits, adapter=b"sound", entry=entry)


@pytest.mark.parametrize(
    ("entry", "right", "near", "wrong"),
    [
        (crash, REFUSED, None, "traceback"),
        (hang, REFUSED, None, "took over 1 s"),
        (hang_in_a_child, REFUSED, None, "took over 1 s"),
        (eat, REFUSED | DONE, None, "GiB of memory"),
        (fall, REFUSED, None, "SIGSEGV"),
        (end(1), REFUSED, None, "called a bug"),
        (end(2, "This is a bug in qdpo"), REFUSED, None, "called a bug"),
        (end(2, "x.json: \x1b[31mred"), REFUSED, None, "control code"),
        (end(2, "something is odd"), REFUSED, "x.json", "does not name 'x.json'"),
        (end(2, "x.json is odd"), DONE, None, "refused with exit code 2"),
        (end(130), REFUSED, None, "exit code 130"),
        (end(0), REFUSED, None, "taken"),
        (end(0, adapter=b"other"), SAME, None, "another adapter"),
        (end(0), SAME | REFUSED, None, "without runs/run"),
    ],
)
def test_each_way_to_be_wrong_is_seen(
    entry: Callable[[], None], right: frozenset[str], near: str | None, wrong: str, tmp_path: Path
) -> None:
    assert wrong in outcome(tmp_path, entry, right, near).wrong


@pytest.mark.parametrize(
    ("entry", "right", "near"),
    [
        (end(2, "x.json is odd"), REFUSED, "x.json"),
        (end(3, "x.json\nis odd"), REFUSED | SAME, "x.json is odd"),
        (end(0, adapter=b"sound"), SAME, None),
        (end(0), DONE, None),
    ],
)
def test_what_is_right_is_not_called_wrong(
    entry: Callable[[], None], right: frozenset[str], near: str | None, tmp_path: Path
) -> None:
    assert outcome(tmp_path, entry, right, near).wrong == ""


def test_a_case_that_this_machine_cannot_set_up_is_neither(tmp_path: Path) -> None:
    @contextmanager
    def around(_: Path) -> Iterator[None]:
        raise SkippedError("no small disk can be mounted")
        yield

    case = Case("frame", "a case", lambda place: ["run"], REFUSED, around=around)
    found = run_case(case, tmp_path / "case", limits=HASTY, adapter=b"", entry=crash)
    assert (found.wrong, found.skipped) == ("", "skipped: no small disk can be mounted")


def test_inputs_that_cannot_be_made_are_no_right_case(tmp_path: Path) -> None:
    case = Case("frame", "a case", lambda place: [str(1 / 0)], REFUSED)
    assert "cannot be made" in run_case(case, tmp_path / "case", limits=HASTY, adapter=b"", entry=crash).wrong
