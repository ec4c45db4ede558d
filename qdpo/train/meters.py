"""metrics.jsonl, and the memory that a device reports."""

import contextlib
import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch

from qdpo.errors import DiskError
from qdpo.run import disk
from qdpo.train.track import Tracker

SCHEMA = 1


class Metrics:
    """The run's metrics.jsonl: one JSON object a line, flushed as it is written."""

    def __init__(self, path: Path, *, keep_through: int, tracker: Tracker | None = None):
        """Opens the file for appending, without the records after step `keep_through`, nor a torn last line.

        `tracker` gets what it lacks of the records kept, and every record that is written.
        """
        self.path = path
        kept = [record for record in read_metrics(path) if record["step"] <= keep_through]
        disk.write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._waiting, self._tracker = "", tracker
        if tracker is not None:
            tracker.begin(kept)
        self.last_tokens = max((record.get("num_tokens", 0) for record in kept), default=0)
        self.evaluated = {record["step"] for record in kept if "eval_loss" in record}
        self.kept = kept

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line. On a full disk lines wait here, and go with the next one that can be written."""
        if self._tracker is not None:
            self._tracker.record(record)
        self._waiting += json.dumps({"schema": SCHEMA, **record}) + "\n"
        with contextlib.suppress(DiskError):
            disk.append_text(self.path, self._waiting)  # a checkpoint must not be ahead of its steps after a power cut
            self._waiting = ""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a metrics file."""
    return disk.read_lines(path)


def give_back_memory(device: torch.device) -> None:
    """Returns freed memory to the system between two phases, so that fragmentation does not add up their peaks."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)


def peak_gib(device: torch.device) -> float:
    """Peak memory so far, in GiB: of torch's allocator on CUDA, of the process's resident set on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**30
    if sys.platform == "linux":
        # The kernel hands getrusage's peak on from a parent to the program it starts; this one counts from the start.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
