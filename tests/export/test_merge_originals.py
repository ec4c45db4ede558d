"""A run over an original in FP8 or MXFP4 becomes a plain 16-bit folder, of the very weights that were trained on."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from qdpo.cli.main import app
from qdpo.export.merge.lora import read_lora
from qdpo.export.merge.merge import BaseWeights, merge_run
from qdpo.model.base import quant
from qdpo.model.base.dequantise import Dequantised, plain_tensors
from qdpo.model.base.load import load_base
from qdpo.run.folder import RunDir
from qdpo.run.record import file_record, model_files
from qdpo.settings import layered
from qdpo.train.loop import run_training
from tests.conftest import Quiet, tiny_rows, write_jsonl
from tests.export.runs import CPU, SETTINGS, adapt, dense_weights
from tests.model.packed import ORIGINALS, save_original
from tests.run.made import write_records

TARGETS = {"deepseek_v3": ["q_a_proj", "kv_a_proj_with_mqa", "o_proj", "q_b_proj"], "gpt_oss": ["q_proj", "o_proj"]}


def opened(base: Path, quantization: str) -> torch.nn.Module:
    found: torch.nn.Module = load_base(
        base, quantization=quantization, double_quant=True, dtype="bf16", device=CPU, attention_name=None,
        announce=lambda line: None,
    )  # fmt: skip
    return found


def made(path: Path, base: Path, targets: list[str] | str) -> RunDir:
    """A run in NF4 and bf16 as training leaves it; the adapter is random."""
    run = RunDir(path)
    run.path.mkdir()
    adapt(opened(base, "none"), target_modules=targets).save_pretrained(run.adapter)
    files = {str(file.resolve()): file_record(file) for file in model_files(base)}
    words = ["model.quantization=nf4", *SETTINGS]
    write_records(run, base, words, dtype="bf16", files=files, marks=quant.layer_marks(opened(base, "nf4")))
    return run


@pytest.mark.parametrize("name", ORIGINALS)
def test_both_bases_are_made_again(name: str, tmp_path: Path) -> None:
    base = save_original(name, tmp_path / "base")
    run = made(tmp_path / "run", base, TARGETS.get(name, "all-linear"))
    deltas, stored = read_lora(run.adapter).layers, plain_tensors(base)
    exact = {key: one.whole().float() for key, one in stored.items()}
    trained = {key: weight.bfloat16().float() for key, weight in exact.items()}
    trained |= dense_weights(opened(base, "nf4"))
    bases: dict[BaseWeights, dict[str, torch.Tensor]] = {"dequantized": trained, "original": exact}
    for choice, weights in bases.items():
        watcher, out = Quiet(), tmp_path / choice
        merge_run(run, out, base=choice, dtype="fp32", watcher=watcher)
        merged = load_file(out / "model.safetensors")
        plain = load_file(tmp_path / "base-plain" / "model.safetensors")
        assert {key: one.shape for key, one in merged.items()} == {key: one.shape for key, one in plain.items()}
        for key, weight in weights.items():
            delta = deltas.get(key.removesuffix(".weight"))
            expected = weight if delta is None else torch.addmm(weight, delta.b_NR, delta.a_RK)
            assert torch.equal(merged[key], expected), key
        assert "quantization_config" not in json.loads((out / "config.json").read_text())
        assert "GiB (the base, stored in " in watcher.lines[0]


def test_the_merged_folder_has_16_bits_and_is_loaded_by_transformers(tmp_path: Path) -> None:
    base = save_original("gpt_oss", tmp_path / "base")
    run = made(tmp_path / "run", base, ["q_proj"])
    report = merge_run(run, tmp_path / "out", base="original", dtype=None, watcher=Quiet())
    merged, stored = load_file(tmp_path / "out" / "model.safetensors"), plain_tensors(base)
    assert report.dtype == "bf16"
    experts = {key: one for key, one in stored.items() if isinstance(one, Dequantised)}
    assert len(experts) == 4 and all(
        torch.equal(merged[key], one.whole(torch.bfloat16)) for key, one in experts.items()
    )
    _model, about = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(about.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ORIGINALS)
def test_an_original_is_trained_merged_and_proved(name: str, tmp_path: Path) -> None:
    words = [
        f"model.path={save_original(name, tmp_path / 'base')}", "model.device=cpu", "model.dtype=fp32",
        "samples.count=0", f"data.path={write_jsonl(tmp_path / 'pairs.jsonl', tiny_rows(40))}",
        "data.eval_fraction=0.2", "train.steps=6", "train.learning_rate=1e-3", "train.pairs_per_step=4",
        f"output.dir={tmp_path}", "output.name=run", f"cache.dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    run_training(layered.resolve(words), Quiet())
    shown = CliRunner().invoke(
        app, ["merge", str(tmp_path / "run"), "--compare", "--dtype", "fp32", "--pairs", "5", "--json"]
    )
    assert shown.exit_code == 0, shown.output
    result = json.loads(shown.stdout.splitlines()[-1])
    assert result["merged"]["proved"] == result["merged"]["dequantized"] > 0
    ours, original = result["verification"]
    assert ours["enforced"] and ours["fault"] is None and ours["distance"]["kl"] < original["distance"]["kl"] / 50
