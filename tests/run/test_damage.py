"""Damage to a run's small files: told by digests, named, rebuilt where that is possible, and never followed out."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdpo.collect.candidates import Answer, Candidates
from qdpo.collect.decisions import Decisions
from qdpo.data import prepare, stored
from qdpo.data.tokens.store import TokenPair, save_pairs
from qdpo.errors import ConfigError, DataError, DiskError
from qdpo.report.screen.runs import run_lines
from qdpo.run import disk, lines, seal
from qdpo.run.finished import any_run
from qdpo.run.folder import RunDir
from qdpo.run.metrics import record_of
from qdpo.run.record import file_record, read_record, read_result, write_record
from tests.faults.run_files import edit, exchange, flip, leaves, swap_lengths
from tests.run.made import finished_without_model, rewrite_json

VOCABULARY = 400
MOUNTS = os.name == "posix" and os.geteuid() == 0


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A finished run's records with two prepared training pairs and one held-out pair, and nothing of a model."""
    made = finished_without_model(tmp_path / "runs" / "made")
    pairs = [TokenPair(*(np.array(ids, np.int32) for ids in ([1, 2], [3], [4, 5])), row=row) for row in (1, 2, 3)]
    save_pairs(made.train_pairs, pairs[:2])
    save_pairs(made.held_out_pairs, pairs[2:])
    content = disk.read_json(made.record)
    content["data"]["train_pairs"] = 2
    content["prepared"] = {path.name: file_record(path).sha256 for path in (made.train_pairs, made.held_out_pairs)}
    rewrite_json(made.record, content)
    return made


def test_every_changed_value_of_a_record_is_noticed(run: RunDir) -> None:
    before = run.record.read_text()
    count = len(list(leaves(json.loads(before))))
    for number in range(count):
        for odd in (None, 7919, "other"):
            content = json.loads(before)
            holder, key = list(leaves(content))[number]
            if holder[key] == odd and isinstance(odd, type(holder[key])):
                continue
            holder[key] = odd
            run.record.write_text(json.dumps(content))
            with pytest.raises(DiskError, match=r"run\.json cannot be read.*--fresh"):
                read_record(run)
        content = json.loads(before)
        holder, key = list(leaves(content))[number]
        del holder[key]
        run.record.write_text(json.dumps(content))
        with pytest.raises(DiskError, match=r"run\.json"):
            read_record(run)


def test_every_turned_bit_of_a_record_is_noticed_or_changes_nothing(run: RunDir) -> None:
    before, whole = run.record.read_bytes(), read_record(run)
    rng = random.Random(0)
    for _ in range(300):
        run.record.write_bytes(before)
        flip(run.record, rng.random(), rng.randrange(8))
        try:
            assert read_record(run) == whole  # another white space, say
        except DiskError as error:
            assert "run.json" in str(error)


def test_a_digest_cannot_be_taken_off(run: RunDir) -> None:
    content = disk.read_json(run.record)
    del content["sha256"]
    disk.write_json(run.record, content)
    with pytest.raises(DiskError, match="its sha256 is missing"):
        read_record(run)
    content["version"] = 2
    disk.write_json(run.record, content)
    with pytest.raises(DiskError, match="its sha256 is missing"):  # the other files of the run have one
        read_record(run)
    del content["version"]
    disk.write_json(run.record, content)
    with pytest.raises(DiskError, match="its sha256 is missing"):
        read_record(run)


def test_a_record_without_digest_opens_and_gets_one(run: RunDir) -> None:
    content = disk.read_json(run.record)
    disk.write_json(run.record, {**{n: v for n, v in content.items() if n not in ("sha256", "prepared")}, "version": 2})
    for path in (run.environment, run.result):
        disk.write_json(path, {name: value for name, value in disk.read_json(path).items() if name != seal.KEY})
    record = read_record(run)
    assert record.prepared is None and any_run(run.path).record == record
    assert len(stored.load(run)[0]) == 2
    write_record(run, record)
    assert seal.KEY in disk.read_json(run.record)
    assert read_record(run).version == 3


@pytest.mark.parametrize("steps", [0, -1, 10**30, float("nan"), float("inf"), "2", [], True, 2.5])
def test_a_length_that_no_run_has_is_refused_in_old_records_too(run: RunDir, steps: Any) -> None:
    content = disk.read_json(run.record)
    content["found"]["train.steps"] = steps
    del content["version"], content["sha256"]
    run.environment.unlink()
    disk.write_json(run.record, content)
    with pytest.raises(DiskError, match=r"run\.json cannot be read: (train\.)?steps is"):
        read_record(run)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: edit(path, "ids", 0.3, 9), lambda path: edit(path, "lengths", 0.0, 1), swap_lengths, exchange,
        lambda path: edit(path, "rows", 0.0, 5), lambda path: path.write_bytes(path.read_bytes()[:-4]),
        lambda path: path.write_bytes(b""), lambda path: path.unlink(), lambda path: flip(path, 1.0, 0),
        lambda path: path.write_bytes(b"\xff" * 64), lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), os.mkfifo(path)), lambda path: save_pairs(path, []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "0.1.0"])
def test_damaged_pairs_are_named(run: RunDir, damage: Callable[[Path], object], sealed: bool) -> None:
    """A run of 0.1.0 has no digests: what does not fit together is still noticed, another id is not."""
    if not sealed:
        content = disk.read_json(run.record)
        rewrite_json(run.record, {name: value for name, value in content.items() if name != "prepared"})
        before = run.train_pairs.read_bytes()
    damage(run.train_pairs)
    if not sealed and run.train_pairs.is_file() and len(run.train_pairs.read_bytes()) == len(before):
        return
    with pytest.raises((DataError, DiskError), match=r"train\.safetensors.*--fresh"):
        stored.load(run)


def test_pairs_of_another_run_are_not_taken(run: RunDir) -> None:
    pairs, held_out = stored.load(run)
    save_pairs(run.train_pairs, [pairs[1], pairs[0]])
    save_pairs(run.held_out_pairs, list(held_out))
    with pytest.raises(DataError, match=r"train\.safetensors.*sha256"):
        stored.load(run)


@pytest.mark.parametrize("wrong", [-1, -(2**31), VOCABULARY, 2**31 - 1])
def test_ids_are_held_to_the_vocabulary(run: RunDir, wrong: int) -> None:
    tokenizer = type("T", (), {"__len__": lambda self: VOCABULARY, "convert_ids_to_tokens": lambda self, n: "x"})()
    prepare.check_ids(stored.load(run)[0], VOCABULARY, tokenizer)
    edit(run.train_pairs, "ids", 0.9, wrong)
    content = disk.read_json(run.record)
    rewrite_json(run.record, {name: value for name, value in content.items() if name != "prepared"})
    pairs = stored.load(run)[0]
    for which in (pairs, list(pairs), pairs[:]):
        with pytest.raises(DataError, match=f"Row 2 has the token id {wrong},"):
            prepare.check_ids(which, VOCABULARY, tokenizer)


def test_a_run_whose_files_are_odd_does_not_hide_the_others(run: RunDir, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    for name in ("list", "empty", "pipe", "folder", "loop", "gone", "bytes"):
        (folder / name / "prepared").mkdir(parents=True)
    (folder / "list" / "run.json").write_text("[]")
    (folder / "empty" / "run.json").write_text("")
    (folder / "bytes" / "run.json").write_bytes(b"\xff\0")
    os.mkfifo(folder / "pipe" / "run.json")
    (folder / "folder" / "run.json").mkdir()
    (folder / "loop" / "run.json").symlink_to(folder / "loop" / "run.json")
    (folder / "file").write_text("")
    (folder / "link").symlink_to(folder / "absent")
    os.mkfifo(folder / "queue")
    text = run_lines(folder)
    assert sum("damaged" in line for line in text) == 7 and any("made" in line and "finished" in line for line in text)


GOOD_LINES = {
    "metrics.jsonl": ({"step": 3, "loss": 0.5, "kl": None}, lines.is_metric),
    "samples.jsonl": (
        {"row": 1, "prompt": "p", "before": "b", "before_tokens": 1, "before_cut": False, "before_repetition": 0.0},
        lines.is_sampled,
    ),
    "eval_pairs.jsonl": (
        {"pair": 0, "row": 1, "before": {"step": 0, "logps/chosen": -1.0, "logps/rejected": -2, "margin": 0.0}},
        lines.is_scored,
    ),
    "data_report.jsonl": ({"row": 1, "action": "cut", "reason": "too_long"}, lines.is_row_note),
}


@pytest.mark.parametrize("before", ["", "eval_"])
def test_a_record_without_one_of_its_metrics_is_damaged(before: str) -> None:
    whole = {"step": 1, **{f"{before}{name}": 0.5 for name in ("loss", "rewards/chosen", *lines.MEASURED)}}
    assert lines.is_metric(whole) and record_of({**whole, f"{before}lengths/chosen": None}).keys() == whole.keys()
    for name in ("loss", *lines.MEASURED):
        assert not lines.is_metric({key: value for key, value in whole.items() if key != f"{before}{name}"})


@pytest.mark.parametrize("name", GOOD_LINES)
@pytest.mark.parametrize("bad", [b"\0\0\0", b"\xff\xfe{}", b"[]", b"", b"{", b'{"step": "x"}', b"[" * 99999, b"null"])
def test_a_damaged_line_is_named_or_set_aside(tmp_path: Path, name: str, bad: bytes) -> None:
    value, is_sound = GOOD_LINES[name]
    path, line = tmp_path / name, json.dumps(value).encode()
    path.write_bytes(line + b"\n" + bad + b"\n" + line + b"\n" + line[:7])
    with pytest.raises(DiskError, match=f"{name} line 2 is damaged"):
        lines.read_lines(path, is_sound)
    said: list[str] = []
    assert lines.mend_lines(path, is_sound, said.append) == [value, value] and f"{name} line 2" in said[0]
    assert bad in (tmp_path / f"damaged-{name}").read_bytes() and lines.read_lines(path, is_sound) == [value, value]


@pytest.mark.parametrize(
    "bad", [b"\0", b"\xff", b"[]", b"null", b'{"prompt": 3, "kind": "pick"}', b"{" * 9, b"[" * 99999]
)
def test_a_damaged_line_of_the_journal_is_named(tmp_path: Path, bad: bytes) -> None:
    items = [Candidates("p", (Answer("a"), Answer("b")), "here")]
    (tmp_path / "pairs.decisions.jsonl").write_bytes(bad + b"\n")
    with pytest.raises(DataError, match=r"pairs\.decisions\.jsonl line 1"):
        Decisions(tmp_path / "pairs.jsonl", items)


def test_a_damaged_result_is_named(run: RunDir) -> None:
    run.result.write_bytes(run.result.read_bytes()[:-30])
    with pytest.raises(DiskError, match=r"result\.json"):
        read_result(run)
    run.record.unlink()
    with pytest.raises(ConfigError, match="is not a run"):
        read_record(run)
