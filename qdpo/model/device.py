"""Selects and measures the device and its compute type, and returns its memory."""

import ctypes
import gc
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from qdpo.errors import ConfigError
from qdpo.run.watcher import Say

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def release_memory(device: torch.device) -> None:
    """Returns freed memory to the system between two phases, so that fragmentation does not add their peaks."""
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
        # getrusage's peak is inherited from the parent process; this one counts from the start of the program.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**20
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def choose_device(wanted: str, announce: Say) -> torch.device:
    """The device to train on: of several CUDA devices, the one with the most free memory.

    Raises: ConfigError if CUDA is requested and there is none, naming what would run instead.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if wanted == "auto":
            return torch.device("cpu")
        raise ConfigError(
            f"model.device=cuda, but torch {torch.__version__} finds no CUDA device{_driver_hint()}. "
            "This machine can run `qdpo run preset=demo`; `model.device=cpu` runs these settings on the CPU, slowly."
        )
    count = torch.cuda.device_count()
    free = [torch.cuda.mem_get_info(index)[0] for index in range(count)]
    best = max(range(count), key=lambda index: free[index])
    torch.cuda.set_device(best)
    name = torch.cuda.get_device_properties(best).name
    others = f", the freest of {count} devices" if count > 1 else ""
    announce(f"device: cuda:{best} {name}, {free[best] / 2**30:.1f} GiB free{others}")
    return torch.device("cuda", best)


def use_deterministic_kernels() -> None:
    """Restricts CUDA to kernels that give the same bits each time. Must be called before the first product.

    cuBLAS is reproducible only with a fixed workspace (NVIDIA's documentation, "Results reproducibility").
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def _driver_hint() -> str:
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if found.returncode == 0 and found.stdout.strip():
        return f" although the driver lists {found.stdout.splitlines()[0]!r}: this torch is probably a CPU build"
    return ""


def choose_dtype(wanted: str, device: torch.device, announce: Say) -> str:
    """Name of the compute type: bf16, fp16 or fp32; the choice of `auto` is reported."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        announce("compute type: fp16 with loss scaling (this card has no bf16)")
        return "fp16"
    ratio = _cpu_bf16_speed()
    if ratio >= 1:
        announce(f"compute type: bf16 (this CPU multiplies bf16 matrices {ratio:.1f} times as fast as fp32)")
        return "bf16"
    announce(f"compute type: fp32 (this CPU multiplies bf16 matrices {1 / ratio:.1f} times slower than fp32)")
    return "fp32"


def _cpu_bf16_speed() -> float:
    """Measured speed ratio of bf16 to fp32 matrix products on this CPU, with its instruction set as configured."""

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        best = float("inf")
        for _attempt in range(5):
            started = time.perf_counter()
            left @ right
            best = min(best, time.perf_counter() - started)
        return best

    return seconds(torch.float32) / seconds(torch.bfloat16)
