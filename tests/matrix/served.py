"""The exported adapter on the class that servers load, in a process that has loaded nothing else: plain PEFT."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from tests.matrix.exact import served_class


def load_on_served_class(base: Path, adapter: Path) -> dict[str, Any]:
    """The number of the adapter's matrices, and of those that the class of the base's config.json receives."""
    warnings.filterwarnings("ignore")
    held = load_file(adapter / "adapter_model.safetensors")
    kind = served_class(base)
    try:
        model = kind.from_pretrained(base, dtype=torch.float32).eval()
    except ImportError as error:
        return {"kind": kind.__name__, "cannot": str(error).strip().splitlines()[0]}
    ids = torch.randint(300, 1000, (1, 24), generator=torch.Generator().manual_seed(0))
    peft = PeftModel.from_pretrained(model, str(adapter)).eval()
    loaded = get_peft_model_state_dict(peft, save_embedding_layers=False)
    found = sum(name in loaded and torch.equal(loaded[name].float(), tensor.float()) for name, tensor in held.items())
    return {"kind": kind.__name__, "found": found, "all": len(held), "effect": _effect(peft, ids)}


@torch.no_grad()
def _effect(peft: Any, ids: torch.Tensor) -> float | None:
    """The most that the adapter changes a logit; None where the class cannot be called with text alone."""
    try:
        on = peft(input_ids=ids, use_cache=False).logits
        with peft.disable_adapter():
            off = peft(input_ids=ids, use_cache=False).logits
    except AttributeError:
        return None
    return float((on - off).abs().max())
