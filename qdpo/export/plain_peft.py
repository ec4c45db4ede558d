"""Normalises an adapter for every loader: names of the class that servers load, the scale inside B, alpha = rank.

A multimodal checkpoint is trained as its text model, under whose names the run's own adapter is kept. Servers build the
class that config.json names; plain PEFT finds none of those names there, and only warns. llama.cpp and Ollama support
only alpha / rank; vLLM does not support patterns.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qdpo.errors import VerificationError
from qdpo.export.merge.lora import A_SUFFIX, B_SUFFIX, CONFIG, PREFIX, WEIGHTS, Lora, read_lora
from qdpo.export.proof import served
from qdpo.model.base.text_model import model_config
from qdpo.model.base.weight_names import folder_names, served_skeleton
from qdpo.model.policy.lora_file import read_tensors
from qdpo.model.policy.lora_fit import check_part, full_config
from qdpo.model.policy.peft_names import peft_names
from qdpo.run import disk

CARD = "README.md"


@dataclass(frozen=True)
class NormalAdapter:
    """An adapter that was written and read back: its layers under the names of the class that it loads onto."""

    lora: Lora
    served: str


def write_normal(adapter: Path, base: Path, out: Path, *, card: str | None = None) -> NormalAdapter:
    """Writes the adapter folder `out`, reads it back and returns its contents.

    `card` replaces the README.md of `adapter`, whose code loads the names of the class that was trained.

    Raises: ConfigError for an adapter that cannot be exported; VerificationError if plain PEFT, in a process of its
    own, does not find every matrix in the class that servers load, or reads another adapter; DiskError.
    """
    check_part(model_config(base), adapter)
    lora, names = read_lora(adapter), folder_names(base)
    model = served_skeleton(names)
    on_servers = names.on_servers(model, lora.layers)
    renamed = Lora({on_servers[module]: layer for module, layer in lora.layers.items()}, lora.config)
    disk.write_folder(out, lambda part: _fill(part, renamed, adapter, model, base, card))
    return NormalAdapter(renamed, names.served.__name__)


def _fill(part: Path, lora: Lora, adapter: Path, model: Any, base: Path, card: str | None) -> None:
    tensors = {}
    for module, layer in lora.layers.items():
        tensors[f"{PREFIX}{module}{A_SUFFIX}"] = layer.a_RK
        tensors[f"{PREFIX}{module}{B_SUFFIX}"] = layer.b_NR
    save_file(tensors, part / WEIGHTS, metadata={"format": "pt"})
    kept = {name: lora.config.get(name) for name in ("base_model_name_or_path", "revision", "fan_in_fan_out")}
    targets = peft_names(model, lora.layers)
    config = full_config(
        {
            **{name: value for name, value in kept.items() if value is not None},
            "r": lora.rank,
            "lora_alpha": lora.rank,
            "target_modules": targets.modules,
            **({"target_parameters": targets.parameters} if targets.parameters else {}),
        }
    )
    (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in sorted(adapter.iterdir()):
        if path.is_file() and path.name not in (WEIGHTS, CONFIG) and not path.name.startswith("."):
            shutil.copyfile(path, part / path.name)
    if card is not None:
        (part / CARD).write_text(card, encoding="utf-8")
    _verify(part, lora, base)


def _verify(part: Path, trained: Lora, base: Path) -> None:
    """Raises: VerificationError unless plain PEFT, over the class that servers load, adds what was trained, no more."""
    again, stored = read_lora(part), read_tensors(part)
    odd = sorted(again.layers.keys() ^ trained.layers.keys())
    for module in trained.layers.keys() & again.layers.keys():
        layer = trained.layers[module]
        same_a = torch.equal(stored[f"{PREFIX}{module}{A_SUFFIX}"], layer.a_RK)
        if not (same_a and torch.equal(again.layers[module].b_NR, layer.b_NR)):
            odd.append(module)
    if odd:
        raise VerificationError(f"The exported adapter's {odd[0]} is not the trained one. Please report this.")
    check_loads(part, base, set(trained.layers))


def check_loads(adapter: Path, base: Path, modules: set[str], *, scaled: bool = False) -> None:
    """Loads an adapter folder by plain PEFT over the class that servers load, in a process of its own.

    Raises: VerificationError unless exactly `modules` are adapted, each by its matrices in the file, and with the
    factor 1 (with `scaled`, one and the same factor).
    """
    done = subprocess.run(
        [sys.executable, "-P", served.__file__, str(base), str(adapter)], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    if done.returncode or not done.stdout.strip():
        last = (done.stderr.strip().splitlines() or ["it ended without a message"])[-1]
        raise VerificationError(f"Plain PEFT cannot load the exported adapter over the class of {base}: {last}")
    found: dict[str, Any] = json.loads(done.stdout)
    scales: dict[str, float] = found["scales"]
    factor = next(iter(scales.values()), 1.0) if scaled else 1.0
    faults = {
        "matrices that have no place in it": found["unexpected"],
        "layers that are adapted and have no matrices": found["missing"],
        "matrices that PEFT changes": found["different"],
        "layers that are not adapted": sorted(modules - scales.keys()),
        "layers that were not trained": sorted(scales.keys() - modules),
        "layers with another scale": sorted(name for name, scale in scales.items() if scale != factor),
    }
    for fault, odd in faults.items():
        if odd:
            raise VerificationError(
                f"Plain PEFT does not load the adapter onto {found['class']} as it was trained: {len(odd)} {fault}, "
                f"such as {odd[0]}. Serve the merged model: `qdpo merge`."
            )
