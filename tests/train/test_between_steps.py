"""Answers sampled at every evaluation, pairs before and after, findings that are said once and can stop a run."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdpo.errors import ConfigError, DataError, StoppedByFinding
from qdpo.run.folder import RunDir
from qdpo.run.lines import read_lines
from qdpo.run.metrics import read_metrics
from qdpo.run.record import Result
from qdpo.train.watch import samples
from qdpo.train.watch.samples import repetition
from tests.conftest import Quiet, write_jsonl

Train = Callable[..., tuple[Result, Quiet]]
SAMPLED = {"samples__count": "3", "samples__max_new_tokens": "8", "train__eval_every": "2"}


def run_of(settings: dict[str, str], name: str = "run") -> RunDir:
    return RunDir(Path(settings["output.dir"]) / name)


def test_prompts_are_completed_at_every_evaluation(train: Train, settings: dict[str, str]) -> None:
    result, watcher = train(train__steps="6", **SAMPLED)
    run = run_of(settings)
    lines = read_lines(run.samples)
    assert len(lines) == 3 and [each["step"] for each in lines[0]["during"]] == [2, 4, 6]
    assert all(line["after"] == line["during"][-1]["answer"] for line in lines)
    assert any(line["after"] != line["before"] for line in lines)
    records = [record for record in read_metrics(run.metrics) if "eval_loss" in record]
    assert [record["step"] for record in records] == [0, 2, 4, 6]
    assert records[-1]["eval_samples/tokens"] == result.samples.median_tokens_after <= 8
    assert watcher.text.count("sample with the adapter off:") == 1 and watcher.text.count("sample after step") == 3
    assert [what for what, _ in watcher.stages].count("completing sample prompts") == 4


def test_pairs_of_one_row_are_told_apart(train: Train, settings: dict[str, str], tmp_path: Path) -> None:
    rows = [
        {"prompt": f"tell me {n}", "chosen": "river stone", "rejected": ["a b c", f"garden {n}"]} for n in range(20)
    ]
    train(train__steps="2", data__path=str(write_jsonl(tmp_path / "several.jsonl", rows)))
    lines = read_lines(run_of(settings).eval_pairs)
    assert len(lines) == 8 and len({line["row"] for line in lines}) == 4
    assert all({"before", "after"} <= set(line) for line in lines)


def test_only_before_and_after_if_that_is_asked_for(train: Train, settings: dict[str, str]) -> None:
    train(train__steps="6", samples__every_eval="false", **SAMPLED)
    assert [each["step"] for each in read_lines(run_of(settings).samples)[0]["during"]] == [6]


def test_files_of_evaluations_are_resumed_byte_for_byte(train: Train, settings: dict[str, str]) -> None:
    every = {"train__steps": "6", "train__save_every": "2", "train__keep_checkpoints": "3", **SAMPLED}
    train(output__name="whole", **every)
    train(**every)
    run, whole = run_of(settings), run_of(settings, "whole")
    for saved, torn in ((4, "step-000006"), (2, "step-000004")):  # what a kill after the newest evaluation leaves
        run.result.unlink()
        for path in run.checkpoints.iterdir():
            if int(path.name[-6:]) > saved:
                shutil.rmtree(path)
        later = f'"step": {saved + 2}, "answer": "'
        assert later in run.samples.read_text()
        run.samples.write_text(run.samples.read_text().replace(later, f"{later}stale "))
        _, watcher = train(**every)
        assert f"resuming after step {saved}" in watcher.text, torn
        assert "with the adapter off" not in watcher.text
        assert run.samples.read_bytes() == whole.samples.read_bytes()
        assert run.eval_pairs.read_bytes() == whole.eval_pairs.read_bytes()


def test_held_out_pairs_before_and_after(train: Train, settings: dict[str, str]) -> None:
    result, _ = train(train__steps="6")
    lines = read_lines(run_of(settings).eval_pairs)
    assert [line["pair"] for line in lines] == list(range(len(lines))) and len(lines) == 8
    beta = 0.1
    for line in lines:
        before, after = line["before"], line["after"]
        gap = {name: part["logps/chosen"] - part["logps/rejected"] for name, part in (("0", before), ("1", after))}
        assert before["margin"] == 0 and after["step"] == 6
        assert after["margin"] == pytest.approx(beta * (gap["1"] - gap["0"]), abs=1e-4)
    for side in ("chosen", "rejected"):
        mean = sum(line["after"][f"logps/{side}"] for line in lines) / len(lines)
        assert mean == pytest.approx(result.after[f"logps/{side}"], rel=1e-6)


def test_prompts_of_a_file(train: Train, settings: dict[str, str], tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("tell me about the river\n\ntell me about the stone\n")
    train(train__steps="2", samples__prompts=str(text), **SAMPLED)
    lines = read_lines(run_of(settings).samples)
    assert [line["row"] for line in lines] == [1, 2] and "user\ntell me about the stone<|im_end|>" in lines[1]["prompt"]
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "tell me"}]
    rows = write_jsonl(tmp_path / "prompts.jsonl", [{"messages": turns}, {"prompt": "the river"}])
    train(train__steps="2", samples__prompts=str(rows), output__name="rows", **SAMPLED)
    lines = read_lines(run_of(settings, "rows").samples)
    assert "system\nBe brief." in lines[0]["prompt"] and "the river" in lines[1]["prompt"]


@pytest.mark.parametrize(("name", "text"), [("none.txt", None), ("empty.txt", "\n"), ("rows.jsonl", '{"other": 1}\n')])
def test_a_file_without_prompts_is_refused_before_anything_is_made(
    train: Train, settings: dict[str, str], tmp_path: Path, name: str, text: str | None
) -> None:
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    with pytest.raises(DataError, match=name):
        train(train__steps="2", samples__prompts=str(path), **SAMPLED)
    assert not run_of(settings).path.exists()


def test_other_prompts_on_resume_are_said(train: Train, settings: dict[str, str]) -> None:
    train(train__steps="4", train__save_every="2", **SAMPLED)
    run = run_of(settings)
    run.result.unlink()
    shutil.rmtree(run.checkpoints / "step-000004")
    _, watcher = train(train__steps="4", train__save_every="2", **{**SAMPLED, "samples__count": "2"})
    assert "starts again" in watcher.text
    lines = read_lines(run.samples)
    assert len(lines) == 2 and "before" in lines[0] and [each["step"] for each in lines[0]["during"]] == [4]


def test_too_little_memory_for_samples_costs_no_run(
    train: Train, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    def complete(*_: Any, batch: int, **__: Any) -> list[list[int]]:
        batches.append(batch)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(samples, "complete", complete)
    result, watcher = train(train__steps="2", **SAMPLED)
    assert batches[:2] == [25, 1] and "not enough memory to complete" in watcher.text and result.samples is None


def test_repetition_is_the_share_of_pieces_that_stood_before() -> None:
    assert repetition([]) == repetition([1, 2, 3]) == repetition(list(range(50))) == 0
    assert repetition([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)
    assert repetition([7] * 104) == pytest.approx(100 / 101)


def test_a_run_stops_on_what_it_was_told_and_goes_on_without(train: Train, settings: dict[str, str]) -> None:
    lost = {"train__steps": "24", "train__learning_rate": "0.03"}
    whole, _ = train(output__name="whole", **lost)
    with pytest.raises(
        StoppedByFinding, match=r"train.stop_when=runaway after step \d+ of 24, which is saved"
    ) as error:
        train(train__stop_when="stuck+runaway", **lost)
    assert error.value.exit_code == 8
    run = run_of(settings)
    stopped = read_metrics(run.metrics)[-1]["step"]
    assert 8 <= stopped < 24 and (run.checkpoints / f"step-{stopped:06d}").is_dir() and not run.result.exists()
    with pytest.raises(StoppedByFinding, match=f"after step {stopped}"):  # nothing has changed: not a step more
        train(train__stop_when="stuck+runaway", **lost)
    result, watcher = train(train__stop_when="none", **lost)
    assert f"resuming after step {stopped}" in watcher.text and "warning: runaway" in watcher.text
    weights = [(run_of(settings, name).adapter / "adapter_model.safetensors").read_bytes() for name in ("whole", "run")]
    assert weights[0] == weights[1] and result.after == whole.after


def test_a_finding_is_said_once(train: Train) -> None:
    _, watcher = train(train__steps="16", train__learning_rate="0.03")
    assert watcher.text.count("warning: runaway") == 1


def test_an_unknown_finding_is_refused(train: Train) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'displacement'"):
        train(train__stop_when="displacment")


def test_samples_file_is_json_lines_with_the_names_it_always_had(train: Train, settings: dict[str, str]) -> None:
    train(train__steps="2", **SAMPLED)
    line = json.loads(run_of(settings).samples.read_text().splitlines()[0])
    assert {"row", "prompt", "before", "after", "before_tokens", "after_tokens"} <= line.keys()
