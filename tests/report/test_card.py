"""The model card: the code in it loads what was trained."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from qdpo.data.tokens.sieve import save_pairs
from qdpo.model.base import quant
from qdpo.model.base.load import load_base
from qdpo.model.device import DTYPES
from qdpo.report.card import card_text
from qdpo.review.open import reopen, tuned
from qdpo.run.finished import finished_run
from qdpo.run.folder import RunDir
from qdpo.run.record import file_record, model_files
from tests.conftest import Quiet, save_tiny_base
from tests.export.runs import adapt, make_run
from tests.model.families import pairs
from tests.model.multimodal import save_folder, whole_model
from tests.model.packed import STATIC, pack, save_original
from tests.run.made import write_records

IDS = torch.tensor([[5, 9, 40, 7, 11, 23]])


def code_of(card: str, base: Path, adapter: Path) -> str:
    found = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert found
    return found[1].replace("path/to/its/base", str(base)).replace("path/to/this/adapter", str(adapter))


@pytest.mark.parametrize(("quantization", "double_quant", "dtype"), [("nf4", True, "fp32"), ("none", True, "bf16")])
def test_the_code_of_the_card_loads_what_was_trained(
    tmp_path: Path, quantization: str, double_quant: bool, dtype: str
) -> None:
    base = save_tiny_base(tmp_path / "base")
    run = make_run(tmp_path / "run", base, quantization=quantization, double_quant=double_quant, dtype=dtype)
    run.prepared.mkdir()
    counts = finished_run(run.path).record.data
    for file, count in ((run.train_pairs, counts.train_pairs), (run.held_out_pairs, counts.held_out_pairs)):
        save_pairs(file, pairs()[:count])
    card = card_text(finished_run(run.path))
    names: dict[str, Any] = {}
    exec(code_of(card, base, run.adapter), names)
    # On CPUs with AVX512-BF16, bitsandbytes computes in bf16 whatever its compute type, unless it is told not to.
    quant.settle(names["base"], DTYPES[dtype])
    with torch.no_grad():
        shown = names["model"](IDS).logits.float()
        policy, _ = tuned(reopen(run.path, [], Quiet()), Quiet())
        own = policy.peft(IDS).logits.float()
        with policy.reference():
            bare = policy.peft(IDS).logits.float()
    assert (shown - own).abs().max() < 1e-4 < (bare - own).abs().max()
    assert ("qdpo merge" in card) == (quantization != "none")


@pytest.mark.parametrize("name", ["ministral3", "gpt_oss"])
def test_the_code_for_an_original_dequantises_it(name: str, tmp_path: Path) -> None:
    base = save_original(name, tmp_path / "base")
    run = make_run(tmp_path / "run", base, dtype="bf16", target_modules=["q_proj"])
    names: dict[str, Any] = {}
    exec(code_of(card_text(finished_run(run.path)), base, run.adapter), names)
    own = load_base(
        base, quantization="none", double_quant=True, dtype="bf16", device=torch.device("cpu"), attention_name=None,
        announce=lambda line: None,
    )  # fmt: skip
    own = PeftModel.from_pretrained(own, run.adapter).eval()
    with torch.no_grad():
        assert torch.equal(names["model"](IDS).logits, own(IDS).logits)
    if name == "ministral3":
        four = make_run(tmp_path / "four", base, quantization="nf4", dtype="bf16", target_modules=["q_proj"])
        assert "was trained over NF4 made of the base's FP8" in card_text(finished_run(four.path))


@pytest.mark.parametrize("form", ["fp8", "bitsandbytes"])
def test_the_code_for_a_text_part_reads_its_form_from_the_whole_checkpoint(form: str, tmp_path: Path) -> None:
    plain = save_folder(whole_model("mistral3"), tmp_path / "plain")
    if form == "fp8":
        base = pack(plain, tmp_path / "base", STATIC)
    else:
        left = ["lm_head", "vision_tower", "multi_modal_projector", "model.language_model.layers.1.mlp.up_proj"]
        auto: Any = AutoModelForImageTextToText
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=left)
        whole = auto.from_pretrained(plain, quantization_config=settings, dtype=torch.float32)
        base = shutil.copytree(plain, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        whole.save_pretrained(base)
    own = load_base(
        base, quantization="none", double_quant=True, dtype="fp32", device=torch.device("cpu"), attention_name=None,
        announce=lambda line: None,
    )  # fmt: skip
    bare = own(IDS).logits
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    adapted = adapt(own, target_modules=["q_proj"])
    adapted.save_pretrained(run.adapter)
    files = {str(file.resolve()): file_record(file) for file in model_files(base)}
    words = ["model.quantization=none", "data.path=unused.jsonl", "model.device=cpu"]
    write_records(run, base, words, dtype="fp32", files=files, marks={})
    names: dict[str, Any] = {}
    exec(code_of(card_text(finished_run(run.path)), base, run.adapter), names)
    quant.settle(names["base"], torch.float32)
    with torch.no_grad():
        shown, expected = names["model"](IDS).logits, adapted(IDS).logits
    assert torch.equal(shown, expected) and not torch.equal(shown, bare)


def test_the_code_names_the_form_that_was_trained(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", save_tiny_base(tmp_path / "base"), quantization="fp4", double_quant=False)
    finished = finished_run(run.path)
    base = replace(finished.record.base, name="owner/model", commit="c0ffee")
    code = code_of(card_text(replace(finished, record=replace(finished.record, base=base))), tmp_path, tmp_path)
    assert "from_pretrained(\n    'owner/model', revision='c0ffee', quantization_config=" in code
    assert "bnb_4bit_quant_type='fp4'" in code and "bnb_4bit_use_double_quant=False" in code


def test_an_accuracy_stands_with_its_pairs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", save_tiny_base(tmp_path / "base"))
    count = finished_run(run.path).record.data.held_out_pairs
    line = next(one for one in card_text(finished_run(run.path)).splitlines() if one.startswith("| reward accuracy"))
    assert line.count(f"(n={count})") == 2 and not re.search(r"\d\.\d{4}", line)
