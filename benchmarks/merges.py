"""A model with random weights as large as wanted, written layer by layer, and one merge of it."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.tiny import save_tiny_base
from qdpo.export.merge import shards
from qdpo.export.merge.merge import merge_run
from qdpo.export.merge.shards import PlannedTensor
from qdpo.measure.random_base import config_of
from qdpo.model.device import peak_gib
from qdpo.run import disk
from qdpo.run.folder import RunDir
from qdpo.settings import layered

WAYS = ("dequantized", "original", "peft")


def write_model(work: Path, shape: str, layers: int | None) -> dict[str, Any]:
    """Base and run in `work`; returns its layers, weights and bytes in bf16."""
    config = config_of(shape, layers=layers)
    base, run = work / "base", RunDir(work / "run")
    save_tiny_base(base)  # for its tokenizer
    (base / "model.safetensors").unlink()
    config.architectures = [type(_empty(config)).__name__]
    config.save_pretrained(base)
    model = _empty(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    planned = [
        PlannedTensor(name, torch.bfloat16, tuple(parameter.shape))
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name not in tied
    ]
    disk.need_space(work, 2 * sum(tensor.bytes for tensor in planned), "The base and one merged model")
    torch.manual_seed(0)
    shards.write_shards(base, planned, _random)
    _write_run(run, base, model)
    weights = sum(tensor.bytes // 2 for tensor in planned)
    return {"layers": config.num_hidden_layers, "weights": weights, "bytes": 2 * weights}


def merge_once(way: str, work: Path) -> dict[str, float]:
    """Merges, measures, and removes what was written. Only for a process that does nothing else: peaks add up."""
    out, begun, cpu = work / way, time.monotonic(), time.process_time()
    if way == "peft":
        model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.bfloat16)
        PeftModel.from_pretrained(model, str(work / "run" / "adapter")).merge_and_unload().save_pretrained(out)
    else:
        merge_run(RunDir(work / "run"), out, base=way, dtype="bf16", watcher=_Silent())  # type: ignore[arg-type]
    seconds, cpu_seconds = time.monotonic() - begun, time.process_time() - cpu
    shutil.rmtree(out)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gib": peak_gib(torch.device("cpu"))}


def _empty(config: Any) -> Any:
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _random(tensor: PlannedTensor) -> Iterator[Tensor]:
    left = tensor.bytes // 2
    while left:
        count = min(left, 2**22)
        yield torch.empty(count, dtype=torch.bfloat16).normal_(std=0.02)
        left -= count


def _write_run(run: RunDir, base: Path, model: Any) -> None:
    run.path.mkdir()
    settings = layered.flat(layered.resolve([f"model.path={base}", "data.path=none.jsonl", "model.device=cpu"]).config)
    found = {"model.dtype": "bf16"}
    disk.write_json(run.record, {"settings": settings, "found": found, "base": {"commit": None}, "files": {}})
    disk.write_json(run.environment, {"device": "cpu"})
    disk.write_json(run.result, {})
    peft = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    adapter = {
        name.replace(".default", ""): torch.empty(parameter.shape).normal_(std=0.01)
        for name, parameter in peft.named_parameters()
        if "lora_" in name
    }
    run.adapter.mkdir()
    save_file(adapter, run.adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    lora = peft.peft_config["default"].to_dict()
    lora["target_modules"] = sorted(lora["target_modules"])
    (run.adapter / "adapter_config.json").write_text(json.dumps({**lora, "inference_mode": True}, default=str))


class _Silent:
    """A Watcher."""

    def say(self, line: str) -> None: ...

    def begin(self, what: str, total: int, unit: str) -> None: ...

    def advance(self, units: int) -> None: ...

    def finish(self) -> None: ...

    def step(self, record: dict[str, Any]) -> None: ...
