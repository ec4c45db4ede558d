"""A case: one damaged input and what may come of it; and the sound inputs that all cases are made from.

Every case has a folder of its own, which is its working directory. A new run reads the copies `base/` and `pairs.jsonl`
in it; a copied run reads the sound ones where they lie, whose absolute paths it has recorded. Both write `runs/run` and
`cache/`.
"""

import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qdpo.diagnose.course import Record

SETTINGS = {
    "model.device": "cpu", "model.dtype": "fp32", "model.quantization": "none",
    "data.eval_fraction": "0.2", "train.pairs_per_step": "4", "train.steps": "2",
    "train.learning_rate": "1e-3", "train.optimizer": "adamw", "train.save_every": "1", "train.eval_every": "1",
    "memory.tokens_per_row": "96", "samples.count": "1", "samples.max_new_tokens": "4", "output.dir": "runs",
    "output.name": "run", "cache.dir": "cache",
}  # fmt: skip
ADAPTER = "runs/run/adapter/adapter_model.safetensors"
REFUSED = frozenset({"refused"})  # exit code 2, 3, 5, 6, 7 or 9
SAME = frozenset({"same"})  # exit code 0, and the adapter of the undamaged run
DONE = frozenset({"done"})  # exit code 0
NOT_FINITE = frozenset({"not finite"})  # exit code 4: for settings that make a healthy model overflow
PAIRS = 12


class SkippedError(Exception):
    """This machine cannot set the case up; the text says why."""


@dataclass(frozen=True)
class Case:
    """`make` writes the damaged inputs into the case's folder and returns qdpo's arguments."""

    kind: str
    name: str
    """What was damaged; unique in its kind."""
    make: Callable[[Path], list[str]]
    right: frozenset[str]
    """Of REFUSED | SAME | DONE | NOT_FINITE: the outcomes that are right."""
    near: str | None = None
    """A text that a refusal must hold, such as the name of the damaged file."""
    around: Callable[[Path], AbstractContextManager[object]] | None = None
    """What the process of the case holds open while qdpo runs in it, such as a server; may raise SkippedError."""
    typed: str = ""
    """What qdpo reads from standard input."""
    adapter: str = ADAPTER


@dataclass(frozen=True)
class Good:
    """The sound inputs, made once. Copy them before you damage them."""

    folder: Path
    model: Path
    """Folder of a random Llama of 2 layers and its tokenizer with a ChatML template."""
    data: Path
    """12 pairs as lines of JSON."""
    run: Path
    """Folder of the finished run: 2 steps, a checkpoint after each."""
    stopped: Path
    """Folder of the same run, stopped by SIGTERM after its first step; the same command finishes it."""
    cache: Path
    """The cache that these runs filled."""
    adapter: bytes = b""
    """The finished run's adapter_model.safetensors."""
    peak_bytes: int = 0
    """Memory of the process of the finished run."""

    def words(self, **changes: str) -> list[str]:
        """The finished run's settings as arguments; `changes` are written with __ for the dot."""
        changed = {name.replace("__", "."): value for name, value in changes.items()}
        paths = {"model.path": str(self.model), "data.path": str(self.data)}
        return [f"{name}={value}" for name, value in {**SETTINGS, **paths, **changed}.items()]

    def lay(self, folder: Path, **changes: str) -> list[str]:
        """Copies of the model as base/ and of the pairs, to be damaged; returns the words of a run that reads them."""
        shutil.copytree(self.model, folder / "base")
        shutil.copy(self.data, folder / "pairs.jsonl")
        return ["run", *self.words(**{"model__path": "base", "data__path": "pairs.jsonl", **changes})]

    def lay_run(self, folder: Path, run: Path, **changes: str) -> list[str]:
        """A copy of self.run or self.stopped as runs/run, and of its cache; returns the arguments that resume it."""
        shutil.copytree(run, folder / "runs" / "run", symlinks=True)
        shutil.copytree(self.cache, folder / "cache")
        return ["run", *self.words(**changes)]


def make_good(folder: Path, runs: Callable[[Case, Path], int]) -> Good:
    """Sound inputs in `folder`; `runs(case, folder)` runs a case that must succeed, and returns its peak memory."""
    good = Good(
        folder, folder / "base", folder / "pairs.jsonl", folder / "whole" / "runs" / "run",
        folder / "half" / "runs" / "run", folder / "whole" / "cache",
    )  # fmt: skip

    def base(_: Path) -> list[str]:
        from tests.conftest import save_tiny_base, tiny_rows, write_jsonl

        save_tiny_base(good.model)
        write_jsonl(good.data, [dict(row) for row in tiny_rows(PAIRS)])
        return ["--version"]

    runs(Case("sound", "the inputs", base, DONE), folder / "inputs")
    peak = runs(Case("sound", "a whole run", lambda path: ["run", *good.words()], DONE), folder / "whole")
    runs(
        Case("sound", "a run that is stopped", lambda path: ["run", *good.words()], DONE, around=_stopped),
        folder / "half",
    )
    good = replace(good, adapter=(folder / "whole" / ADAPTER).read_bytes(), peak_bytes=peak)
    runs(
        Case("sound", "the stopped run goes on", lambda path: good.lay_run(path, good.stopped), SAME), folder / "again"
    )
    return good


@contextlib.contextmanager
def _stopped(_: Path) -> Iterator[None]:
    """This process gets SIGTERM after its first step."""
    from qdpo.report.screen.live import Terminal

    step = Terminal.step

    def then_stop(self: Terminal, record: "Record") -> None:
        step(self, record)
        if record["step"] == 1 and "loss" in record:
            os.kill(os.getpid(), signal.SIGTERM)

    Terminal.step = then_stop  # type: ignore[method-assign]
    try:
        yield
    except SystemExit as end:
        if end.code != 128 + signal.SIGTERM:
            raise
    finally:
        Terminal.step = step  # type: ignore[method-assign]
