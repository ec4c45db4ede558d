"""scripts/gpu_proof without a GPU: budgets, restarts, verdicts, what is never written; each stage on tiny shapes."""

import ast
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.proof import figures, fits, others, right, speed
from benchmarks.proof.edges import CLOSE, bisect
from benchmarks.proof.items import Item, Options, Result
from benchmarks.proof.main import LEFT, MET, MISSED, exit_code, main
from benchmarks.proof.records import Records
from benchmarks.proof.runner import run_stage
from benchmarks.proof.turns import QDPO
from qdpo.forecast.preset_table import preset_table
from qdpo.settings import layered
from tests.conftest import ROOT

ABOUT = {"device": "some device"}
ENDS = ("count", "crash", "out_of_memory", "wrong", "not_here")
STATUSES = ["ok", "crashed", "out of memory", "failed", "not applicable"]
RESULT = Result(2, "preset 7b-8gb", "abc1234", "2026-12-01", "Some GPU", True, False, "ok", 9.0)
MEASURED: dict[str, Any] = {
    "device": "Some GPU", "limit_gib": 8.0, "tokens_per_row": 6144, "kept_layers": 2, "offload": True,
    "embeddings": "host", "longest_pair": 2048, "tokens_per_s": 900.0, "pairs_per_s": 2.0, "peak_gib": 6.5,
    "forecast_gib": 6.6, "reserved_gib": 6.9, "matrix_tflops": 700.0, "utilisation": 0.4, "build_s": 9.0,
    "step_s": [1.0],
}  # fmt: skip


def make_options(tmp_path: Path, device: str = "cpu") -> Options:
    return Options(device, device == "cpu", None, tmp_path, tmp_path / "presets", tmp_path / "README.md")


def make_item(tmp_path: Path, function: str, **changes: Any) -> Item:
    job = {"file": str(tmp_path / f"{function}.count"), **changes.pop("job", {})}
    return Item(
        1, function, "tests.scripts.proof_items", function, job, **{"expected_s": 0.5, "limit_s": 60.0, **changes}
    )


def run_items(tmp_path: Path, found: list[Item], commit: str = "one", budget_s: float = 100.0, **words: Any) -> Any:
    """What was left, and the records of a stage."""
    records = Records(tmp_path, real=False, commit=commit)
    options = {"retry": False, "say": lambda line: None, **words}
    return run_stage(iter(found), make_options(tmp_path), records, ABOUT, budget_s=budget_s, **options), records


def test_each_end_is_a_result_and_is_not_asked_for_again(tmp_path: Path) -> None:
    items = [make_item(tmp_path, name) for name in ENDS]
    for retry, calls in ((False, 1), (False, 1), (True, 2)):
        left, records = run_items(tmp_path, items, retry=retry)
        results = records.of_stage(1)
        assert left == [] and [result.status for result in results] == STATUSES
        assert len((tmp_path / "crash.count").read_text()) == calls
    assert len((tmp_path / "count.count").read_text()) == len((tmp_path / "not_here.count").read_text()) == 1
    assert results[2].said == "This does not fit." and results[3].values == {"by": 2}
    assert "exit code -6" in results[1].said
    written = json.loads((tmp_path / "gpu-proof-tried-out.json").read_text())
    assert [one["status"] for one in written["results"]] == STATUSES and not (tmp_path / "gpu-proof.json").exists()


def test_time_is_kept(tmp_path: Path) -> None:
    """What had all the time it may take and no answer is a result; what had less is left for the next call."""
    long = {"job": {"seconds": 60}}
    hanging = make_item(tmp_path, "slow", limit_s=2.0, **long)
    left, records = run_items(tmp_path, [hanging], budget_s=20.0)
    assert left == [] and records.of_stage(1)[0].status == "timed out"
    several = [
        replace(make_item(tmp_path, "slow", job={"seconds": 3.0}), name="first"),
        replace(make_item(tmp_path, "slow", **long), name="cut short"),
        make_item(tmp_path, "count", expected_s=30.0),
    ]
    left, records = run_items(tmp_path, several, budget_s=8.0)
    assert left == ["cut short", "count"] and records.now(1, "first").status == "ok"
    left, records = run_items(tmp_path, several[2:], budget_s=8.0)
    assert left == [] and records.now(1, "count").values == {"calls": 1}


def test_nothing_outlives_a_killed_script(tmp_path: Path) -> None:
    """A measurement left behind would hold memory of the card, and slow down the next one."""
    file = tmp_path / "linger.count"
    code = "from tests.scripts.test_gpu_proof import *; "
    code += "run_items(Path(sys.argv[1]), [make_item(Path(sys.argv[1]), 'linger')])"
    parent = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT)
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    worker = psutil.Process(int(file.read_text()))
    assert is_alive(worker)
    parent.kill()
    parent.wait()
    while is_alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(worker)


def is_alive(process: psutil.Process) -> bool:
    """Not one that has ended and that nobody has waited for."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_results_of_two_commits_are_kept(tmp_path: Path) -> None:
    item = make_item(tmp_path, "count")
    for number, commit in enumerate(("one", "two", "three"), 1):
        _left, records = run_items(tmp_path, [item], commit=commit)
        found = records.of_stage(1)[-1]
        assert found.values == {"calls": number} and found.commit == commit
        before = records.before(found)
        assert (before is None) == (number == 1) and (before is None or before.values == {"calls": number - 1})
    assert len(json.loads(records.path.read_text())["results"]) == 2


@pytest.mark.parametrize(("forecast", "met"), [(9.69, False), (9.71, True), (10.79, True), (10.81, False)])
def test_forecasts_have_bounds(tmp_path: Path, forecast: float, met: bool) -> None:
    """At most 3 % too low and 8 % too high; on a CPU there is no verdict at all."""
    result = replace(RESULT, values={**MEASURED, "peak_gib": 10.0, "forecast_gib": forecast})
    options = make_options(tmp_path, "cuda")
    found = fits.verdicts([result], options)
    assert [verdict.met for verdict in found] == [met] and exit_code(found, []) == (MET if met else MISSED)
    assert [verdict.met for verdict in fits.verdicts([replace(result, cuda=False)], options)] == [None]
    assert [verdict.met for verdict in fits.verdicts([replace(result, tiny=True)], options)] == [None]


def test_goals_are_met_or_missed(tmp_path: Path) -> None:
    options = make_options(tmp_path, "cuda")
    for status in ("out of memory", "crashed", "timed out"):
        lost = replace(RESULT, status=status, values={})
        assert [verdict.met for verdict in fits.verdicts([lost], options)] == [False]
    point = {"rows": speed.GOAL_ROWS, "utilisation": 0.449}
    fast = replace(RESULT, stage=3, item=speed.name("7B", "chat-like", "all"), values={"points": [point]})
    assert [verdict.met for verdict in speed.verdicts([fast], options)] == [False]
    point["utilisation"] = 0.45
    assert [verdict.met for verdict in speed.verdicts([fast], options)] == [True]
    for lengths, ratio, met in (("HH-like", 3.9, False), ("HH-like", 4.0, True), ("chat-like", 2.6, True)):
        turn = replace(RESULT, stage=4, item=others.name(lengths, 24), values={"ratio": ratio, "sides": {}})
        assert [verdict.met for verdict in others.verdicts([turn], options)] == [met]
    missing = replace(RESULT, stage=4, item=others.name("HH-like", 24), status="not measured")
    assert [verdict.met for verdict in others.verdicts([missing], options)] == [None]
    edge = {**MEASURED, "planned_edge": 104, "measured_edge": 100, "edge_error": 0.04}
    assert [verdict.met for verdict in fits.verdicts([replace(RESULT, values=edge)], options)] == [True, False]
    assert exit_code([], ["something"]) == LEFT


@pytest.mark.parametrize("border", [1000, 5_000, 10_400, 29_000])
def test_the_edge_is_found(border: int) -> None:
    low, unfit = bisect(lambda tokens: tokens <= border, 1000, 10_000, 64)
    assert low <= border < unfit and unfit - low <= max(64, CLOSE * low)


def test_every_gpu_test_is_in_a_group() -> None:
    tree = ast.parse((ROOT / "tests" / "test_gpu.py").read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert sorted(name for group in right.GROUPS.values() for name in group) == sorted(names)


def test_figures_of_a_gpu_alone_are_written(tmp_path: Path) -> None:
    options = make_options(tmp_path, "cuda")
    shutil.copytree(layered.shipped_folder(), options.presets)
    shutil.copy(ROOT / "README.md", options.readme)
    before = {path.name: path.read_bytes() for path in [*options.presets.iterdir(), options.readme]}
    records = Records(tmp_path, real=True, commit="now")
    good = replace(RESULT, values=MEASURED)
    for refused in (replace(good, cuda=False), replace(good, tiny=True), replace(good, status="out of memory")):
        records.add(refused, ABOUT)
        assert figures.run(options, records) == LEFT
        assert {path.name: path.read_bytes() for path in [*options.presets.iterdir(), options.readme]} == before
    records.add(good, ABOUT)
    figures.run(options, records)
    changed = {
        path.name for path in [*options.presets.iterdir(), options.readme] if path.read_bytes() != before[path.name]
    }
    assert changed == {"7b-8gb.toml", "README.md"}
    table = tomllib.loads((options.presets / "7b-8gb.toml").read_text())["measured"]
    assert table["peak_gib"] == 6.5 and table["commit"] == "abc1234" and table["date"] == "2026-12-01"
    text = options.readme.read_text(encoding="utf-8")
    assert "\n".join(preset_table(options.presets)) in text
    assert "6.5 GiB (Some GPU as 8 GiB, abc1234, 2026-12-01)" in text
    assert text.split("\n```\npreset ")[0] == before["README.md"].decode().split("\n```\npreset ")[0]


def tried_out(tmp_path: Path, stage: int, printed: str) -> dict[str, dict[str, Any]]:
    """The results of a stage, by name; nothing may be met or missed, since nothing was measured."""
    assert "TRIED OUT" in printed and "MISSED" not in printed and "\nmet " not in printed
    found = json.loads((tmp_path / "gpu-proof-tried-out.json").read_text())
    assert all(verdict["met"] is None for verdict in found["verdicts"][str(stage)])
    return {one["item"]: one for one in found["results"] if one["stage"] == stage}


def test_a_preset_is_tried_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--out", str(tmp_path), "--device", "cpu"]
    assert main(words, None) == 2 and "needs --tiny" in capsys.readouterr().err
    assert main([*words, "--tiny", "--stage", "2", "--only", "preset 7b-8gb"], None) == MET
    found = tried_out(tmp_path, 2, capsys.readouterr().out)
    assert set(found) == {"preset 7b-8gb"} and found["preset 7b-8gb"]["values"]["tokens_per_s"] > 0


def script(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu_proof", "--out", tmp_path, *words], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def try_out(tmp_path: Path, stage: int, only: str) -> dict[str, dict[str, Any]]:
    """Runs the script for these items of a stage, as a user would."""
    done = script(tmp_path, "--device", "cpu", "--tiny", "--stage", str(stage), "--only", only)
    assert done.returncode == MET, done.stdout + done.stderr
    return tried_out(tmp_path, stage, done.stdout)


@pytest.mark.slow
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = script(tmp_path, "--stage", "1")
    assert done.returncode == 2 and "finds no CUDA device" in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_stage_1_runs(tmp_path: Path) -> None:
    found = try_out(tmp_path, 1, "varlen|killed|of 7B")
    assert [one["status"] for one in found.values()] == ["not applicable", "ok", "ok", "ok"]
    assert found["killed, and resumed to the same bytes"]["values"] == {"kills": 1, "differences": 0}


@pytest.mark.slow
def test_stages_2_and_3_run(tmp_path: Path) -> None:
    found = try_out(tmp_path, 2, "takes|on 8 GiB|layers kept of|offload true")
    assert [one["status"] for one in found.values()] == ["not applicable", "ok", "ok", "ok"]
    assert sum("not applicable" in str(one["values"].get("edge")) for one in found.values()) == 2
    found = try_out(tmp_path, 3, "7B, HH-like, none")
    shares = next(one["values"]["shares"] for one in found.values() if "shares" in one["values"])
    points = next(one["values"]["points"] for one in found.values() if "points" in one["values"])
    assert sum(shares.values()) == pytest.approx(1) and all(point["tokens_per_s"] > 0 for point in points)
    done = script(tmp_path, "--device", "cpu", "--tiny", "--stage", "5")
    assert done.returncode == 0 and "written" not in done.stdout


@pytest.mark.slow
def test_stage_4_runs(tmp_path: Path) -> None:
    (found,) = try_out(tmp_path, 4, "HH-like, 24").values()
    if found["status"] == "not measured":
        pytest.skip(found["said"])
    assert found["status"] == "ok" and found["values"]["ratio"] > 0
    tokens = {name: side["computed_tokens_per_pair"] for name, side in found["values"]["sides"].items()}
    assert len(tokens) == 4 and tokens.pop(QDPO) < min(tokens.values())
