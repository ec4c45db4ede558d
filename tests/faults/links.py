"""Links, pipes, folders and files where a run or a cache has something else."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.faults.base import DONE, REFUSED, SAME, Case, Good
from tests.faults.run_files import READERS, RUN

PLACES = (
    "run.json", "environment.json", "config.toml", "metrics.jsonl", "samples.jsonl", "eval_pairs.jsonl", "result.json",
    "data_report.jsonl", "debug.log", "README.md", "report.html", "prepared", "prepared/train.safetensors",
    "prepared/held_out.safetensors", "checkpoints", "checkpoints/step-000001", "checkpoints/step-000001/state.json",
    "checkpoints/step-000001/MANIFEST.json", "checkpoints/step-000001/adapter.safetensors", "checkpoints/step-000009",
    "checkpoints/damaged-step-000001", "checkpoints/.tmp-step-000002-17", "checkpoints/.tmp-x", ".tmp-prepared-17",
    ".metrics.jsonl.abcd1234", "adapter", "adapter/.tmp-x-17", "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors", "adapter/tokenizer.json", "../.run.lock", "../.tmp-run-17", "../run",
    "../../cache", "../../cache/reference", "../../cache/reference/*.sqlite",
)  # fmt: skip
KINDS = ("a link to a file", "a link to a folder", "a link to itself", "a link to nothing", "a pipe", "a folder",
         "a file", "a link to the same")  # fmt: skip


def cases(rng: random.Random, good: Good) -> Iterator[Case]:
    """Endless: something odd at a place of a run, and a verb."""
    number = 0
    while True:
        number += 1
        place, kind = rng.choice(PLACES), rng.choice(KINDS)
        verb = rng.choice(("run", "run", "run", *READERS))
        source = good.stopped if verb == "run" and rng.random() < 0.7 else good.run
        yield case(good, f"{number}: {place} is {kind}, {verb}", source, place, kind, verb)


def case(good: Good, name: str, source: Path, place: str, kind: str, verb: str) -> Case:
    """Puts `kind` where the run `source` has `place`; what a link points to must be as before at the end."""

    def make(folder: Path) -> list[str]:
        words = good.lay_run(folder, source)
        odd(folder, folder / RUN, place, kind)
        return words if verb == "run" else READERS[verb]

    return Case("links", name, make, REFUSED | (SAME if verb == "run" else DONE), typed="hello\n")


def odd(folder: Path, run: Path, place: str, kind: str) -> None:
    """Replaces the entry; `outside` holds what links point to."""
    outside = folder / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "folder" / "kept.txt").write_text("kept")
    (outside / "file").write_text("kept\n")
    path = Path(os.path.normpath(run / place))
    if "*" in path.name:
        path = next(path.parent.glob(path.name))
    path.parent.mkdir(parents=True, exist_ok=True)
    same = outside / "same"
    if path.is_dir():
        shutil.move(path, same)
    elif path.exists():
        path.rename(same)
    else:
        same.write_text("kept\n")
    target = {
        "a link to a file": outside / "file", "a link to a folder": outside / "folder", "a link to itself": path,
        "a link to nothing": outside / "absent", "a link to the same": same,
    }.get(kind)  # fmt: skip
    if target is not None:
        path.symlink_to(target)
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        (path / "inside").mkdir(parents=True)
    else:
        path.write_bytes(b"\0not it\n")
