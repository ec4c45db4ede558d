"""A sweep: every combination an ordinary run, one reference pass in all, and a failure that stops nothing else."""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from qdpo.errors import ConfigError
from qdpo.run.folder import RunDir
from qdpo.run.record import read_result
from qdpo.settings import layered
from qdpo.train.sweep import plan_sweep
from tests.conftest import arguments, qdpo, start_qdpo

TINY = ["model.path=m", "data.path=d"]


def test_every_combination_is_a_run_of_its_own() -> None:
    sweep = plan_sweep([*TINY, "loss.beta=0.05,0.1", "loss.name=sigmoid+sft,ipo", "data.system=Be kind, be brief."])
    assert [run.differs for run in sweep.runs] == [
        {"loss.beta": beta, "loss.name": name} for beta in ("0.05", "0.1") for name in ("sigmoid+sft", "ipo")
    ]
    assert len({run.run.path for run in sweep.runs}) == 4 and sweep.folder == Path("runs")
    assert all("data.system=Be kind, be brief." in run.arguments for run in sweep.runs)


def test_a_named_sweep_gives_each_run_a_name() -> None:
    names = [run.run.path.name for run in plan_sweep([*TINY, "output.name=mine", "loss.beta=0.1,0.2"]).runs]
    assert len(set(names)) == 2 and all(name.startswith("mine-") for name in names)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["loss.beta=0.1"], "Nothing to sweep"),
        (["loss.beta=0.1,0.10"], "would be the same run"),
        (["train.eval_every=5,10"], "do not affect training"),
        (["loss.beta=0.1,-1"], "loss.beta=-1 .* is not a number above 0"),
        (["loss.beta=0.1,"], "is not a number above 0"),
        (["loss.bta=0.1,0.2"], "Did you mean 'loss.beta'"),
    ],
)
def test_a_sweep_is_checked_before_the_first_run(given: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_sweep([*TINY, *given])


@pytest.mark.parametrize("given", ["loss.beta=0.1,0.2", "preset=demo,7b-24gb", "adapter.targets=q_proj,v_proj"])
def test_a_comma_in_a_run_points_to_sweep(given: str) -> None:
    with pytest.raises(ConfigError, match=f"{given} has a comma. `qdpo sweep`"):
        layered.resolve([*TINY, given])


def test_a_comma_in_a_file_name_is_one(tmp_path: Path) -> None:
    (tmp_path / "a,b.jsonl").touch()
    assert layered.resolve(["model.path=m", f"data.path={tmp_path}/a,b.jsonl"]).config.data.path
    assert layered.resolve([*TINY, "output.name=mine, new"]).config.output.name == "mine, new"  # not there yet


def test_a_sweep_from_the_command_line(settings: dict[str, str], tmp_path: Path) -> None:
    """The middle run fails for want of a layer that it adapts; the last one needs no reference pass, nor does a second
    start train anything."""
    del settings["output.name"]
    words = arguments(settings, train__steps="2", adapter__targets="q_proj,nonsense,v_proj")
    first = qdpo("sweep", *words, cwd=tmp_path)
    assert first.returncode == 2 and "no layer of this llama model is called that" in first.stderr, first.stderr
    runs = re.split(r"\nrun \d of ", first.stdout)
    assert "reference log-probs" in runs[1] and "reference log-probs" not in runs[3]
    assert "no pass needed" in runs[3] and "exit code 2" in runs[3] and len(runs) == 4
    kept = json.loads((Path(settings["output.dir"]) / "sweep.json").read_text())["runs"]
    assert [run["exit_code"] for run in kept] == [0, 2, 0] and kept[1]["accuracy"] is None
    result = read_result(RunDir(Path(kept[2]["run"])))
    assert kept[2]["settings"] == {"adapter.targets": "v_proj"}
    assert kept[2]["loss"] == result.after["loss"] and kept[2]["training_seconds"] > 0
    assert "v_proj" in (Path(settings["output.dir"]) / "sweep.html").read_text(encoding="utf-8")
    again = qdpo("sweep", *words, cwd=tmp_path)
    assert again.stdout.count("is finished") == 2 and "step 1/" not in again.stdout


@pytest.mark.slow
def test_a_stopped_sweep_is_continued_by_the_same_command(settings: dict[str, str], tmp_path: Path) -> None:
    """First a signal to the sweep alone, whose run ends as if nothing were; then Ctrl-C, which its run gets as well."""
    del settings["output.name"]
    words = arguments(settings, train__steps="30", train__save_every="5", loss__beta="0.1,0.2")

    def stopped(at: str, kill: Callable[[int, int], None]) -> list[str]:
        process = start_qdpo("sweep", *words, cwd=tmp_path)
        assert process.stdout is not None
        run = ""
        for line in process.stdout:
            run = line[:10] if re.match(r"run \d of", line) else run
            if f"{run}: {line}".startswith(at):
                kill(process.pid, signal.SIGINT)
                break
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 130 and "Traceback" not in errors, errors
        return states()

    def states() -> list[str]:
        return [run["state"] for run in json.loads((Path(settings["output.dir"]) / "sweep.json").read_text())["runs"]]

    assert stopped("run 1 of 2: step 4/30", os.kill) == ["finished", "not started"]
    assert stopped("run 2 of 2: step 4/30", os.killpg) == ["finished", "exit code 130"]
    again = qdpo("sweep", *words, cwd=tmp_path)
    runs = re.split(r"\nrun \d of ", again.stdout)
    assert again.returncode == 0 and "is finished" in runs[1] and "resuming after step" in runs[2], again.stderr
    assert states() == ["finished", "finished"]
