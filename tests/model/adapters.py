"""Adapter folders as PEFT and other kits write them, over a tiny base."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def load(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()


def make(folder: Path, base: Path, **changes: Any) -> Path:
    """An adapter whose B is not zero, trained nowhere, saved by PEFT."""
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **changes}
    torch.manual_seed(6)
    peft = get_peft_model(load(base), LoraConfig(**settings))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    peft.save_pretrained(folder)
    return folder


def edited(folder: Path, **changes: Any) -> Path:
    """The adapter with fields of its config replaced."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def with_tensors(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """The adapter with tensors replaced, added, or (None) taken out."""
    held = load_file(folder / WEIGHTS) | tensors
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, folder / WEIGHTS)
    return folder


def write_config(folder: Path, **changes: Any) -> Path:
    """A config as PEFT writes it, beside an empty file of weights."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    content = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()} | changes
    (folder / CONFIG).write_text(json.dumps(content))
    (folder / WEIGHTS).touch()
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    found: torch.Tensor = model(ids).logits[0].float()
    return found
