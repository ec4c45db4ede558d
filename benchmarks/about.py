"""What a measurement must say about itself: command, commit, date, versions, machine."""

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.rounds import ROOT
from qdpo import __version__

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


def about(words: list[str], device: torch.device) -> dict[str, Any]:
    """The head of a record; `words` are the command that made it."""
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "qdpo", "benchmarks", "scripts")
        commit = _git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        commit = "not known: git does not answer"
    return {
        "command": " ".join(without_folder(word) for word in words),
        "commit": commit,
        **machine(device),
    }


def about_job(job: dict[str, Any]) -> dict[str, Any]:
    """The head of scripts/gpu_proof's records: commits are told there, and git may not be at hand."""
    device = torch.device(job["device"])
    found = {"command": " ".join(map(without_folder, ["scripts/gpu_proof", *job["words"]])), **machine(device)}
    if device.type == "cuda":
        found["gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
        found["cuda"] = torch.version.cuda
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """Date, versions and device."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {"qdpo": __version__, **{name: metadata.version(name) for name in PACKAGES}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
    }


def cpu_name() -> str:
    """The CPU's model and the instruction set that torch uses on it."""
    found = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text(encoding="utf-8").splitlines())
        fields = {name.strip(): value.strip() for name, _, value in reversed(list(lines))}
        found = f"{fields.get('model name', found)} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return f"{found}, {torch.backends.cpu.get_cpu_capability()}"


def without_folder(word: str) -> str:
    """A path as its last part: the rest means nothing on another machine. NAME=PATH keeps its name."""
    name, sign, value = word.rpartition("=")
    return name + sign + (Path(value).name if value.startswith(("/", "~", "..")) else value)


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
