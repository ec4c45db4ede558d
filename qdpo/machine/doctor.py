"""Checks whether this machine can train: a line for each check, with the remedy if it fails."""

import os
import platform
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

from qdpo.families.kernels import KERNELS, is_installed, remedy
from qdpo.run import disk

GIB = 2**30
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")
# A run writes checkpoints and token ids: with less free space, a 7B model's first checkpoint would fill the disk.
LEAST_DISK_GIB = 2.0
HUB_WAIT_S = 5.0


@dataclass(frozen=True)
class Check:
    """The result of a check, one line: `bad` prevents runs, `note` may surprise."""

    mark: Literal["ok", "note", "bad"]
    name: str
    text: str

    @property
    def line(self) -> str:
        return f"{self.mark:<4}  {self.name:<10}  {self.text}"


@dataclass(frozen=True)
class Machine:
    """The device and memory that the presets are compared with."""

    device: Literal["cuda", "cpu"]
    free_gib: float
    """Free memory of the card, or of the host if there is none."""


def run_checks() -> tuple[list[Check], Machine]:
    """Run all checks. Loads torch, quantises a small matrix on the device, and requests one page from the hub."""
    card, machine = _card()
    parts: list[Callable[[], Iterator[Check]]] = [_python, _memory, _disk, _wsl, _hub, _report]
    first, *rest = (list(part()) for part in parts)
    return [
        *first, *card, *_quantised(machine), *_kernels(machine.device), *(check for found in rest for check in found)
    ], machine  # fmt: skip


def _python() -> Iterator[Check]:
    versions, missing = [], []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    yield Check("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    yield Check("ok", "packages", ", ".join(versions))
    if missing:
        yield Check("bad", "packages", f"missing: {', '.join(missing)}. Run: pip install --upgrade qdpo")


def _card() -> tuple[list[Check], Machine]:
    import torch

    driver = _driver()
    free_host = psutil.virtual_memory().available / GIB
    if not torch.cuda.is_available():
        cpu = Machine("cpu", free_host)
        if driver and torch.version.cuda is None:
            text = f"the driver lists {driver}, but torch {torch.__version__} is a CPU build: install one with CUDA"
            return [Check("bad", "card", f"{text} (see pytorch.org/get-started)")], cpu
        if driver:
            text = f"the driver lists {driver}, but torch {torch.__version__} cannot use it: update the driver"
            return [Check("bad", "card", text)], cpu
        return [Check("note", "card", "none: `qdpo run preset=demo` works, but 7B models need a CUDA card")], cpu
    index = max(range(torch.cuda.device_count()), key=lambda one: torch.cuda.mem_get_info(one)[0])
    free, total = (size / GIB for size in torch.cuda.mem_get_info(index))
    about = torch.cuda.get_device_properties(index)
    found = [
        Check("ok", "card", f"{about.name}, {free:.1f} of {total:.1f} GiB free, driver {driver or 'unknown'}, "
              f"CUDA {torch.version.cuda}, compute capability {about.major}.{about.minor}")
    ]  # fmt: skip
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        found.append(Check("note", "bf16", "not on this card: runs compute in fp16 with loss scaling"))
    if free < 0.8 * total:
        found.append(Check("note", "card", f"other programs use {total - free:.1f} GiB: close them for longer pairs"))
    return found, Machine("cuda", free)


def _driver() -> str:
    """Name and driver version of the first card that the driver lists; empty without a driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip().splitlines()[0] if found.returncode == 0 and found.stdout.strip() else ""


def _quantised(machine: Machine) -> Iterator[Check]:
    """Check an NF4 round trip of a matrix with the library that every run uses."""
    import torch

    from qdpo.model.base.quant import round_trip_error

    try:
        error = round_trip_error(torch.device(machine.device))
    except (RuntimeError, OSError, ImportError) as failure:
        yield Check("bad", "4-bit", f"bitsandbytes fails on {machine.device}: {str(failure).splitlines()[0]}")
        return
    mark: Literal["ok", "bad"] = "ok" if error < 0.15 else "bad"
    yield Check(mark, "4-bit", f"bitsandbytes on {machine.device}: NF4 round trip, relative error {error:.3f}")


def _kernels(device: str) -> Iterator[Check]:
    """Packages that only some models use; on a machine without a card, none of them can help."""
    for package, about in KERNELS.items():
        if device == "cpu" and is_installed(package):
            yield Check("note", "kernels", f"{about.name} is installed, but its {about.work} need a card")
        elif device == "cuda" and is_installed(package):
            yield Check("ok", "kernels", f"{about.name} is installed, for {about.work} ({about.models})")
        elif device == "cuda":
            text = f"no {about.name}: {about.work} ({about.models}) run in plain PyTorch, exact but slower"
            yield Check("note", "kernels", f"{text}. Run: {remedy([package])}")


def _memory() -> Iterator[Check]:
    memory = psutil.virtual_memory()
    cores = f"{psutil.cpu_count(logical=False) or os.cpu_count()} cores"
    yield Check("ok", "memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free, {cores}")


def _disk() -> Iterator[Check]:
    for what, folder in (("runs", Path("runs")), ("cache", disk.cache_folder(None))):
        existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        free = shutil.disk_usage(existing).free / GIB
        writable = os.access(existing, os.W_OK)
        text = f"{what}: {free:.1f} GiB free in {existing.absolute()}"
        if not writable:
            yield Check("bad", "disk", f"{text}, which is not writable: set another with output.dir or cache.dir")
        elif free < LEAST_DISK_GIB:
            yield Check("bad", "disk", f"{text}; {LEAST_DISK_GIB:g} are needed. Free space, or use another disk")
        else:
            yield Check("ok", "disk", text)


def _wsl() -> Iterator[Check]:
    if "microsoft" not in platform.release().lower():
        return
    yield Check("note", "WSL", "it gets half of Windows' memory unless .wslconfig sets memory=…")
    if Path.cwd().is_relative_to("/mnt"):
        yield Check("note", "WSL", f"{Path.cwd()} is on a Windows disk, which is slow: keep runs in your home folder")


def _hub() -> Iterator[Check]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Check("note", "hub", "HF_HUB_OFFLINE is set: only local models and data sets are used")
        return
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_WAIT_S):
            pass
    except urllib.error.HTTPError:
        pass  # an answer, even if an error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        yield Check("note", "hub", f"{constants.ENDPOINT} is not reachable ({reason}): use local folders or the demo")
        return
    yield Check("ok", "hub", f"{constants.ENDPOINT} answers")


def _report() -> Iterator[Check]:
    try:
        yield Check("ok", "report", f"matplotlib {metadata.version('matplotlib')}")
    except metadata.PackageNotFoundError:
        yield Check("note", "report", "no matplotlib: `qdpo report` needs it. Run: pip install 'qdpo[report]'")
