"""Normalises an adapter for every loader: the scale inside B, alpha equal to the rank, no patterns, no rsLoRA.

llama.cpp and Ollama support only alpha / rank; vLLM does not support patterns.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from qdpo.errors import ConfigError, VerificationError
from qdpo.export.merge.lora import A_SUFFIX, B_SUFFIX, CONFIG, PREFIX, WEIGHTS, Lora, read_lora
from qdpo.export.merge.weight_names import require_layers
from qdpo.model.base.load import model_config
from qdpo.model.policy.adapter import read_by_peft
from qdpo.model.policy.lora_file import module_of, read_tensors
from qdpo.model.policy.lora_fit import full_config, saved_state, scales, skeleton
from qdpo.model.policy.peft_names import peft_names
from qdpo.run import disk


def write_normal(adapter: Path, base: Path, out: Path) -> Lora:
    """Writes the adapter folder `out`, reads it back and returns its contents.

    Raises: ConfigError for an adapter that cannot be exported; VerificationError if its layers are not the base's, or
    if the written adapter differs from the trained one; DiskError.
    """
    lora = read_lora(adapter)
    require_layers(lora.layers, base)
    disk.write_folder(out, lambda part: _fill(part, lora, adapter, base))
    return lora


def _fill(part: Path, lora: Lora, adapter: Path, base: Path) -> None:
    tensors = {}
    for module, layer in lora.layers.items():
        tensors[f"{PREFIX}{module}{A_SUFFIX}"] = layer.a_RK
        tensors[f"{PREFIX}{module}{B_SUFFIX}"] = layer.b_NR
    save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
    named = {name: lora.config.get(name) for name in ("base_model_name_or_path", "revision", "fan_in_fan_out")}
    config = full_config(
        {
            **{name: value for name, value in named.items() if value is not None},
            "r": lora.rank,
            "lora_alpha": lora.rank,
            **_targets(lora, base),
        }
    )
    (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in sorted(adapter.iterdir()):
        if path.is_file() and path.name not in (WEIGHTS, CONFIG) and not path.name.startswith("."):
            shutil.copyfile(path, part / path.name)
    _verify(part, lora, base)


def _targets(lora: Lora, base: Path) -> dict[str, list[str]]:
    """The fields by which plain PEFT adapts these layers of the base and no others."""
    names = peft_names(skeleton(model_config(base)), lora.layers)
    fields = {"target_modules": names.modules, "target_parameters": names.parameters}
    return {field: value for field, value in fields.items() if value}


def _verify(part: Path, trained: Lora, base: Path) -> None:
    """Raises: VerificationError unless plain PEFT, over this base, adds to each layer what was trained, and no more."""
    again, stored = read_lora(part), read_tensors(part)
    try:
        model = read_by_peft(model_config(base), part)
    except ConfigError as error:
        raise VerificationError(f"The exported adapter is not the trained one: {error}") from error
    read, factors = {module_of(name) for name in saved_state(model)}, scales(model)
    odd = sorted(read ^ set(trained.layers))
    for module, layer in trained.layers.items():
        same = module in again.layers and torch.equal(again.layers[module].b_NR, layer.b_NR)
        if not same or not torch.equal(stored[f"{PREFIX}{module}{A_SUFFIX}"], layer.a_RK) or factors.get(module) != 1:
            odd.append(module)
    if odd:
        raise VerificationError(
            f"The exported adapter's {odd[0]} is not the trained one as plain PEFT reads it. Please report this."
        )
