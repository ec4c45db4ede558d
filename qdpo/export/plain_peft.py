"""Normalises an adapter for every loader: the scale inside B, alpha equal to the rank, no patterns, no rsLoRA.

llama.cpp and Ollama support only alpha / rank; vLLM does not support patterns.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from qdpo.errors import VerificationError
from qdpo.export.merge.lora import A_SUFFIX, B_SUFFIX, CONFIG, PREFIX, WEIGHTS, Lora, read_lora
from qdpo.export.merge.weight_names import require_layers, weight_files
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
    config = {
        **lora.config,
        "r": lora.rank,
        "lora_alpha": lora.rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": _targets(lora, base),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in sorted(adapter.iterdir()):
        if path.is_file() and path.name not in (WEIGHTS, CONFIG) and not path.name.startswith("."):
            shutil.copyfile(path, part / path.name)
    _verify(part, tensors_of=lora)


def _targets(lora: Lora, base: Path) -> list[str]:
    """The last parts of the layers' names if no other layer of the base has them, else the full names; sorted."""
    last = {module.rpartition(".")[2] for module in lora.layers}
    of_base = {name.removesuffix(".weight") for name in weight_files(base) if name.endswith(".weight")}
    named = {module for module in of_base if module.rpartition(".")[2] in last}
    return sorted(last if named == set(lora.layers) else lora.layers)


def _verify(part: Path, *, tensors_of: Lora) -> None:
    again = read_lora(part)
    stored = load_file(part / WEIGHTS)
    for module, layer in tensors_of.layers.items():
        same = module in again.layers and (again.layers[module].b_NR == layer.b_NR).all()
        if not same or not (stored[f"{PREFIX}{module}{A_SUFFIX}"] == layer.a_RK).all():
            raise VerificationError(f"The exported adapter's {module} is not the trained one. Please report this.")
