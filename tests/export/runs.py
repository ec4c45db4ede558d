"""A finished run without training: a base, a random adapter saved by PEFT, and the files that a run leaves."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qdpo.model.base import quant
from qdpo.model.base.load import load_base
from qdpo.model.device import DTYPES
from qdpo.run.folder import RunDir
from qdpo.run.record import FourBitMark, file_record, model_files
from tests.conftest import tiny_tokenizer
from tests.run.made import write_records

CPU = torch.device("cpu")
SETTINGS = ("data.path=unused.jsonl", "model.device=cpu")


def save_base(folder: Path, config: Any, *, shard: str = "5GB", dtype: torch.dtype = torch.float32) -> Path:
    """A random model of a transformers config with the tiny tokenizer, as a hub folder is."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def adapt(model: Any, **lora: Any) -> Any:
    """The model with a LoRA adapter that does something: B is not zero."""
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    peft = get_peft_model(model, LoraConfig(**{**settings, **lora})).eval()
    torch.manual_seed(2)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return peft


def make_run(
    path: Path, base: Path, *, quantization: str = "none", dtype: str = "fp32", double_quant: bool = True, **lora: Any
) -> RunDir:
    """A run folder as training leaves it, as far as a merge reads it; the adapter is random."""
    words = [f"model.quantization={quantization}", f"model.double_quant={double_quant}"]
    run = RunDir(path)
    run.path.mkdir(parents=True)
    adapt(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), **lora).save_pretrained(run.adapter)
    marks: dict[str, FourBitMark] = {}
    if quantization != "none":
        marks = quant.layer_marks(four_bit(base, quantization, double_quant, dtype))
    files = {str(file.resolve()): file_record(file) for file in model_files(base)}
    write_records(run, base, [*words, *SETTINGS], dtype=dtype, files=files, marks=marks)
    return run


def four_bit(base: Path, quantization: str, double_quant: bool, dtype: str) -> Any:
    return load_base(
        base, quantization=quantization, double_quant=double_quant, dtype=dtype, device=CPU, attention_name=None,
        announce=lambda line: None,
    )  # fmt: skip


def peft_merged(run: RunDir, base: Path) -> Any:
    """PEFT's own merge of the run's adapter into the base's files, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, run.adapter).merge_and_unload().eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(5, 25)[None]).logits
    return found


def dense_weights(model: Any) -> dict[str, torch.Tensor]:
    """What each 4-bit layer multiplies with, by the name of its weight."""
    compute = DTYPES["fp32"]
    return {f"{name}.weight": quant.dense_weight(layer, compute) for name, layer in quant.four_bit_layers(model)}
