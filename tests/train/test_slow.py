"""Longer proofs: the 7B architecture, and the demo with its real model."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config

from qdpo.data import prepare
from qdpo.data.tokens.pack import pack_rows
from qdpo.model.base import fetch
from qdpo.model.base.load import load_tokenizer
from qdpo.model.policy import install
from qdpo.run.folder import RunDir
from qdpo.run.record import read_result
from qdpo.settings import layered
from qdpo.settings.loss_rules import RULES
from qdpo.train.loop import run_training
from qdpo.train.policy.build import load_policy
from qdpo.train.start.open_run import cache_folder
from qdpo.train.step.step import score
from tests.conftest import ROOT, Quiet, qdpo, tiny_rows, tiny_tokenizer, write_jsonl
from tests.train.test_step import MOVES

pytestmark = pytest.mark.slow


def test_the_7b_preset_trains_its_architecture_at_reduced_depth(tmp_path: Path) -> None:
    """Qwen2.5-7B's shape with 2 of its 28 layers, random weights, stored in NF4; two steps on the CPU."""
    folder = tmp_path / "qwen"
    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=2, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, max_position_embeddings=32768, rope_theta=1e6, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, dtype="bfloat16",
    )  # fmt: skip
    script = f"""
import torch
from transformers import AutoModelForCausalLM, Qwen2Config
torch.set_default_dtype(torch.bfloat16)
model = AutoModelForCausalLM.from_config(Qwen2Config.from_pretrained({str(tmp_path / "config")!r}))
model.save_pretrained({str(tmp_path / "full")!r})
"""
    config.save_pretrained(tmp_path / "config")
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "full", quantization_config=quantised, device_map={"": "cpu"}, dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    pairs = write_jsonl(tmp_path / "pairs.jsonl", tiny_rows(12))
    answer = qdpo(
        "run", "preset=7b-24gb", f"model.path={folder}", "model.device=cpu", f"data.path={pairs}",
        "data.eval_fraction=0.2", "train.steps=2", "train.hours=none", "train.pairs_per_step=2", "samples.count=0",
        "output.name=seven",
        cwd=tmp_path, QDPO_CACHE=str(tmp_path / "cache"),
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert "already 4-bit" in answer.stdout and "step 2/2" in answer.stdout
    result = read_result(RunDir(tmp_path / "runs" / "seven"))
    assert result.before["rewards/margins"] == 0 and result.after["rewards/margins"] != 0


def test_the_package_works_without_the_clone(tmp_path: Path) -> None:
    """Built as a wheel and unpacked elsewhere, presets and pairs come along."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("qdpo-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = "import qdpo, sys; from qdpo.data.read.source import open_source; from qdpo.settings import layered\n"
    script += "rows = open_source('bundled:demo-train.jsonl', shipped=layered.shipped_folder()).rows.read_sample()\n"
    script += "print(qdpo.__file__, rows.count, *layered.preset_names())"
    shown = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    assert shown[0].startswith(str(tmp_path)) and shown[1] == "204" and shown[2:] == layered.preset_names()


def test_packed_and_lean_equals_separate_and_plain_on_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M in NF4, fp32: 8 bundled pairs in one row with every fast part, against 16 plain sequences."""
    config = layered.resolve(["preset=demo", "model.dtype=fp32", "memory.kept_layers=10"]).config
    base = fetch.locate_base(
        str(config.model.path), revision=None, cache_dir=cache_folder(config), announce=lambda line: None
    )
    tokenizer = load_tokenizer(base.folder)
    pairs = prepare.read_pairs(config.data, tokenizer, Quiet())[1][:8]
    found = {}
    for lean in (True, False):
        if not lean:
            monkeypatch.setattr(install, "install", lambda peft, device: install.Installed())
        loaded = load_policy(
            config, base.folder, device=torch.device("cpu"), dtype="fp32", probe_with=pairs[:2], say=lambda line: None
        )
        policy = loaded.policy
        policy.layout = policy.layout if lean else "separate"
        generator = torch.Generator().manual_seed(5)
        for name, parameter in policy.adapter_parameters().items():
            if "lora_B" in name:
                parameter.data.normal_(std=0.02, generator=generator)
        logps = []
        for row in pack_rows(pairs, 10_000 if lean else 0):
            logp = score(policy, row, metrics=False).logp
            logp.sum().backward()
            order = [pair.row for pair in row.pairs]
            sums = torch.stack([part.sum() for part in torch.split(logp.detach(), row.lengths)])
            logps += [(row_number, sums[2 * i], sums[2 * i + 1]) for i, row_number in enumerate(order)]
        gradients = {name: p.grad for name, p in policy.adapter_parameters().items()}
        found[lean] = torch.tensor([value for _, *both in sorted(logps) for value in both]), gradients
    (packed, packed_gradients), (plain, plain_gradients) = found[True], found[False]
    assert ((packed - plain) / plain).abs().max() < 2e-5
    largest = max(g.abs().max() for g in plain_gradients.values() if g is not None)
    for name, gradient in plain_gradients.items():
        assert gradient is not None and (packed_gradients[name] - gradient).abs().max() <= 1e-4 * largest, name


@pytest.mark.parametrize("name", RULES)
def test_every_loss_trains_the_demo_model(tmp_path: Path, name: str) -> None:
    """SmolLM2-135M in NF4, 3 steps of 4 pairs: each moves what it is meant to move."""
    settings = [
        "preset=demo", f"loss.name={name}", "train.steps=3", "train.learning_rate=2e-4", "train.warmup_steps=1",
        "data.eval_limit=6", "data.limit=12", "samples.count=0", f"output.dir={tmp_path}",
    ]  # fmt: skip
    settings += ["loss.label_smoothing=0.1"] if name in ("exo_pair", "robust") else []
    result = run_training(layered.resolve(settings), Quiet())
    metric, sign = MOVES.get(name, ("rewards/margins", 1))
    assert sign * (result.after[metric] - result.before[metric]) > 0.01


@pytest.mark.parametrize("isa", ["as it is", "AVX2"])
def test_the_demo_learns_the_preference(tmp_path: Path, isa: str) -> None:
    """SmolLM2-135M from its wheel, the bundled pairs, one command; once as if the CPU had no bf16 instructions."""
    environment = {} if isa == "as it is" else {"ONEDNN_MAX_CPU_ISA": isa}
    finished = subprocess.run(
        [sys.executable, "-m", "qdpo", "run", "preset=demo"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert ("compute type: fp32 (this CPU" in finished.stdout) or isa == "as it is"
    (folder,) = (tmp_path / "runs").iterdir()
    result = read_result(RunDir(folder))
    # Exactly 0.5 where the CPU repeats its rounding; where it does not, ties of 1e-5 nats fall to either side.
    assert abs(result.before["rewards/margins"]) < 0.02 and result.before["rewards/accuracies"] < 0.75
    assert result.after["rewards/accuracies"] >= 0.9
    lengths = result.samples
    assert lengths is not None and lengths.median_tokens_after <= 0.6 * lengths.median_tokens_before
    assert result.peak_gib < 3
