"""The benchmark on a tiny shape, and what it writes."""

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from qdpo.measure import bench
from qdpo.settings import layered
from tests.conftest import qdpo

NUMBERS: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": False,
}  # fmt: skip
MEASURED = bench.Measured(
    device="some card",
    limit_gib=8.0,
    tokens_per_row=2048,
    kept_layers=3,
    offload=True,
    embeddings="host",
    longest_pair=1024,
    tokens_per_s=1000.4,
    pairs_per_s=2.5,
    peak_gib=6.51,
    forecast_gib=6.6,
    reserved_gib=7.0,
    matrix_tflops=100.0,
    utilisation=0.41,
    build_s=9.0,
    step_s=[1.0, 1.1],
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LlamaConfig(**NUMBERS).save_pretrained(tmp_path / "shape")
    return tmp_path / "shape"


def words(folder: Path) -> list[str]:
    settings = {
        "model.path": folder, "model.device": "cpu", "model.dtype": "fp32", "data.path": "none.jsonl",
        "data.max_tokens": 64, "train.pairs_per_step": 4,
    }  # fmt: skip
    return [f"{name}={value}" for name, value in settings.items()]


def test_a_shape_without_weights_is_measured(folder: Path, tmp_path: Path) -> None:
    answer = qdpo("bench", *words(folder), "--steps", "2", "--json", cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    found = json.loads(answer.stdout)
    assert found["kept_layers"] == 3 and found["longest_pair"] == 128 and len(found["step_s"]) == 2
    assert found["tokens_per_s"] > 0 and 0 < found["utilisation"] < 1.5 and found["peak_gib"] > 0.1
    assert found["pairs_per_s"] * sum(found["step_s"]) == pytest.approx(8)
    assert "adapter linear" in answer.stderr and "GiB forecast" in answer.stderr
    text = qdpo("bench", *words(folder), "--steps", "1", cwd=tmp_path).stdout
    assert "measured, " in text and "pairs/s" in text and "utilisation" in text


def test_a_limit_below_the_forecast_builds_nothing(folder: Path, tmp_path: Path) -> None:
    answer = qdpo("bench", *words(folder), "--limit-gib", "0.001", cwd=tmp_path)
    assert answer.returncode == 5 and "Nothing was built" in answer.stderr
    assert qdpo("bench", *words(folder), "--write", cwd=tmp_path).returncode == 2
    unknown = qdpo("bench", "model.path=no/model", "data.path=x", "model.device=cpu", cwd=tmp_path)
    assert unknown.returncode == 2 and "none of it ships with qdpo" in unknown.stderr


def test_figures_go_into_the_presets_table(tmp_path: Path) -> None:
    path = tmp_path / "7b-8gb.toml"
    path.write_text(layered.preset_text("7b-8gb"))
    for measured in (MEASURED, replace(MEASURED, peak_gib=6.77)):
        assert bench.write_measured("7b-8gb", measured, tmp_path) == path
    settings, table = tomllib.loads(path.read_text()), tomllib.loads(layered.preset_text("7b-8gb"))
    written = settings.pop("measured")
    table.pop("measured")
    assert settings == table
    assert written["peak_gib"] == 6.77 and written["forecast_gib"] == 6.6 and written["offload"] is True
    assert written["commit"] and written["date"] and path.read_text().count("[measured]") == 1
