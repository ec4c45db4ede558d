"""Links, pipes and full disks: nothing is followed out of a run, waited for, or half written."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from qdpo.collect.candidates import Answer, Candidates
from qdpo.collect.decisions import Decision, Decisions, opened
from qdpo.errors import DiskError
from qdpo.run import disk, lines, lock, places
from qdpo.run.finished import any_run
from qdpo.run.folder import RunDir
from qdpo.train.keep import checkpoint
from qdpo.train.keep.disk_full import Saver
from qdpo.train.keep.stop import StopRequest
from qdpo.train.watch.metrics_file import Metrics
from tests.run.made import finished_without_model

VOCABULARY = 400
MOUNTS = os.name == "posix" and os.geteuid() == 0


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run's records, with nothing of a model."""
    return finished_without_model(tmp_path / "runs" / "made")


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "prepared", "checkpoints", "adapter", "config.toml"])
@pytest.mark.parametrize("kind", ["pipe", "loop", "dangling", "folder or file"])
def test_an_entry_of_another_kind_is_refused_by_name(run: RunDir, name: str, kind: str) -> None:
    path = run.path / name
    is_folder = name in ("prepared", "checkpoints", "adapter")
    if disk.is_there(path):
        path.rename(run.path / "before")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder or file":
        path.write_text("") if is_folder else path.mkdir()
    else:
        path.symlink_to(path if kind == "loop" else run.path / "absent")
    with pytest.raises(DiskError, match=f"{name} is a .*due there.*--fresh"):
        any_run(run.path)


def outside(folder: Path) -> Path:
    (folder / "outside").mkdir(parents=True)
    (folder / "outside" / "kept").write_text("kept\n")
    return folder / "outside"


def test_nothing_is_deleted_through_a_link(run: RunDir, tmp_path: Path) -> None:
    kept = outside(tmp_path)
    run.checkpoints.mkdir()
    links = [
        run.path.parent / ".tmp-made-1", run.path / ".tmp-adapter-1", run.path / ".run.json.abcd1234",
        run.adapter / ".tmp-README.md-1", run.checkpoints / ".tmp-step-000002-1", run.checkpoints / "step-000002",
        run.checkpoints / "damaged-step-000001",
    ]  # fmt: skip
    for link in links:
        link.symlink_to(kept, target_is_directory=True)
    (run.checkpoints / "step-000001").write_text("a file")
    lock.clear_leftovers(run)
    said: list[str] = []
    assert checkpoint.newest_checkpoint(run.checkpoints, said.append) is None and len(said) == 2
    for number in range(3, 6):
        (run.checkpoints / f"step-{number:06d}").symlink_to(kept, target_is_directory=True)
    checkpoint.prune(run.checkpoints, keep=1)
    disk.write_folder(run.checkpoints / "step-000005", lambda part: disk.write_text(part / "new", ""))
    assert (kept / "kept").read_text() == "kept\n" and list(kept.iterdir()) == [kept / "kept"]
    assert not any(disk.is_there(link) for link in links if ".tmp" in link.name)


def test_nothing_is_written_through_a_link(run: RunDir, tmp_path: Path) -> None:
    kept = outside(tmp_path) / "kept"
    for path in (run.metrics, run.path / "debug.log", run.lock):
        path.unlink(missing_ok=True)
        path.symlink_to(kept)
        with pytest.raises(DiskError, match="link"):
            disk.append_text(path, "more\n")
        path.unlink()
    run.lock.symlink_to(kept)
    with pytest.raises(DiskError, match="is a link"), lock.exclusive(run):
        pass
    os.unlink(run.lock)
    os.mkfifo(run.lock)
    with pytest.raises(DiskError, match="is a named pipe"), lock.exclusive(run):
        pass
    run.metrics.symlink_to(kept)
    Metrics(run.metrics, keep_through=-1)
    assert kept.read_text() == "kept\n" and not run.metrics.is_symlink()


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_not_a_file_is_not_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "odd"
    make(path)
    for act in (disk.read_bytes, disk.cut_torn_line, lambda p: disk.append_text(p, "x\n"), lines.read_lines,
                lambda p: disk.write_text(p, "x"), places.check_file):  # fmt: skip
        with pytest.raises((DiskError, OSError)):
            act(path)


def test_a_wrong_entry_is_not_waited_for_as_a_full_disk_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    saver = Saver(lambda line: None, StopRequest(), "wait")
    with pytest.raises(DiskError, match="Move what is in its way"):
        saver.save_or_wait(lambda: disk.write_text(tmp_path / "file" / "inside", "x"))


def test_an_append_first_removes_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for torn in (b"", b"torn", b"torn" * 50_000):
        path.write_bytes(b"whole\n" + torn)
        disk.append_text(path, "next\n")
        assert path.read_bytes() == b"whole\nnext\n"
    path.write_bytes(b"torn")
    disk.append_text(path, "next\n")
    assert path.read_bytes() == b"next\n"


def test_the_adapters_save_at_a_full_disk_is_a_disk_error(tmp_path: Path) -> None:
    class TokenizersError(Exception):
        """As tokenizers raises it: a plain exception from Rust."""

    for error in (
        SafetensorError("I/O error"),
        TokenizersError("No space left on device (os error 28)"),
        OSError(28, ""),
    ):

        def fill(path: Path, error: Exception = error) -> None:
            raise error

        for write in (disk.write_folder, disk.write_file):
            with pytest.raises(DiskError, match="Cannot write"):
                write(tmp_path / "adapter", fill)
    with pytest.raises(ZeroDivisionError):
        disk.write_folder(tmp_path / "adapter", lambda path: path.parents[1 // 0])  # type: ignore[arg-type,return-value]


@pytest.fixture
def full(tmp_path: Path) -> Any:
    """A folder of 64 KiB in all."""
    folder = tmp_path / "full"
    folder.mkdir()
    if (
        not MOUNTS
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "qdpo-full", folder], capture_output=True
        ).returncode
    ):
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("size", [10, 1000, 5000, 20_000])
def test_appends_on_a_full_disk_are_whole_or_not_there(full: Path, size: int) -> None:
    path, line, whole = full / "lines", "x" * size + "\n", 0
    with pytest.raises(DiskError, match="No space left"):
        for _ in range(70_000 // size):
            disk.append_text(path, line * 10)
            whole += 1
    assert path.read_text() == line * 10 * whole
    (full / "space").touch()
    path.write_text("")
    disk.append_text(path, "again\n")
    assert path.read_text() == "again\n"


def test_metrics_on_a_full_disk_keep_their_lines_and_say_so_before_a_checkpoint(full: Path) -> None:
    (full / "rest").write_bytes(b"x" * (52 << 10))
    metrics, step = Metrics(full / "metrics.jsonl", keep_through=-1), 0
    while step < 2000:
        step += 1
        metrics.write({"step": step, "loss": 1 / 3})
    with pytest.raises(DiskError, match=r"metrics\.jsonl"):
        metrics.flush()
    held = lines.read_lines(full / "metrics.jsonl", lines.is_metric)
    assert 0 < len(held) < step and [line["step"] for line in held] == list(range(1, len(held) + 1))
    (full / "rest").unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", full], check=True)
    metrics.flush()
    assert [line["step"] for line in lines.read_lines(full / "metrics.jsonl")] == list(range(1, step + 1))


def test_what_was_acknowledged_on_a_full_disk_is_still_decided(full: Path) -> None:
    items = [Candidates(f"p{n}", (Answer(f"a{n}"), Answer("b" * 300)), "here") for n in range(400)]
    done = 0
    with opened(full / "pairs.jsonl", items) as decisions, pytest.raises(DiskError):
        for item in items:
            decisions.add(Decision(prompt=item.id, kind="pick", best=item.answers[0].id, worst=item.answers[1].id))
            done += 1
    (full / "pairs.jsonl").unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", full], check=True)
    again = Decisions(full / "pairs.jsonl", items)
    assert 0 < done <= len(again.history) <= done + 1
    assert len((full / "pairs.jsonl").read_text().splitlines()) == len(again.history)
