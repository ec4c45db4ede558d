"""qdpo ended by SIGKILL at a chosen instant: python -m benchmarks.killed INSTANT COUNT -- run preset=demo …

INSTANT is a name of INSTANTS; the process ends when it is reached for the COUNT-th time. COUNT 0 never ends it. At the
end of a process that was not killed, stderr says how many file operations below output.dir Python saw: the range of
COUNT for the instant `operation`. Nothing in qdpo knows of this: file operations are seen by an audit hook, files are
cut at `io.open` and at safetensors' `save_file`, calls by putting another function in their place.
"""

import functools
import importlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Operation:
    """Before a file operation whose line, `event path → path`, matches."""

    pattern: str


@dataclass(frozen=True)
class Torn:
    """When half the bytes of a file of this name are written, under whatever temporary name it is being written."""

    name: str


@dataclass(frozen=True)
class Call:
    """Before or after a call of `module:name` or `module:Class.name`."""

    function: str
    after: bool


# In the order in which a run comes by them. A run's folder is written aside, with its prepared/ inside, and renamed.
INSTANTS: dict[str, Operation | Torn | Call] = {
    "run folder: filling": Torn("config.toml"),
    "run folder: before its rename": Operation(r"os\.rename \S*/\.tmp-(?!prepared|step|adapter)[^/ ]+ → "),
    "run.json: torn": Torn("run.json"),
    "reference: before a commit": Call("sqlite3:commit", after=False),
    "reference: between commits": Call("qdpo.train.policy.reference_cache:ReferenceCache.put", after=True),
    "evaluation: between rows": Call("qdpo.train.watch.evaluate:score_row", after=False),
    "metrics: before their rewriting": Operation(r"os\.rename \S+ → \S*/metrics\.jsonl$"),
    "step: between microbatches": Call("torch.autograd:backward", after=True),
    "step: updated, not logged": Call("qdpo.train.loop:train_step", after=True),
    "metrics: half a line": Torn("metrics.jsonl"),
    "save: adapter torn": Torn("adapter.safetensors"),
    "save: optimizer torn": Torn("optimizer.safetensors"),
    "save: state torn": Torn("state.json"),
    "save: manifest torn": Torn("MANIFEST.json"),
    "save: before the flush": Operation(r"^open \S*/\.tmp-step-\d+-\d+$"),
    "save: before the rename": Operation(r"os\.rename \S*/\.tmp-step-\d+-\d+ → "),
    "save: renamed, not flushed": Operation(r"^open \S*/checkpoints$"),
    "save: before reading back": Operation(r"^open \S*/checkpoints/step-\d+/MANIFEST\.json$"),
    "save: before the prune": Operation(r"shutil\.rmtree \S*/step-\d+$"),
    "save: inside the prune": Operation(r"os\.remove \S+ in \S*/step-\d+$"),
    "save: pruned to an empty folder": Operation(r"os\.rmdir \S*/step-\d+$"),
    "end: adapter torn": Torn("adapter_model.safetensors"),
    "end: before adapter/ is renamed": Operation(r"os\.rename \S*/\.tmp-adapter-\d+ → "),
    "end: before samples": Operation(r"os\.rename \S+ → \S*/samples\.jsonl$"),
    "end: adapter/ written, result torn": Torn("result.json"),
    "end: before the result's rename": Operation(r"os\.rename \S+ → \S*/result\.json$"),
    "end: result written, no card": Operation(r"os\.rename \S+ → \S*/README\.md$"),
    "operation": Operation(""),
}  # fmt: skip


class Killer:
    """Counts how often the instant is reached, and ends the process at the right one."""

    def __init__(self, count: int) -> None:
        self.left, self.seen = count, 0

    def reached(self) -> bool:
        """Whether this is the time to end."""
        self.seen += 1
        self.left -= 1
        return self.left == 0

    def kill(self, where: str) -> None:
        os.write(2, f"killed: {where}\n".encode())
        os.kill(os.getpid(), signal.SIGKILL)


def watch_operations(killer: Killer, pattern: str, folder: str) -> None:
    """Ends the process before a matching file operation below `folder`."""
    inside = ""  # the folder that shutil.rmtree removes: what it removes in it is named without its path

    def operation(event: str, arguments: tuple[Any, ...]) -> str | None:
        nonlocal inside
        if event.split(".")[0] not in ("os", "open", "shutil", "tempfile") or not arguments:
            return None
        if not isinstance(arguments[0], (str, Path)):
            return None
        path = str(arguments[0])
        if event == "shutil.rmtree":
            inside = path
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree", "tempfile.mkstemp"):
            other = f" → {arguments[1]}" if event == "os.rename" else ""
            return f"{event} {path}{other}" + (f" in {inside}" if "/" not in path else "")
        return f"open {path}" if event == "open" else None

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        line = operation(event, arguments)
        if line is not None and folder in line and re.search(pattern, line) and killer.reached():
            killer.kill("before " + line.replace(str(folder), "…"))

    sys.addaudithook(hook)


class HalfFile:
    """A file opened for writing, of which the first half of one write reaches the disk."""

    def __init__(self, file: Any, killer: Killer, name: str) -> None:
        self._file, self._killer, self._name = file, killer, name

    def write(self, content: Any) -> int:
        if self._killer.reached():
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            self._killer.kill(f"half of {self._name} written")
        return int(self._file.write(content))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "HalfFile":
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()


def tear_files(killer: Killer, name: str) -> None:
    """Ends the process when half of the file `name` is written, by Python or by safetensors."""
    from safetensors import torch as safe

    # write_stream writes NAME under .NAME.xxxxxxxx first
    is_meant = re.compile(rf"(^|/)\.?{re.escape(name)}(\.\w{{8}})?$").search
    real_open, real_save = io.open, safe.save_file

    def opening(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
        opened = real_open(file, mode, *rest, **options)
        path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)
        return HalfFile(opened, killer, name) if set(mode) & set("wa") and is_meant(str(path)) else opened

    def saving(tensors: Any, filename: Any, metadata: Any = None) -> None:
        if not is_meant(str(filename)) or not killer.reached():
            return real_save(tensors, filename, metadata)
        content = safe.save(tensors, metadata)
        Path(filename).write_bytes(content[: len(content) // 2])
        killer.kill(f"half of {name} written")

    io.open = opening  # type: ignore[assignment]
    safe.save_file = saving  # before anything imports it by name


def replace_call(killer: Killer, function: str, after: bool) -> None:
    """Ends the process before or after a call of the function."""
    module, _, name = function.partition(":")
    owner: Any = importlib.import_module(module)
    *classes, name = name.split(".")
    for part in classes:
        owner = getattr(owner, part)
    real: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(real)
    def counting(*words: Any, **options: Any) -> Any:
        if not after and killer.reached():
            killer.kill(f"before {name}")
        answer = real(*words, **options)
        if after and killer.reached():
            killer.kill(f"after {name}")
        return answer

    setattr(owner, name, counting)


def hold_commits(killer: Killer) -> None:
    """Ends the process inside a transaction of the reference cache: all rows inserted, none committed."""
    import sqlite3

    class Connection(sqlite3.Connection):
        def executemany(self, sql: str, rows: Any, /) -> sqlite3.Cursor:
            cursor = super().executemany(sql, rows)
            if sql.startswith("INSERT") and killer.reached():
                killer.kill("before a commit of the reference cache")
            return cursor

    sqlite3.connect = functools.partial(sqlite3.connect, factory=Connection)


def arm(instant: str, count: int, folder: str) -> Killer:
    """Prepares the process to end at the instant."""
    killer, how = Killer(count), INSTANTS[instant]
    if isinstance(how, Operation):
        watch_operations(killer, how.pattern, folder)
    elif isinstance(how, Torn):
        tear_files(killer, how.name)
    elif how.function == "sqlite3:commit":
        hold_commits(killer)
    else:
        replace_call(killer, how.function, how.after)
    return killer


def main(words: list[str]) -> None:
    instant, count, dashes, *command = words
    assert dashes == "--", words
    folder = next(word.partition("=")[2] for word in command if word.startswith("output.dir="))
    killer = arm(instant, int(count), folder)
    from qdpo.cli.main import main as qdpo

    sys.argv = ["qdpo", *command]
    try:
        qdpo()
    finally:
        print(f"operations: {killer.seen}", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
