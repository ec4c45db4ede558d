"""Items of a stage as they may end: what tests/scripts/test_gpu_proof.py hands to the runner of scripts/gpu_proof."""

import os
import time
from pathlib import Path
from typing import Any

from benchmarks.proof.items import Failed, NotApplicable
from qdpo import errors


def count(job: dict[str, Any]) -> dict[str, Any]:
    """Answers how often it was asked."""
    path = Path(job["file"])
    path.write_text((path.read_text() if path.exists() else "") + "x")
    return {"calls": len(path.read_text())}


def slow(job: dict[str, Any]) -> dict[str, Any]:
    time.sleep(job["seconds"])
    return count(job)


def linger(job: dict[str, Any]) -> dict[str, Any]:
    Path(job["file"]).write_text(str(os.getpid()))
    time.sleep(60)
    return {}


def crash(job: dict[str, Any]) -> dict[str, Any]:
    count(job)
    os.abort()


def out_of_memory(job: dict[str, Any]) -> dict[str, Any]:
    count(job)
    raise errors.OutOfMemoryError("This does not fit.\nMore about it.")


def wrong(job: dict[str, Any]) -> dict[str, Any]:
    count(job)
    raise Failed("It is wrong.", {"by": 2})


def not_here(job: dict[str, Any]) -> dict[str, Any]:
    count(job)
    raise NotApplicable("not on a CPU")
