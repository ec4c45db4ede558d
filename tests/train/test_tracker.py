"""Trackers: the same numbers as metrics.jsonl, each step once, and never the end of a run."""

import shutil
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate import tracking

from qdpo.errors import ConfigError
from qdpo.run.disk import read_json
from qdpo.run.identity import run_folder
from qdpo.run.metrics import read_metrics
from qdpo.run.record import Result
from qdpo.settings import layered
from tests.conftest import Quiet, arguments, qdpo

Train = Callable[..., tuple[Result, Quiet]]


def events(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar in the event files, by tensorboard's own reader, nothing purged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=False)
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_tensorboard_holds_every_step_once_also_after_a_resume(train: Train, settings: dict[str, str]) -> None:
    more = {"train__steps": "6", "train__save_every": "2", "train__eval_every": "3", "train__keep_checkpoints": "3"}
    train(**more, track__to="tensorboard")
    run = Path(settings["output.dir"]) / "run"
    for gone in ("step-000006", "step-000004"):  # as after a kill: four steps are trained again
        shutil.rmtree(run / "checkpoints" / gone)
    (run / "result.json").unlink()
    _, watcher = train(**more, track__to="tensorboard")
    assert "resuming after step 2" in watcher.text
    found, records = events(run), read_metrics(run / "metrics.jsonl")
    for name in ("loss", "rewards/margins", "eval_loss", "learning_rate", "grad_norm"):
        expected = [(record["step"], record[name]) for record in records if name in record]
        assert [step for step, _ in found[name]] == [step for step, _ in expected], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in expected], rel=1e-5), name
    assert [step for step, _ in found["eval_loss"]] == [0, 3, 6]


def test_a_tracker_begun_late_gets_what_was_before(train: Train, settings: dict[str, str]) -> None:
    train(train__steps="4", train__save_every="2")
    run = Path(settings["output.dir"]) / "run"
    shutil.rmtree(run / "checkpoints" / "step-000004")
    (run / "result.json").unlink()
    train(train__steps="4", train__save_every="2", track__to="tensorboard")
    assert [step for step, _ in events(run)["loss"]] == [1, 2, 3, 4]


def test_a_tracker_that_fails_is_left_alone(
    train: Train, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tracking.TensorBoardTracker.log

    def fails(self: Any, values: dict[str, Any], step: int) -> None:
        if step == 2:
            raise ConnectionError("nobody is there")
        log(self, values, step)

    monkeypatch.setattr(tracking.TensorBoardTracker, "log", fails)
    result, watcher = train(train__steps="4", track__to="tensorboard")
    assert result.steps == 4 and watcher.text.count("track.to=tensorboard failed (ConnectionError: nobody") == 1
    run = Path(settings["output.dir"]) / "run"
    assert [step for step, _ in events(run)["loss"]] == [1]
    assert {record["step"] for record in read_metrics(run / "metrics.jsonl")} == set(range(5))


@pytest.mark.parametrize("to", ["wandb", "trackio"])
def test_other_trackers_take_every_record(settings: dict[str, str], tmp_path: Path, to: str) -> None:
    """In a process of its own, since a tracker of another test may have made what accelerate's trackers need."""
    if find_spec(to) is None:
        pytest.skip(f"{to} is not installed")
    words = arguments(settings, train__steps="3", train__save_every="1", train__keep_checkpoints="3", track__to=to)
    places = {"HOME": str(tmp_path), "WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio")}
    first = qdpo("run", *words, cwd=tmp_path, **places)
    assert first.returncode == 0 and "track.to" not in first.stdout, first.stdout + first.stderr
    run = Path(settings["output.dir"]) / "run"
    handed = read_json(run / "track.json")
    assert (handed["train"], handed["eval"]) == (3, 3)
    shutil.rmtree(run / "checkpoints" / "step-000003")  # as after a kill: a step is trained again
    (run / "result.json").unlink()
    again = qdpo("run", *words, cwd=tmp_path, **places)
    assert "resuming after step 2" in again.stdout and "track.to" not in again.stdout, again.stdout + again.stderr
    assert read_json(run / "track.json") == handed


@pytest.mark.parametrize("to", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_said_before_anything_is_made(
    train: Train, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    distribution = metadata.distribution

    def without(name: str) -> metadata.Distribution:
        if name == to:
            raise metadata.PackageNotFoundError(name)
        return distribution(name)

    monkeypatch.setattr(metadata, "distribution", without)
    with pytest.raises(ConfigError, match=rf"track.to={to} needs .*pip install 'qdpo\[{to}\]'"):
        train(train__steps="2", track__to=to)
    assert not Path(settings["output.dir"]).exists() or not (Path(settings["output.dir"]) / "run").exists()


def test_a_tracker_changes_no_run(settings: dict[str, str]) -> None:
    del settings["output.name"]
    folders = {run_folder(layered.resolve(arguments(settings, track__to=to))).path for to in ("none", "wandb")}
    assert len(folders) == 1
