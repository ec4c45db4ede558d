"""Folders of full-size expert layers with random numbers, and the memory of loading them: for scripts/bench_experts."""

import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qdpo.families import known
from qdpo.model.base.expert_files import stacks_of
from qdpo.model.base.load import load_base
from qdpo.model.base.text_model import config_of_json, skeleton, text_model_of
from qdpo.model.device import peak_gib

# Embedding table and head are not what is measured.
VOCABULARY = 1024
CPU = torch.device("cpu")


def write_folder(folder: Path, name: str, layers: int) -> dict[str, float]:
    """Writes so many layers of a model, a file each, as its maker ships them: experts one by one in bf16, or MXFP4."""
    config = {**known.config_of(name), "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    config |= dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    model = skeleton(text_model_of(config_of_json(config)))
    in_mxfp4 = config["model_type"] == "gpt_oss"
    if in_mxfp4:
        config["quantization_config"] = {"quant_method": "mxfp4"}
    folder.mkdir(parents=True)
    stacks, files = stacks_of(model), {}
    by_layer: dict[str, list[tuple[str, torch.Size]]] = {}
    for key, parameter in model.state_dict().items():
        by_layer.setdefault(key.partition("layers.")[2].partition(".")[0], []).append((key, parameter.shape))
    for layer, named in by_layer.items():
        tensors: dict[str, Tensor] = {}
        for key, shape in named:
            if key not in stacks:
                tensors[key] = torch.randn(shape, dtype=torch.bfloat16) * 0.02
            else:
                tensors |= _mxfp4(key, shape) if in_mxfp4 else _one_by_one(key, shape)
        file = f"model-{layer or 'outside'}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config))
    numbers = sum(shape.numel() for shape in stacks.values())
    size = sum(path.stat().st_size for path in folder.iterdir())
    return {"gib": size / 2**30, "experts": numbers, "layer_gib": 2 * numbers / layers / 2**30}


def _one_by_one(key: str, shape: torch.Size) -> dict[str, Tensor]:
    """The matrices of each expert, as Qwen ships them."""
    experts, rows, columns = shape
    place, _, stack = key.rpartition(".")
    parts = {"gate_proj": rows // 2, "up_proj": rows // 2} if stack == "gate_up_proj" else {"down_proj": rows}
    return {
        f"{place}.{expert}.{part}.weight": torch.randn(size, columns, dtype=torch.bfloat16) * 0.02
        for part, size in parts.items()
        for expert in range(experts)
    }


def _mxfp4(key: str, shape: torch.Size) -> dict[str, Tensor]:
    """Codes and exponents, as gpt-oss is shipped: the stack is (E, K, N), the codes are (E, N, groups, 16)."""
    experts, inputs, outputs = shape
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
    return {f"{key}_blocks": blocks, f"{key}_scales": torch.randint(118, 124, blocks.shape[:3], dtype=torch.uint8)}


def load_once(folder: Path) -> dict[str, float]:
    """Loads the folder in NF4. Only for a process that does nothing else: peaks add up."""
    before, begun = peak_gib(CPU), time.monotonic()
    model = load_base(
        folder, quantization="nf4", double_quant=True, dtype="bf16", device=CPU, attention_name=None,
        announce=lambda line: None,
    )  # fmt: skip
    seconds, peak = time.monotonic() - begun, peak_gib(CPU)
    held = sum(one.numel() * one.element_size() for one in [*model.parameters(), *model.buffers()]) / 2**30
    return {"before_gib": before, "peak_gib": peak, "held_gib": held, "seconds": seconds}
