"""What is asked of a device: its memory given back, its peak."""

import ctypes
import gc
import sys
from pathlib import Path

import torch


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
