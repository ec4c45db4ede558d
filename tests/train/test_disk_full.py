"""A disk that is full, or read-only, while a run goes on."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdpo.errors import DiskError
from qdpo.run import disk
from qdpo.run.metrics import read_metrics
from qdpo.run.record import Result
from qdpo.train.keep import checkpoint, disk_full
from qdpo.train.keep.disk_full import Saver
from qdpo.train.keep.stop import StopRequest
from qdpo.train.watch.metrics_file import Metrics
from tests.conftest import Quiet

Train = Callable[..., tuple[Result, Quiet]]


class Disk:
    """Fails writes while `full` counts down."""

    def __init__(self, full: int):
        self.full = full

    def write(self) -> None:
        if self.full > 0:
            self.full -= 1
            raise DiskError("Cannot write x: no space left.")


def test_a_save_on_the_way_may_fail_and_the_last_one_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_full, "RETRY_S", 0.0)
    said: list[str] = []
    stop = StopRequest()
    saver = Saver(said.append, stop, "wait")
    assert not saver.try_save(Disk(1).write) and "Training continues" in said[0]
    assert saver.try_save(Disk(0).write)
    disk = Disk(3)
    saver.save_or_wait(disk.write)
    assert disk.full == 0 and len(said) == 2 and "waiting for the disk" in said[1]
    with pytest.raises(DiskError):
        Saver(said.append, stop, "stop").save_or_wait(Disk(1).write)
    stop.number = 2
    with pytest.raises(DiskError):
        saver.save_or_wait(Disk(1).write)


def full_for(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> list[int]:
    """Lets writing of the n-th checkpoint fail as a full disk does; returns the list of calls."""
    calls: list[int] = []
    whole = checkpoint.save_file

    def save_file(tensors: Any, path: Path) -> None:
        if path.name == checkpoint.OPTIMIZER:
            calls.append(len(calls))
            if fails(len(calls)):
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
        whole(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    return calls


def test_a_run_outlives_a_full_disk(train: Train, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    train(train__steps="6", output__name="golden")
    monkeypatch.setattr(disk_full, "RETRY_S", 0.0)
    calls = full_for(monkeypatch, lambda call: call in (2, 6, 7))  # the save of step 2, then twice the last one
    _, watcher = train(train__steps="6", train__save_every="1")
    assert len(calls) == 8
    assert watcher.text.count("not saved: Cannot write") == 1 and watcher.text.count("waiting for the disk") == 1
    runs = Path(settings["output.dir"])
    both = [(runs / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("golden", "run")]
    assert both[0] == both[1]
    assert not list((runs / "run").rglob(".tmp*"))


def test_with_stop_the_run_ends_and_can_be_continued(
    train: Train, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(train__steps="4", output__name="golden")
    with monkeypatch.context() as patch:
        full_for(patch, lambda call: call >= 2)
        with pytest.raises(DiskError) as failure:
            train(train__steps="4", train__save_every="2", output__on_disk_full="stop")
        assert failure.value.exit_code == 6
    _, watcher = train(train__steps="4", train__save_every="2")
    assert "resuming after step 2 of 4" in watcher.text
    runs = Path(settings["output.dir"])
    both = [(runs / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("golden", "run")]
    assert both[0] == both[1]


def test_metrics_wait_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, keep_through=-1)
    metrics.write({"step": 1})
    whole, broken = os.write, [True]

    def half(descriptor: int, content: memoryview) -> int:
        """Takes half of what is written, as a full disk does."""
        if not broken[0]:
            return whole(descriptor, content)
        if len(content) < 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(descriptor, content[: len(content) // 2])

    monkeypatch.setattr(disk.os, "write", half)
    metrics.write({"step": 2})
    assert [line["step"] for line in read_metrics(path)] == [1] and path.read_text().endswith("}\n")
    broken[0] = False
    metrics.write({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_run_that_learns_nothing_is_said(train: Train) -> None:
    _, watcher = train(train__steps="12", train__learning_rate="1e-30")
    assert watcher.text.count("every margin is still exactly 0") == 1 and "learning_rate up to 1e-30" in watcher.text
    _, watcher = train(train__steps="12", output__name="learns")
    assert "every margin is still" not in watcher.text


def test_files_are_as_the_umask_asks(train: Train, settings: dict[str, str]) -> None:
    before = os.umask(0o022)
    try:
        train(train__steps="2", train__save_every="1")
    finally:
        os.umask(before)
    files = [path for path in (Path(settings["output.dir"]) / "run").rglob("*") if path.is_file()]
    assert len(files) > 12 and {path.stat().st_mode & 0o777 for path in files} == {0o644}
    assert disk.read_json(Path(settings["output.dir"]) / "run" / "result.json")["steps"] == 2
