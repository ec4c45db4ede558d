"""Packs the weights of a plain folder as makers ship them: FP8 by blocks or by tensors, MXFP4 experts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.export.runs import save_base
from tests.model.families import SIZE

# The end of the vocabulary is that of the tiny tokenizer; 4-bit blocks of 64 need rows of 64.
WIDE = {**SIZE, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 402}
MINISTRAL = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
GPT_OSS = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
# The settings of huggingface/transformers pull request 42715, and of deepseek-ai/DeepSeek-V3 and openai/gpt-oss-20b.
STATIC = {
    "activation_scheme": "static", "modules_to_not_convert": MINISTRAL, "quant_method": "fp8", "weight_block_size": None
}  # fmt: skip
BLOCKS = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [48, 40]}
MXFP4 = {"modules_to_not_convert": GPT_OSS, "quant_method": "mxfp4"}
HEADS: dict[str, Any] = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16}
FOUR = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def ministral3() -> Any:
    return hf.Ministral3Config(**WIDE, head_dim=16)


def deepseek_v3() -> Any:
    return hf.DeepseekV3Config(
        **{**WIDE, "num_key_value_heads": 4}, **HEADS, v_head_dim=16, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, moe_intermediate_size=56, first_k_dense_replace=1, n_shared_experts=1,
    )  # fmt: skip


def gpt_oss() -> Any:
    return hf.GptOssConfig(
        **WIDE, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip


def in_eight_bits(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Codes and scales of a matrix, a scale for each block; those at the edges are smaller."""
    rows, columns = weight.shape
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    codes, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            here = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[here].float().abs().max() / 448
            codes[here] = (weight[here].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def in_four_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and exponents of experts (E, K, N), as gpt-oss stores them: (E, N, G, 16) and (E, N, G)."""
    plain = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    power = torch.floor(torch.log2(plain.abs().amax(-1).clamp(min=2.0**-100))) - 2
    scaled = plain / torch.exp2(power)[..., None]
    code = (scaled.abs()[..., None] - FOUR).abs().argmin(-1) + 8 * (scaled < 0)
    return (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8), (power + 127).to(torch.uint8)


def pack(plain: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """A copy of the folder in the form that `settings`, the quantization_config, describe."""
    shutil.copytree(plain, folder)
    weights = load_file(folder / "model.safetensors")
    packed: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if "vision_tower" in name or "multi_modal_projector" in name:
            packed[name] = weight
        elif settings["quant_method"] == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = in_four_bits(weight)
        elif settings["quant_method"] == "fp8" and name.endswith(("proj.weight", "_mqa.weight")):
            block = settings["weight_block_size"]
            packed[name], scale = in_eight_bits(weight, block or tuple(weight.shape))
            packed[f"{name}_scale_inv"] = scale if block else scale.reshape(())
            if settings["activation_scheme"] == "static":
                packed[name.replace(".weight", ".activation_scale")] = torch.tensor(0.5)
        else:
            packed[name] = weight
    save_file(packed, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, quantization_config=settings)
    return folder


ORIGINALS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "ministral3": (ministral3, STATIC),
    "deepseek_v3": (deepseek_v3, BLOCKS),
    "gpt_oss": (gpt_oss, MXFP4),
}


def save_original(name: str, folder: Path, **changes: Any) -> Path:
    """The folder of a random model as its maker would ship it."""
    config, settings = ORIGINALS[name]
    plain = save_base(folder.with_name(folder.name + "-plain"), config(), dtype=torch.bfloat16)
    return pack(plain, folder, {**settings, **changes})


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Changes the tensors of a folder."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit(folder: Path, **changes: Any) -> None:
    """Changes the folder's config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def stated(folder: Path, **changes: Any) -> None:
    """Changes the folder's quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    edit(folder, quantization_config={**config["quantization_config"], **changes})
