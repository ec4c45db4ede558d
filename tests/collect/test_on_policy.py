"""Pairs that say who wrote their answers: `qdpo data check` tells how many are the model's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdpo.cli.data import model_side
from qdpo.data.check import check_data
from qdpo.data.report import DataReport
from qdpo.run.record import file_record
from qdpo.settings import layered
from tests.conftest import Quiet, arguments, qdpo, tiny_rows, write_jsonl


@pytest.fixture
def check(settings: dict[str, str], tmp_path: Path) -> Callable[..., DataReport]:
    def run(path: Path, **changes: str) -> DataReport:
        config = layered.resolve(arguments(settings, data__path=str(path), **changes)).config
        return check_data(config, *model_side(config, print), Quiet(), tmp_path / "report.jsonl").report

    return run


def written_by(*origins: tuple[Any, Any]) -> list[dict[str, Any]]:
    rows = tiny_rows(len(origins))
    return [
        {**row, **{f"{side}_from": origin for side, origin in zip(("chosen", "rejected"), two, strict=True) if origin}}
        for row, two in zip(rows, origins, strict=True)
    ]


def test_the_share_of_the_models_own_answers(check: Any, tiny_base: Path, tmp_path: Path) -> None:
    own, other = {"model": str(tiny_base), "weights": "w"}, {"model": "gpt"}
    rows = written_by((own, own), ({**own, "edited": True}, own), (other, own), (None, own), (own, {"model": 3}))
    report = check(write_jsonl(tmp_path / "p.jsonl", rows))
    assert report.on_policy == 6 / 10
    assert report.origins == {str(tiny_base): 6, "unknown": 2, "a person, by editing": 1, "gpt": 1}


def test_pairs_that_say_nothing_have_no_rate(check: Any, tmp_path: Path) -> None:
    report = check(write_jsonl(tmp_path / "p.jsonl", tiny_rows(3)))
    assert report.on_policy is None and report.origins == {}


def test_only_pairs_that_are_used_count(check: Any, tiny_base: Path, tmp_path: Path) -> None:
    own = {"model": str(tiny_base)}
    rows = written_by((own, own), (own, own))
    rows[1]["rejected"] = rows[1]["chosen"]
    report = check(write_jsonl(tmp_path / "p.jsonl", rows), data__max_drop_fraction="0.6")
    assert report.usable == 1 and report.origins == {str(tiny_base): 2}


def test_chosen_answers_that_were_cut_are_warned_of(check: Any, tiny_base: Path, tmp_path: Path) -> None:
    own = {"model": str(tiny_base)}
    cut = {**own, "cut": True}
    report = check(write_jsonl(tmp_path / "p.jsonl", written_by((cut, own), (own, cut), (cut, cut))))
    assert any("2 chosen answers were cut at the length limit" in warning for warning in report.warnings)
    assert report.on_policy == 1.0 and report.origins == {str(tiny_base): 6}
    fine = check(write_jsonl(tmp_path / "q.jsonl", written_by((own, cut))))
    assert not any("length limit" in warning for warning in fine.warnings)


def test_answers_of_a_run_are_on_policy_where_training_goes_on_from_it(
    train: Any, check: Any, tiny_base: Path, tmp_path: Path
) -> None:
    train(train__steps="1")
    adapter = tmp_path / "runs" / "run" / "adapter"
    digest = file_record(adapter / "adapter_model.safetensors").sha256
    path = write_jsonl(tmp_path / "p.jsonl", written_by(*2 * [2 * ({"model": str(tiny_base), "adapter": digest},)]))
    assert check(path).on_policy == 0.0
    assert check(path, adapter__start=str(adapter)).on_policy == 1.0


def test_it_is_printed(settings: dict[str, str], tiny_base: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", written_by(2 * ({"model": str(tiny_base)},), (None, None)))
    found = qdpo("data", "check", str(path), f"model.path={tiny_base}", cwd=tmp_path)
    assert f"on-policy: 50% of the answers · written by: {tiny_base} 2, unknown 2" in found.stdout
