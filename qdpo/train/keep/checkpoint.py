"""Saves and restores everything a run needs to resume: adapter, optimizer, loss scale, step. No pickle.

A checkpoint is written to a temporary folder, which is then renamed. Its manifest holds the size and sha256 of every
file; a checkpoint whose files do not match is set aside, and the previous checkpoint is used.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qdpo.errors import DiskError, VerificationError
from qdpo.model.policy.adapter import Policy, adapter_tensors, load_adapter_tensors
from qdpo.run import disk, places
from qdpo.train.keep.progress import Progress
from qdpo.train.step.optimizer import optimizer_tensors, restore_optimizer

ADAPTER, OPTIMIZER, STATE, MANIFEST = "adapter.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"


@dataclass(frozen=True)
class TrainedObjects:
    """The objects that training changes."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler


def save_checkpoint(folder: Path, trained: TrainedObjects, progress: Progress, *, keep: int) -> Path:
    """Writes `folder`/step-NNNNNN, reads it back, then removes all but the `keep` newest.

    Raises: DiskError if it cannot be written, VerificationError if it reads back differently.
    """
    tensors, scalars = optimizer_tensors(trained.optimizer, trained.policy.adapter_parameters())
    full_state = {**progress.to_json(), "optimizer": scalars, "scaler": trained.scaler.state_dict()}

    def fill(path: Path) -> None:
        save_file(adapter_tensors(trained.policy), path / ADAPTER)
        save_file(tensors, path / OPTIMIZER)
        disk.write_json(path / STATE, full_state)
        disk.write_json(path / MANIFEST, {name: _fingerprint(path / name) for name in (ADAPTER, OPTIMIZER, STATE)})

    target = folder / f"step-{progress.step:06d}"
    disk.write_folder(target, fill)
    if not _is_whole(target):
        raise VerificationError(f"The checkpoint {target} does not read back as written. Check the disk.")
    prune(folder, keep=keep)
    return target


def prune(folder: Path, *, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints. A start does so too, in case a kill came before or during it."""
    for old in _by_step(folder)[:-keep]:
        disk.remove(old)


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest intact checkpoint; whatever else has its name is renamed and reported. Raises: DiskError."""
    for leftover in folder.glob(".tmp-*"):
        disk.remove(leftover)
    for candidate in reversed(_by_step(folder)):
        if _is_whole(candidate):
            return candidate
        aside = candidate.with_name(f"damaged-{candidate.name}")
        disk.remove(aside)
        try:
            candidate.rename(aside)
        except OSError as error:
            raise disk.disk_error(error, aside) from error
        say(f"checkpoint: {candidate.name} is damaged (set aside as {aside.name}); using the previous checkpoint")
    return None


def load_checkpoint(folder: Path, trained: TrainedObjects) -> Progress:
    """Restores the trained objects in place; returns the progress that was saved.

    Raises: DiskError if the checkpoint is intact, but of another run.
    """
    try:
        state: dict[str, Any] = disk.read_json(folder / STATE)
        load_adapter_tensors(trained.policy, load_file(folder / ADAPTER))
        restore_optimizer(
            trained.optimizer, trained.policy.adapter_parameters(), load_file(folder / OPTIMIZER), state["optimizer"]
        )
        if state["scaler"]:
            trained.scaler.load_state_dict(state["scaler"])
        return Progress.of_json(state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise DiskError(
            f"{folder} is not a checkpoint of this run: {error or type(error).__name__}. Move it away, and the same "
            "command continues from the checkpoint before it."
        ) from error


def _by_step(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name))


def _is_whole(folder: Path) -> bool:
    if not places.is_folder(folder):
        return False
    try:
        manifest = disk.read_json(folder / MANIFEST)
        if not isinstance(manifest, dict) or set(manifest) != {ADAPTER, OPTIMIZER, STATE}:
            return False
        if any(_fingerprint(folder / name) != expected for name, expected in manifest.items()):
            return False
        return f"step-{disk.read_json(folder / STATE)['step']:06d}" == folder.name
    except (OSError, ValueError, KeyError, TypeError, DiskError):
        return False


def _fingerprint(path: Path) -> dict[str, Any]:
    places.check_file(path)
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
