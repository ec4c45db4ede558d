"""run.json as a typed record: what a newer version wrote is kept, what is damaged is said, and one door opens a run."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from qdpo.errors import ConfigError, DiskError
from qdpo.report.screen.runs import run_lines
from qdpo.run import disk, identity
from qdpo.run.finished import FinishedRun, any_run, finished_run
from qdpo.run.folder import RunDir
from qdpo.run.record import VERSION, FileRecord, FourBitMark, file_record, read_record, write_record
from tests.conftest import qdpo
from tests.run.made import rewrite_json, write_records

# Verbs that need a finished run, as a user types them.
DOORS = {
    "merge": ["merge", "{run}"],
    "export": ["export", "{run}", "--to", "peft"],
    "push": ["push", "{run}", "me/adapter"],
    "eval": ["eval", "{run}"],
    "compare": ["compare", "{run}"],
    "chat": ["chat", "{run}"],
    "sample": ["sample", "prompts.txt", "--adapter", "{run}", "--out", "candidates.jsonl"],
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run's records, with nothing of a model."""
    run = RunDir(tmp_path / "runs" / "made")
    run.adapter.mkdir(parents=True)
    (run.adapter / "adapter_config.json").write_text("{}")
    file = FileRecord(bytes=1, mtime_ns=2, sha256="ab")
    mark = FourBitMark(sha256="cd", offset=0.25)
    write_records(run, tmp_path / "base", ["data.path=pairs.jsonl"], files={"a": file}, marks={"layer": mark})
    return run


def rewritten(run: RunDir, change: Any) -> None:
    content = disk.read_json(run.record)
    change(content)
    rewrite_json(run.record, content)


def test_a_record_is_what_was_written(run: RunDir) -> None:
    before = run.record.read_text()
    record = read_record(run)
    assert record.version == VERSION and record.files["a"].bytes == 1 and record.found.optimizer == "adamw"
    assert record.four_bit is not None and record.four_bit["layer"].offset == 0.25
    write_record(run, record)
    assert run.record.read_text() == before


def test_what_a_newer_version_wrote_is_kept(run: RunDir) -> None:
    def newer(content: dict[str, Any]) -> None:
        content |= {"version": VERSION + 1, "processes": 2}
        for part in (content["found"], content["base"], content["data"], content["files"]["a"]):
            part["later"] = {"deep": [1, None]}

    rewritten(run, newer)
    before = run.record.read_text()
    record = read_record(run)
    assert record.more == {"processes": 2} and record.found.more == {"later": {"deep": [1, None]}}
    write_record(run, dataclasses.replace(record, found=dataclasses.replace(record.found, steps=7)))
    after = json.loads(run.record.read_text())
    assert after.pop("sha256") != json.loads(before)["sha256"]
    assert after.pop("found") == {**json.loads(before)["found"], "train.steps": 7}
    assert all(json.loads(before)[name] == value for name, value in after.items())


def test_a_record_of_0_1_0_has_no_version(run: RunDir) -> None:
    content = disk.read_json(run.record)
    disk.write_json(run.record, {name: value for name, value in content.items() if name not in ("version", "sha256")})
    run.environment.unlink()
    assert read_record(run).version == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda content: content.pop("found"), "it has no 'found'"),
        (lambda content: content["base"].pop("commit"), "it has no 'commit'"),
        (lambda content: content.update(files=[]), "run.json cannot be read"),
    ],
)
def test_a_damaged_record_is_one_message_that_names_the_file(run: RunDir, change: Any, says: str) -> None:
    rewritten(run, change)
    with pytest.raises(DiskError, match=says) as found:
        read_record(run)
    assert str(run.record) in str(found.value) and "--fresh" in str(found.value)


def test_a_torn_record_is_said(run: RunDir) -> None:
    run.record.write_text(run.record.read_text()[:100])
    with pytest.raises(DiskError, match="cannot be read"):
        read_record(run)


def test_a_damaged_run_does_not_hide_the_others(run: RunDir, tmp_path: Path) -> None:
    broken = RunDir(tmp_path / "runs" / "broken")
    broken.path.mkdir()
    broken.record.write_text("{")
    lines = run_lines(tmp_path / "runs")
    assert any("made" in line and "finished" in line for line in lines)
    assert any("broken" in line and "damaged" in line for line in lines)


def test_one_door_for_any_run_and_for_finished_ones(run: RunDir, tmp_path: Path) -> None:
    found = finished_run(run.path)
    assert isinstance(any_run(run.path), FinishedRun) and found.config().data.path == "pairs.jsonl"
    assert found.result.after["loss"] == 0.5 and found.environment.device.startswith("cpu")
    with pytest.raises(ConfigError, match="is not a run: it has no run.json"):
        finished_run(tmp_path)
    (run.adapter / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match="its adapter is missing"):
        finished_run(run.path)
    run.result.unlink()
    (run.checkpoints / "step-000003").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"not finished: it has no result.json yet \(saved after step 3 of 1\)"):
        finished_run(run.path)
    assert not isinstance(any_run(run.path), FinishedRun)


@pytest.mark.parametrize("verb", DOORS)
def test_every_verb_says_the_same_of_a_run_that_is_not_finished(run: RunDir, tmp_path: Path, verb: str) -> None:
    run.result.unlink()
    (tmp_path / "prompts.txt").write_text("a prompt\n")
    answer = qdpo(*(word.format(run=run.path) for word in DOORS[verb]), cwd=tmp_path, HF_TOKEN="hf_none")
    assert answer.returncode == 2, answer.stderr
    assert f"The run {run.path} is not finished: it has no result.json yet (nothing is saved yet)" in answer.stderr


def test_a_file_of_the_same_size_and_time_is_still_read(tmp_path: Path) -> None:
    """Images, archives and some mounts give every file one time, so a value of config.json can change without it."""
    file = tmp_path / "config.json"
    file.write_text('{"rms_norm_eps": 1e-6}')
    then = file_record(file)
    identity.check_files({str(file): then}, RunDir(tmp_path / "run"))
    file.write_text('{"rms_norm_eps": 1e-3}')
    os.utime(file, ns=(then.mtime_ns, then.mtime_ns))
    with pytest.raises(ConfigError, match=r"config\.json has changed .*: its contents differ"):
        identity.check_files({str(file): then}, RunDir(tmp_path / "run"))
