"""Loads the merged model as anyone would: plain transformers in a separate process. Imports nothing of qdpo.

Standard output carries one line of JSON, {"vocabulary": V}, and then the float32 logits (V) of every answer token,
in order. The reader consumes them tile by tile, and the pipe makes this process wait for it.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
import transformers
from torch import Tensor, nn

# A module with more numbers of its own than this, such as the experts of a layer, is float32 only during its call.
WIDE = 2**24


def main(folder: str, answers_file: str, device: str, rows: str, part: str = "") -> None:
    """Writes the logits of every [ids, number of answer tokens] in the JSON file, `rows` tokens at a time.

    The class is the one that config.json names, as servers load it; or, with `part`, the text class described there.
    """
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print to stderr instead
    model = _load(folder, device, json.loads(part) if part else None).eval()
    in_float32(model, lambda layer: layer.weight.float())
    answers = json.loads(Path(answers_file).read_text(encoding="utf-8"))
    out.write(json.dumps({"vocabulary": model.get_output_embeddings().weight.shape[0]}).encode() + b"\n")
    for ids, length in answers:
        _write(model, torch.tensor([ids], device=device), length, int(rows), out)
    out.flush()


def _load(folder: str, device: str, part: dict[str, Any] | None) -> Any:
    arguments: dict[str, Any] = {
        "dtype": "auto", "device_map": {"": device}, "local_files_only": True, "trust_remote_code": False,
        "use_safetensors": True,
    }  # fmt: skip
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if part is not None:
        text = config.get_text_config()
        text.tie_word_embeddings = part["tied"]
        cls = getattr(transformers, part["class"])
        return cls.from_pretrained(folder, config=text, key_mapping=part["key_mapping"], **arguments)
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    if cls is None or not isinstance(config, cls.config_class or type(config)):
        cls = transformers.AutoModelForCausalLM
        cls = cls if type(config) in cls._model_mapping else transformers.AutoModelForMultimodalLM
    return cls.from_pretrained(folder, **arguments)


def in_float32(model: nn.Module, dense: Callable[[Any], Tensor]) -> None:
    """Makes a model compute in float32 with its existing weights; at most one large weight is copied at a time.

    Only the weights are compared: 4-bit and 16-bit layers round their 16-bit products differently.
    """
    for module in model.modules():
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        if isinstance(module, nn.Linear) and (
            type(module).forward is nn.Linear.forward or hasattr(module, "quant_state")
        ):
            _replace(module, partial(_linear, module, dense))
        elif isinstance(module, nn.Embedding):
            _replace(module, partial(_embedding, module.forward))
        elif own > WIDE:
            _replace(module, partial(_widened, module, module.forward))
        else:
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point():  # packed experts are bytes
                    parameter.data = parameter.data.float()


def _replace(module: Any, forward: Callable[[Tensor], Tensor]) -> None:
    module.forward = forward


def _embedding(forward: Callable[[Tensor], Tensor], token: Tensor) -> Tensor:
    return forward(token).float()


def _widened(module: nn.Module, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    narrow = {parameter: parameter.data for parameter in module.parameters(recurse=False)}
    try:
        for parameter, data in narrow.items():
            parameter.data = data.float()
        return forward(*inputs, **named)
    finally:
        for parameter, data in narrow.items():
            parameter.data = data


def _linear(layer: nn.Linear, dense: Callable[[Any], Tensor], x: Tensor) -> Tensor:
    # Some models cast the input to the type of the weight, which stays as it is (DeepSeek V3.2's indexer).
    return nn.functional.linear(x.float(), dense(layer), None if layer.bias is None else layer.bias.float())


def _write(model: Any, token_1T: Tensor, length: int, rows: int, out: BinaryIO) -> None:
    # The token before an answer predicts its first token; the answer's last token predicts nothing here.
    short = {"logits_to_keep": length + 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        logit_NV = model(input_ids=token_1T, use_cache=False, **short).logits[0, -length - 1 : -1]
    for tile_RV in torch.split(logit_NV, rows):
        out.write(tile_RV.float().contiguous().cpu().numpy().data)


if __name__ == "__main__":
    main(*sys.argv[1:])
