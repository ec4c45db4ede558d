"""A whole run as a user sees it: results, files, resuming, caching, and every way it can go wrong."""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qdpo.errors import ConfigError, DataError, DiskError, Interrupted, VerificationError
from qdpo.model.policy import adapter
from qdpo.run import lock
from qdpo.run.folder import RunDir
from qdpo.run.metrics import read_metrics
from qdpo.run.record import Result, read_result
from qdpo.settings import layered
from qdpo.train.loop import run_training
from qdpo.train.policy import reference_cache
from tests.conftest import Quiet, arguments, qdpo, start_qdpo, tiny_rows, write_jsonl

Train = Callable[..., tuple[Result, Quiet]]


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def folder_of(settings: dict[str, str], name: str = "run") -> Path:
    return Path(settings["output.dir"]) / name


def test_a_run_from_the_command_line(settings: dict[str, str], tmp_path: Path) -> None:
    words = arguments(
        settings, train__epochs="3", samples__count="3", samples__max_new_tokens="12", model__quantization="nf4"
    )
    first = qdpo("run", *words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    run = RunDir(folder_of(settings))
    result = read_result(run)
    assert result.before["rewards/accuracies"] == 0.5 and result.after["rewards/accuracies"] >= 0.9
    assert "layout: " in first.stdout and "step 24/24" in first.stdout and "qdpo eval" in first.stdout
    for path in (run.config, run.environment, run.data_report, run.train_pairs, run.metrics, run.samples, run.card):
        assert path.is_file(), path
    assert {json.loads(line)["step"] for line in run.metrics.read_text().splitlines()} == set(range(25))
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in run.adapter.iterdir())
    assert str(tmp_path) not in run.card.read_text()

    again = qdpo("run", *words, cwd=tmp_path)
    assert again.returncode == 0 and "is finished" in again.stdout and "step 1/" not in again.stdout

    listed = qdpo("runs", cwd=tmp_path)
    assert "finished" in listed.stdout and "0.500 → " in listed.stdout

    scored = qdpo("eval", str(run.path), "--json", cwd=tmp_path)
    assert scored.returncode == 0, scored.stderr
    values = json.loads(scored.stdout)
    for name, value in result.after.items():
        assert values[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    per_token = values["logps/chosen"] / values["lengths/chosen"]  # 8 answers and their tokens: means cancel the 8
    assert values["perplexity/chosen"] == pytest.approx(math.exp(-per_token), rel=1e-4)

    other = write_jsonl(tmp_path / "other.jsonl", tiny_rows(10, seed=9))
    elsewhere = qdpo("eval", str(run.path), f"data.path={other}", cwd=tmp_path)
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert f"on 10 pairs of {other}" in elsewhere.stdout, elsewhere.stdout
    assert "reference log-probs" in elsewhere.stdout, elsewhere.stdout

    fresh = qdpo("run", *words, "--fresh", cwd=tmp_path)
    assert fresh.returncode == 0 and "the earlier run is kept" in fresh.stdout
    assert weights(run.path) == weights(run.path.with_name("run.old-1"))


def test_a_finished_run_whose_adapter_is_gone_is_brought_to_its_end_again(
    settings: dict[str, str], train: Train, tmp_path: Path
) -> None:
    train(train__steps="4")
    folder = folder_of(settings)
    before = weights(folder)
    shutil.rmtree(folder / "adapter")
    again = qdpo("run", *arguments(settings, train__steps="4"), cwd=tmp_path)
    assert again.returncode == 0 and "resuming after step 4 of 4" in again.stdout, again.stderr
    assert weights(folder) == before


def test_the_adapter_loads_with_plain_peft(train: Train, settings: dict[str, str], tiny_base: Path) -> None:
    result, _ = train(train__steps="6")
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    plain = PeftModel.from_pretrained(base, folder_of(settings) / "adapter")
    config = json.loads((folder_of(settings) / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_base) and config["target_modules"] == sorted(
        config["target_modules"]
    )
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        on = plain(ids).logits
        with plain.disable_adapter():
            assert not torch.allclose(on, plain(ids).logits, atol=1e-3)
    saved = load_file(folder_of(settings) / "adapter" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values()) and len(saved) == 28


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_interrupted_and_continued_equals_uninterrupted(
    settings: dict[str, str], tmp_path: Path, optimizer: str
) -> None:
    words = arguments(settings, train__steps="30", train__optimizer=optimizer, model__quantization="nf4")
    golden = qdpo("run", *(w.replace("output.name=run", "output.name=golden") for w in words), cwd=tmp_path)
    assert golden.returncode == 0, golden.stderr
    process = start_qdpo("run", *words, cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 4/30"):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "The same command continues" in errors and "Traceback" not in errors
    stopped = qdpo("runs", cwd=tmp_path)
    assert "saved after step" in stopped.stdout
    rest = qdpo("run", *words, cwd=tmp_path)
    assert rest.returncode == 0 and "resuming after step" in rest.stdout and "no pass needed" in rest.stdout
    run, whole = folder_of(settings), folder_of(settings, "golden")
    assert weights(run) == weights(whole)

    def trajectory(folder: Path) -> list[tuple[int, float]]:
        return [(r["step"], r["loss"]) for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]

    assert trajectory(run) == trajectory(whole) and len(trajectory(run)) == 30


def test_a_second_ctrl_c_leaves_at_once(settings: dict[str, str], tmp_path: Path) -> None:
    words = arguments(settings, train__steps="6", train__pairs_per_step="8", memory__tokens_per_row="0")
    process = start_qdpo("run", *words, cwd=tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(("step 2/6", "stopping:")):
            process.send_signal(signal.SIGINT)
        if line.startswith("stopping:"):
            break
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped at once" in errors and "The same command" not in errors
    assert qdpo("run", *words, cwd=tmp_path).returncode == 0


class StopsAt(Quiet):
    """Sends Ctrl-C to this process while the named stage runs."""

    def __init__(self, stage: str, after: int):
        super().__init__()
        self.stage, self.left = stage, after

    def advance(self, units: int) -> None:
        if self.stages[-1][0] == self.stage:
            self.left -= units
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGTERM)


def test_an_interrupted_reference_pass_keeps_what_it_computed(settings: dict[str, str], train: Train) -> None:
    stopping = StopsAt("reference log-probs", 7)
    alone = {"train__epochs": "1", "memory__tokens_per_row": "0"}  # a row is a pair
    with pytest.raises(Interrupted, match="all finished pairs are in the cache") as stopped:
        run_training(layered.resolve(arguments(settings, **alone)), stopping)
    assert stopped.value.exit_code == 143
    _, rest = train(**alone)
    assert ("reference log-probs", 40 - 7) in rest.stages


def test_a_damaged_checkpoint_is_set_aside(train: Train, settings: dict[str, str]) -> None:
    train(train__steps="6", train__save_every="2", train__keep_checkpoints="3")
    folder = folder_of(settings)
    expected = weights(folder)
    (folder / "result.json").unlink()
    for name in ("step-000004", "step-000006"):
        victim = folder / "checkpoints" / name / "optimizer.safetensors"
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        victim.write_bytes(content)
    _, watcher = train(train__steps="6", train__save_every="2", train__keep_checkpoints="3")
    assert watcher.text.count("is damaged") == 2 and "resuming after step 2" in watcher.text
    assert weights(folder) == expected


def test_other_settings_need_no_reference_pass(train: Train) -> None:
    _, first = train(train__epochs="1")
    assert ("reference log-probs", 40) in first.stages
    changes = {"loss__beta": "0.3", "adapter__rank": "8", "train__learning_rate": "5e-4", "train__seed": "3"}
    for name, value in changes.items():
        _, watcher = train(train__epochs="1", output__name=name, **{name: value})
        assert "no pass needed" in watcher.text and "reference log-probs" not in dict(watcher.stages), name


def test_other_weights_or_tokens_need_one(
    train: Train, settings: dict[str, str], tiny_base: Path, tmp_path: Path
) -> None:
    train(train__steps="2")
    other = Path(shutil.copytree(tiny_base, tmp_path / "other"))
    content = bytearray((other / "model.safetensors").read_bytes())
    content[-40] ^= 1
    (other / "model.safetensors").write_bytes(content)
    for change in ({"model__path": str(other)}, {"model__quantization": "nf4"}, {"data__system": "Be brief."}):
        name = next(iter(change))
        _, watcher = train(train__steps="2", output__name=name, **change)
        assert any(what == "reference log-probs" for what, _ in watcher.stages), name


def test_a_wrong_cache_is_noticed(train: Train, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    train(train__steps="2")
    get = reference_cache.ReferenceCache.get
    monkeypatch.setattr(
        reference_cache.ReferenceCache,
        "get",
        lambda self, pair: tuple(part - 1 for part in get(self, pair) or ()) or None,
    )
    with pytest.raises(VerificationError, match="does not belong to this model"):
        train(train__steps="2", output__name="second")


def test_a_start_adapter_is_continued_and_is_its_own_reference(train: Train, settings: dict[str, str]) -> None:
    train(train__steps="8")
    start = str(folder_of(settings) / "adapter")
    _, own = train(train__steps="3", output__name="own", adapter__start=start)
    assert own.records[0]["eval_rewards/margins"] == 0 and own.records[0]["eval_rewards/accuracies"] == 0.5
    result, base = train(train__steps="3", output__name="base", adapter__start=start, adapter__reference="base")
    assert result.before["rewards/margins"] > 0.01
    first, second = (load_file(folder_of(settings, n) / "adapter" / adapter.WEIGHTS) for n in ("run", "own"))
    assert first.keys() == second.keys() and any(not torch.equal(first[k], second[k]) for k in first)


def test_resuming_a_start_adapter_with_an_empty_cache(train: Train, settings: dict[str, str]) -> None:
    """The reference is the start adapter's, also when it must be computed again after training began."""
    train(train__steps="8")
    start = str(folder_of(settings) / "adapter")
    more = {"train__steps": "6", "train__save_every": "3", "train__keep_checkpoints": "2", "adapter__start": start}
    train(output__name="whole", **more)
    train(output__name="parts", **more)
    parts = folder_of(settings, "parts")
    (parts / "result.json").unlink()
    shutil.rmtree(parts / "checkpoints" / "step-000006")
    shutil.rmtree(Path(settings["cache.dir"]))
    _, watcher = train(output__name="parts", **more)
    assert "resuming after step 3" in watcher.text and weights(parts) == weights(folder_of(settings, "whole"))


def test_the_loss_scale_of_fp16_is_resumed(train: Train, settings: dict[str, str]) -> None:
    half = {"train__steps": "6", "train__save_every": "3", "model__dtype": "fp16"}
    train(**half)
    folder, expected = folder_of(settings), weights(folder_of(settings))
    state = json.loads((folder / "checkpoints" / "step-000003" / "state.json").read_text())
    assert state["scaler"]["scale"] > 1 and state["step"] == 3
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-000006")
    _, watcher = train(**half)
    assert "resuming after step 3" in watcher.text and weights(folder) == expected


def test_separate_sequences_reach_the_same_result(train: Train) -> None:
    shared, _ = train(train__steps="5")
    separate, _ = train(train__steps="5", model__attention="eager", output__name="separate")
    assert separate.after["rewards/margins"] == pytest.approx(shared.after["rewards/margins"], rel=1e-3)


def test_hours_shorten_the_run(train: Train) -> None:
    result, watcher = train(train__epochs="500", train__hours="0.003", train__eval_every="100000")
    assert "steps fit" in watcher.text and 1 < result.steps < 4000
    assert result.seconds < 3 * 0.003 * 3600


def test_changed_settings_and_files_are_refused(train: Train, settings: dict[str, str], pairs_file: Path) -> None:
    train(train__steps="2")
    with pytest.raises(ConfigError, match=r"loss.beta: was 0.1, now 0.2"):
        train(train__steps="2", loss__beta="0.2")
    (folder_of(settings) / "result.json").unlink()
    write_jsonl(pairs_file, tiny_rows(41))
    with pytest.raises(ConfigError, match="pairs.jsonl has .* bytes"):
        train(train__steps="2")


def test_a_changed_model_file_is_refused(
    train: Train, settings: dict[str, str], tiny_base: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    train(train__steps="2", model__path=str(base))
    (folder_of(settings) / "result.json").unlink()
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-40] ^= 1
    time.sleep(0.01)
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match="model.safetensors has changed .*: its contents differ"):
        train(train__steps="2", model__path=str(base))


def test_two_processes_on_one_run(settings: dict[str, str], train: Train) -> None:
    from filelock import FileLock

    run = RunDir(folder_of(settings))
    run.path.parent.mkdir(parents=True)
    with FileLock(run.lock), pytest.raises(ConfigError, match="Another process is working on"):
        train(train__steps="2")


def test_never_two_at_once_work_on_a_run(tmp_path: Path) -> None:
    """Many come and go, so that one takes the lock while another gives it back."""
    run, inside, most, entered = RunDir(tmp_path / "run"), set[int](), 0, 0
    until = time.monotonic() + 2

    def come_and_go(number: int) -> None:
        nonlocal most, entered
        while time.monotonic() < until:
            with suppress(ConfigError), lock.exclusive(run):
                inside.add(number)
                most, entered = max(most, len(inside)), entered + 1
                time.sleep(0.0003)
                inside.remove(number)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(come_and_go, range(6)))
    assert most == 1 and entered > 6 and not list(tmp_path.iterdir())


BAD_INPUT = {
    "missing data": ({"data__path": "nowhere.jsonl"}, 3, "nowhere.jsonl"),
    "empty data": ({"data__path": "EMPTY"}, 3, "empty.jsonl"),
    "no model folder": ({"model__path": "./nowhere"}, 2, "nowhere"),
    "not a model folder": ({"model__path": "FOLDER"}, 2, "config.json"),
    "no CUDA": ({"model__device": "cuda"}, 2, "qdpo run preset=demo"),
    "wrong adapter": ({"adapter__start": "FOLDER"}, 2, "adapter_config.json"),
    "head as target": ({"adapter__targets": "lm_head"}, 2, "lm_head"),
    "no such layers": ({"adapter__targets": "nonsense"}, 2, "nonsense"),
    "everything too long": ({"data__max_tokens": "9"}, 3, "prompt_too_long"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_paragraph_and_leaves_nothing(settings: dict[str, str], tmp_path: Path, case: str) -> None:
    change, code, named = BAD_INPUT[case]
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "folder").mkdir()
    places = {"EMPTY": str(tmp_path / "empty.jsonl"), "FOLDER": str(tmp_path / "folder")}
    words = arguments(settings, **{name: places.get(value, value) for name, value in change.items()})
    answer = qdpo("run", *words, cwd=tmp_path)
    assert answer.returncode == code and named in answer.stderr, answer.stderr
    assert "Traceback" not in answer.stderr and answer.stderr.startswith("qdpo: ")
    left = [p for p in Path(settings["output.dir"]).rglob("*")] if Path(settings["output.dir"]).exists() else []
    assert case in ("head as target", "no such layers") or left == []


def test_an_output_folder_that_cannot_be_made(train: Train, pairs_file: Path) -> None:
    with pytest.raises(DiskError, match="Cannot write"):
        train(train__steps="2", output__dir=str(pairs_file))


def test_a_full_disk_is_said_before_the_start(
    train: Train, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(DiskError, match="0.0 GiB free"):
        train(train__steps="2")
    assert not folder_of(settings).exists()


def test_every_dropped_row_is_reported(train: Train, settings: dict[str, str], pairs_file: Path) -> None:
    rows = tiny_rows(40)
    rows[3]["chosen"] = ""
    rows[7]["chosen"] = rows[7]["rejected"]
    write_jsonl(pairs_file, rows)
    _, watcher = train(train__steps="2")
    report = [json.loads(line) for line in RunDir(folder_of(settings)).data_report.read_text().splitlines()]
    assert {(r["row"], r["reason"]) for r in report} == {(4, "empty_response"), (8, "identical_responses")}
    assert "2 dropped" in watcher.text


def test_no_usable_pair(train: Train, pairs_file: Path) -> None:
    write_jsonl(pairs_file, [{"prompt": "a", "chosen": "same", "rejected": "same"}] * 3)
    with pytest.raises(DataError, match="identical_responses"):
        train(train__steps="2")


def test_preset_settings_are_kept_in_the_run(settings: dict[str, str], train: Train) -> None:
    train(train__steps="2")
    resolved = layered.resolve([str(folder_of(settings) / "config.toml")])
    assert resolved.config.train.steps == 2 and resolved.config.loss.beta == 0.1
