"""`qdpo eval` on pairs that the run was trained on: named and counted, in the table and in JSON."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qdpo.data.tokens.sieve import TokenPair
from qdpo.errors import ConfigError
from qdpo.report.screen.live import print_evaluation
from qdpo.review.score import TrainedBefore, rescore, trained_before
from qdpo.run.record import Result
from tests.conftest import Quiet, tiny_rows, write_jsonl


def pair(prompt: int, chosen: int, rejected: int) -> TokenPair:
    return TokenPair(*(np.array([one], dtype=np.int32) for one in (prompt, chosen, rejected)), 1)


def test_overlap_is_by_prompt_and_by_pair() -> None:
    trained = [pair(1, 2, 3), pair(4, 5, 6)]
    asked = [pair(1, 2, 3), pair(1, 3, 2), pair(4, 7, 8), pair(9, 2, 3)]
    assert trained_before(asked, trained) == TrainedBefore(2, 3)
    assert trained_before([pair(9, 9, 9)], trained) == TrainedBefore(0, 0)


def test_an_eval_names_what_was_trained(
    tmp_path: Path, train: Callable[..., tuple[Result, Quiet]], capsys: pytest.CaptureFixture[str]
) -> None:
    train(train__steps="1")
    new = [{**row, "prompt": f"{row['prompt']} again"} for row in tiny_rows(2)]
    watcher = Quiet()
    data = write_jsonl(tmp_path / "mixed.jsonl", [*tiny_rows(40), *new])
    scored = rescore(tmp_path / "runs" / "run", [f"data.path={data}"], watcher)
    assert scored.pairs == 42 and scored.trained == TrainedBefore(32, 32)
    assert "trained on 32 of these 42 pairs" in watcher.text
    print_evaluation(scored, as_json=False)
    shown = capsys.readouterr().out
    assert "warning: this run was trained on 32 of these 42 pairs" in shown and "(n=42)" in shown
    print_evaluation(scored, as_json=True)
    assert json.loads(capsys.readouterr().out)["trained_pairs"] == 32
    own = rescore(tmp_path / "runs" / "run", [], Quiet())
    assert own.trained == TrainedBefore(0, 0)


def test_a_base_that_has_changed_is_named(
    tmp_path: Path, tiny_base: Path, train: Callable[..., tuple[Result, Quiet]]
) -> None:
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    train(train__steps="1", model__path=str(base))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.json has changed since the run"):
        rescore(tmp_path / "runs" / "run", [], Quiet())
