"""A run that was stopped and then damaged: it goes on to the same adapter and says what it mended, or stops by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qdpo.data.tokens.store import load_pairs
from qdpo.errors import ConfigError, DataError, DiskError
from qdpo.run import disk, seal
from qdpo.run.folder import RunDir
from qdpo.run.record import read_record
from qdpo.settings import layered
from qdpo.train import between_steps
from qdpo.train.loop import run_training
from tests.conftest import Quiet, arguments, save_tiny_base, tiny_rows, write_jsonl
from tests.faults.run_files import edit, exchange, flip, insert, swap_lengths
from tests.run.made import rewrite_json

CHANGES = {"train__steps": "2", "train__save_every": "1", "train__eval_every": "1", "samples__count": "1",
           "samples__max_new_tokens": "4", "train__keep_checkpoints": "3"}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], bytes]:
    """The settings of a run of 2 steps, and its adapter; the run is then put back to where it was after step 1."""
    here = tmp_path_factory.mktemp("whole")
    settings = {
        "model.path": str(tiny_base), "model.quantization": "none", "model.dtype": "fp32", "model.device": "cpu",
        "data.path": str(write_jsonl(here / "pairs.jsonl", tiny_rows(12))), "data.eval_fraction": "0.2",
        "train.pairs_per_step": "4", "train.learning_rate": "1e-3", "train.optimizer": "adamw",
        "output.dir": str(here / "runs"), "output.name": "run", "cache.dir": str(here / "cache"),
    }  # fmt: skip
    run_training(layered.resolve(arguments(settings, **CHANGES)), Quiet())
    run = RunDir(here / "runs" / "run")
    adapter = (run.adapter / "adapter_model.safetensors").read_bytes()
    run.result.unlink()
    shutil.rmtree(run.adapter)
    shutil.rmtree(run.checkpoints / "step-000002")
    return settings, adapter


@pytest.fixture
def stopped(whole: tuple[dict[str, str], bytes], tmp_path: Path) -> RunDir:
    return RunDir(Path(shutil.copytree(whole[0]["output.dir"], tmp_path / "runs")) / "run")


@pytest.fixture
def resume(whole: tuple[dict[str, str], bytes], tmp_path: Path) -> Callable[..., str]:
    """Continues the stopped run; returns what was said. The adapter must be that of the whole run."""

    def act(**changes: str) -> str:
        watcher, settings = Quiet(), {**whole[0], "output.dir": str(tmp_path / "runs")}
        run_training(layered.resolve(arguments(settings, **{**CHANGES, **changes})), watcher)
        assert (tmp_path / "runs/run/adapter/adapter_model.safetensors").read_bytes() == whole[1]
        return watcher.text

    return act


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: edit(path, "ids", 0.3, 9), swap_lengths, exchange, lambda path: path.unlink(),
        lambda path: shutil.rmtree(path.parent),
    ],
    ids=["one id", "lengths swapped", "exchanged", "missing", "no folder"],
)  # fmt: skip
def test_damaged_pairs_are_prepared_again(
    stopped: RunDir, resume: Callable[..., str], damage: Callable[[Path], object]
) -> None:
    before = stopped.train_pairs.read_bytes(), stopped.held_out_pairs.read_bytes()
    damage(stopped.train_pairs)
    said = resume()
    assert "train.safetensors cannot be used" in said and "preparing the pairs again" in said
    assert before == (stopped.train_pairs.read_bytes(), stopped.held_out_pairs.read_bytes())


def test_pairs_that_were_cut_at_the_models_positions_are_prepared_again(tmp_path: Path) -> None:
    """data.max_tokens is lowered at the start of a run; the same must hold where the pairs are prepared again."""
    base = save_tiny_base(tmp_path / "base", max_position_embeddings=40)
    settings = {
        "model.path": str(base), "model.quantization": "none", "model.dtype": "fp32", "model.device": "cpu",
        "data.path": str(write_jsonl(tmp_path / "pairs.jsonl", tiny_rows(12))), "data.max_drop_fraction": "1",
        "train.pairs_per_step": "2", "train.optimizer": "adamw", "output.dir": str(tmp_path / "runs"),
        "output.name": "run", "cache.dir": str(tmp_path / "cache"),
    }  # fmt: skip
    changes = {**CHANGES, "data__eval_fraction": "0.2"}
    run_training(layered.resolve(arguments(settings, **changes)), Quiet())
    run = RunDir(tmp_path / "runs" / "run")
    before = run.train_pairs.read_bytes()
    longest = int(load_pairs(run.train_pairs).lengths.sum(1).max())
    assert longest < 80
    run.result.unlink()
    shutil.rmtree(run.adapter)
    edit(run.train_pairs, "ids", 0.3, 9)
    watcher = Quiet()
    run_training(layered.resolve(arguments(settings, **changes)), watcher)
    assert "data.max_tokens: 40, the positions" in watcher.text and "preparing the pairs again" in watcher.text
    assert run.train_pairs.read_bytes() == before


def test_damaged_pairs_of_data_that_give_others_now_stop_the_run(stopped: RunDir, resume: Callable[..., str]) -> None:
    """As a template does that prints today's date: the record says what was trained so far."""
    edit(stopped.train_pairs, "ids", 0.3, 9)
    damaged = stopped.train_pairs.read_bytes()
    content = disk.read_json(stopped.record)
    content["prepared"]["train.safetensors"] = "0" * 64
    rewrite_json(stopped.record, content)
    with pytest.raises(DataError, match=r"train\.safetensors.*--fresh.*give other pairs now"):
        resume()
    assert stopped.train_pairs.read_bytes() == damaged


@pytest.mark.parametrize(("name", "value"), [("train.warmup_steps", 0), ("train.steps", 1), ("total_pairs", 4)])
def test_found_values_that_were_edited_stop_the_run(
    stopped: RunDir, resume: Callable[..., str], name: str, value: int
) -> None:
    content = disk.read_json(stopped.record)
    assert content["found"][name] != value
    content["found"][name] = value
    disk.write_json(stopped.record, content)
    with pytest.raises(DiskError, match=r"run\.json cannot be read: its contents do not match its sha256.*--fresh"):
        resume()


@pytest.mark.parametrize("wrong", [-1, 2**30])
def test_ids_outside_the_vocabulary_stop_a_resumed_run_of_an_earlier_version(
    stopped: RunDir, resume: Callable[..., str], wrong: int
) -> None:
    content = {**disk.read_json(stopped.record), "version": 2}
    disk.write_json(stopped.record, {name: v for name, v in content.items() if name not in ("prepared", seal.KEY)})
    stopped.environment.unlink()
    edit(stopped.train_pairs, "ids", 0.5, wrong)
    with pytest.raises(DataError, match=f"has the token id {wrong}"):
        resume()


def test_a_run_of_an_earlier_version_gets_digests(stopped: RunDir, resume: Callable[..., str]) -> None:
    content = {**disk.read_json(stopped.record), "version": 2}
    disk.write_json(stopped.record, {name: v for name, v in content.items() if name not in ("prepared", seal.KEY)})
    about = disk.read_json(stopped.environment)
    disk.write_json(stopped.environment, {name: v for name, v in about.items() if name != seal.KEY})
    resume()
    record = read_record(stopped)
    assert record.version == 3 and set(record.prepared or {}) == {"train.safetensors", "held_out.safetensors"}
    assert "sha256" not in record.more


def test_what_can_be_rebuilt_is_rebuilt_and_said(stopped: RunDir, resume: Callable[..., str]) -> None:
    insert(stopped.metrics, 0.9, b"\n\0\0\n")
    insert(stopped.samples, 0.5, b"\xff")
    stopped.eval_pairs.unlink()
    flip(stopped.environment, 0.5, 7)
    stopped.config.write_bytes(b"\xff = [")
    said = resume()
    for part in ("metrics.jsonl line", "samples.jsonl line", "eval_pairs.jsonl is missing",
                 "environment.json is written again", "config.toml was missing or damaged"):  # fmt: skip
        assert part in said, part
    assert [json.loads(line)["pair"] for line in stopped.eval_pairs.read_text().splitlines()] == [0, 1]
    assert stopped.samples.exists() and "[train]" in stopped.config.read_text()


def test_samples_that_a_full_disk_refuses_are_not_lost(
    stopped: RunDir, resume: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint after an evaluation whose samples are not on disk would lose them for good."""
    write = between_steps.disk.write_text

    def full(path: Path, text: str) -> None:
        if path == stopped.samples and '"step": 2' in text:
            raise DiskError(f"Cannot write {path}: no space left.")
        write(path, text)

    monkeypatch.setattr("qdpo.train.watch.samples.disk.write_text", full)
    with pytest.raises(DiskError, match=r"samples\.jsonl"):
        resume(output__on_disk_full="stop")
    assert not (stopped.checkpoints / "step-000002").exists()
    monkeypatch.undo()
    resume()
    (line,) = [json.loads(line) for line in stopped.samples.read_text().splitlines()]
    assert [each["step"] for each in line["during"]] == [1, 2]


@pytest.mark.parametrize("name", ["chat_template.json", "added_tokens.json", "additional_chat_templates/tool.jinja"])
def test_a_file_that_is_new_to_the_base_s_tokenizer_stops_the_run(
    stopped: RunDir, resume: Callable[..., str], tiny_base: Path, name: str
) -> None:
    """The pairs are prepared already, so the adapter would be saved with a template that it was not trained on."""
    new = tiny_base / name
    assert not new.exists()
    new.parent.mkdir(exist_ok=True)
    new.write_text("{}")
    try:
        with pytest.raises(ConfigError, match=rf"{name} is new since the run .* was started.*--fresh"):
            resume()
    finally:
        new.unlink()
        if new.parent != tiny_base:
            new.parent.rmdir()
    resume()
