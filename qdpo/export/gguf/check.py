"""Verifies a GGUF file against the model it was written from: every weight, and the logits of the model read back."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch.nn.functional import log_softmax
from transformers.utils.logging import disable_progress_bar

from qdpo.errors import VerificationError
from qdpo.export.gguf.form import Array, Names, context_length, form_of, row_order
from qdpo.export.gguf.vocabulary import PROBES
from qdpo.export.merge.weight_names import text_weights, weights
from qdpo.families.config_fields import family_of
from qdpo.families.family import GgufForm
from qdpo.model.base.text_model import text_model

Q = gguf.GGMLQuantizationType
# Half a unit in the last place of a mantissa of 10 or 7 bits; below 2^-14, float16 has fixed steps of 2^-24.
ROUNDING = {Q.F32: 0.0, Q.F16: 2.0**-11, Q.BF16: 2.0**-8}
FLOAT16_STEP = 2.0**-24
# As a share of a block's largest number: half a step of 127, and the rounding of the block's scale to float16.
Q8_ROUNDING = 0.5 / 127 + 2.0**-10
# Mean KL in nats, at least ten times the measured values: SmolLM2 with an adapter merged in float32 gives 4.4e-4 as
# bf16 (and 0 if the merged model is itself bf16) and 1.2e-3 as q8_0.
MAX_KL = {"f32": 1e-6, "bf16": 1e-2, "f16": 1e-3, "q8_0": 5e-2}
MAX_LOGIT = 1e-3


def check_weights(path: Path, merged: Path, form: GgufForm, config: Any) -> float:
    """Largest error of a weight read back, relative to its tensor's largest entry.

    Raises: VerificationError if a weight is missing, or its error is larger than its type's rounding.
    """
    names, places = Names(form, config, merged), text_weights(merged)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    found.pop("rope_freqs.weight", None)
    worst = 0.0
    wanted = [name for name in sorted(places) if names.of(name) in found]
    for name, tensor in weights(places, wanted):
        entry = found.pop(names.of(name))
        values = gguf.quants.dequantize(entry.data, entry.tensor_type)
        order = row_order(form, config, name)
        if order is not None:
            values = values[np.argsort(order)]
        shift = np.float32(form.norm_shift if name.endswith("norm.weight") else 0.0)
        expected = tensor.float().numpy()
        error = np.abs(values - shift - expected)
        if values.shape != expected.shape or not (error <= _allowed(expected, entry.tensor_type, float(shift))).all():
            raise VerificationError(f"{name} in {path.name} differs from the merged model. Please report this.")
        worst = max(worst, float(error.max() / max(np.abs(expected).max(), 1e-30)))
    left = set(places) - set(wanted)
    if found or left - ({"lm_head.weight"} if config.tie_word_embeddings else set()):
        raise VerificationError(f"{path.name} and {merged} hold different weights: {[*found, *left][:3]}.")
    return worst


def _allowed(expected: Array, kind: Any, shift: float) -> Array:
    size = np.abs(expected) + shift
    if kind == Q.Q8_0:
        blocks = size.reshape(-1, 32)
        largest = np.broadcast_to(blocks.max(axis=1, keepdims=True), blocks.shape).reshape(size.shape)
        return largest * Q8_ROUNDING + FLOAT16_STEP * 127
    rounding = ROUNDING[kind] + (2.0**-23 if shift else 0.0)
    allowed: Array = size * rounding + (FLOAT16_STEP if kind == Q.F16 else 0.0)
    return allowed


def check_logits(path: Path, merged: Path, tokenizer: Any, quant: str) -> tuple[float, float]:
    """Largest logit difference, and mean KL in nats, between the file as read by transformers and the merged model.

    Both run in float32 on the CPU: 8 bytes per weight. Raises: VerificationError if they differ by more than the type's
    rounding.
    """
    disable_progress_bar()
    config = text_model(merged).config
    # Beyond a window that GGUF cannot express the two models differ, so the file's context ends there.
    length = context_length(form_of(config, "convert_hf_to_gguf.py"), config)
    ids = torch.tensor([tokenizer(" ".join(PROBES), add_special_tokens=True).input_ids[:length]])
    theirs, ours = _logits(_read_gguf(path, merged), ids), _logits(_read_folder(merged), ids)
    p, q = log_softmax(ours, -1), log_softmax(theirs, -1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    largest = float((ours - theirs).abs().max())
    if not kl <= MAX_KL[quant] or (quant == "f32" and not largest <= MAX_LOGIT):
        raise VerificationError(
            f"{path.name}, read back, differs from {merged}: mean KL {kl:.2g} nats (allowed {MAX_KL[quant]:g}), "
            f"largest logit difference {largest:.2g}. It was removed; please report this."
        )
    return largest, kl


def _read_folder(folder: Path) -> Any:
    text = text_model(folder)
    return text.cls.from_pretrained(
        folder, config=text.config, key_mapping=text.key_mapping or None, dtype=torch.float32, local_files_only=True,
        use_safetensors=True,
    )  # fmt: skip


def _read_gguf(path: Path, merged: Path) -> Any:
    """The file's weights, through transformers' own reader, in a model of the merged folder's config.

    The reader omits settings that llama.cpp reads (rotary scaling, head size, windows), so the file's config is not
    used. The weights of a family that shares another's name in GGUF (Mistral) are read as the other's (Llama).
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GgufConfig

    config = text_model(merged).config
    family = family_of(config)
    if family is not None and family.gguf is not None and family.gguf.read_as is not None:
        fields, other = config.to_dict(), CONFIG_MAPPING[family.gguf.read_as]
        shared = other().to_dict().keys() & fields.keys() - {"model_type", "architectures"}
        config = other(**{name: fields[name] for name in shared})
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        config=config,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
    )


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(ids).logits[0].float()
    return logits
