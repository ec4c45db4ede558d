"""Loads an adapter as a server's base sees it: the class that config.json names, no weights, plain PEFT. No qdpo.

Standard output is one line of JSON: the class; the tensors that PEFT made for the adapter and found no values for
(`missing`), those of the file that found no place (`unexpected`), those whose values are not the file's (`different`);
and the factor of B·A of each adapted module. PEFT itself only warns of the first two.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn

WEIGHTS = "adapter_model.safetensors"


def main(base: str, adapter: str) -> None:
    """Loads the adapter folder over the class of the base's config.json and writes the findings."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print to stderr instead
    warnings.simplefilter("ignore")  # of tensors that stay on meta
    model = bare_model(base)
    peft: Any = PeftModel.from_pretrained(
        model, adapter, low_cpu_mem_usage=True, torch_device="cpu", local_files_only=True
    )
    layers = {name: part for name, part in peft.get_base_model().named_modules() if isinstance(part, LoraLayer)}
    held = load_file(str(Path(adapter) / WEIGHTS))
    for layer in layers.values():  # PEFT leaves A and B on meta, where the base is
        layer.lora_A.to_empty(device="cpu")
        layer.lora_B.to_empty(device="cpu")
        for parameter in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
            parameter.data.fill_(torch.nan)
    set_peft_model_state_dict(peft, dict(held))
    made: dict[str, Tensor] = get_peft_model_state_dict(peft, save_embedding_layers=False)
    found = {
        "class": type(model).__name__,
        "missing": sorted(name for name in made if name not in held),
        "unexpected": sorted(name for name in held if name not in made),
        "different": sorted(name for name in made if name in held and not _same(made[name], held[name])),
        "scales": {name: float(layer.scaling["default"]) for name, layer in layers.items()},
    }
    out.write(json.dumps(found) + "\n")
    out.flush()


def bare_model(base: str) -> nn.Module:
    """The class that the folder's config.json names, without weights; transformers' choice where it names none."""
    config = transformers.AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    named = (config.architectures or [""])[0]
    cls: Any = getattr(transformers, named, None)
    if cls is None or not isinstance(config, cls.config_class or type(config)):
        cls = transformers.AutoModelForCausalLM
        cls = cls if type(config) in cls._model_mapping else transformers.AutoModelForMultimodalLM
        cls = cls._model_mapping[type(config)]
    with torch.device("meta"):
        model: nn.Module = cls._from_config(config)
    return model


def _same(made: Tensor, held: Tensor) -> bool:
    return made.shape == held.shape and bool(torch.equal(made.float(), held.float()))


if __name__ == "__main__":
    main(*sys.argv[1:])
