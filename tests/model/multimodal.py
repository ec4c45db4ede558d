"""Tiny natively multimodal models, and their folders as hubs ship them, in two styles of names, and as transformers
saves them."""

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as hf
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING

from tests.conftest import tiny_tokenizer

Names = Literal["inner", "outer", "saved"]
"""`inner`: model.language_model.layers…; `outer`: language_model.model.layers…; `saved`: as save_pretrained writes."""

TEXT = 400
IMAGE = range(400, 408)  # ids of image tokens, behind those of text
SIZE: dict[str, Any] = {
    "vocab_size": 408, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "sliding_window": 32, "initializer_range": 0.1,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "first_k_dense_replace": 1, "intermediate_size_mlp": 128, "attention_chunk_size": 4096,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4, "vocab_size_per_layer_input": 408, "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2, "laurel_rank": 8,
}  # fmt: skip
LINEAR = ["linear_attention", "full_attention"] * 2
WINDOWS = ["sliding_attention", "full_attention"] * 2
TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
GEMMA = {"image_token_id": 400, "boi_token_id": 402, "eoi_token_id": 403, "audio_token_id": 404, "audio_config": None}
PATCHES = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64,
    "num_position_embeddings": 16,
}  # fmt: skip
IDS = {"image_token_id": 400, "video_token_id": 401, "vision_start_token_id": 402, "vision_end_token_id": 403}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}


def part(kind: str, **over: Any) -> dict[str, Any]:
    """The text part of a config, with the sizes above under the names that the class has."""
    cls = CONFIG_MAPPING[kind]
    if dataclasses.is_dataclass(cls):
        known: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(cls)}
    else:
        known = {name: entry.default for name, entry in inspect.signature(cls.__init__).parameters.items()}
    unset = ("sliding_window", "q_lora_rank", "vocab_size_per_layer_input", "shared_expert_intermediate_size")
    fields = {k: v for k, v in SIZE.items() if k in known and not (known[k] is None and k in unset)}
    config = cls(**{**fields, **over}).to_dict()
    found: dict[str, Any] = json.loads(json.dumps(config))
    return found


def _gemma3() -> Any:
    text = part("gemma3_text", layer_types=WINDOWS)
    return hf.Gemma3Config(text_config=text, vision_config=dict(TOWER), mm_tokens_per_image=4, image_token_index=400)


def _gemma3n() -> Any:
    text = part("gemma3n_text", layer_types=WINDOWS, activation_sparsity_pattern=None)
    vision = {"architecture": "mobilenetv5_300m_enc", "hidden_size": 32, "vocab_size": 4, "vocab_offset": 400}
    audio = {
        "hidden_size": 32, "vocab_size": 4, "vocab_offset": 404, "input_feat_size": 16, "conf_num_attention_heads": 2,
        "conf_num_hidden_layers": 1, "sscp_conv_channel_size": [4, 4],
    }  # fmt: skip
    return CONFIG_MAPPING["gemma3n"](
        text_config=text | {"vocab_size_per_layer_input": 400}, vision_config=vision, audio_config=audio
    )


def _gemma4(**text: Any) -> Any:
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    inner = part("gemma4_text", layer_types=WINDOWS, **text)
    return CONFIG_MAPPING["gemma4"](text_config=inner, vision_config=vision, **GEMMA)


def _gemma4_unified() -> Any:
    text = part("gemma4_unified_text", layer_types=WINDOWS, num_kv_shared_layers=0)
    vision = {"mm_embed_dim": 64, "mm_posemb_size": 64, "output_proj_dims": 64}
    return CONFIG_MAPPING["gemma4_unified"](text_config=text, vision_config=vision, **GEMMA)


def _mistral3(kind: str, *, tie_word_embeddings: bool = True, **text: Any) -> Any:
    vision = {"model_type": "pixtral", "head_dim": 16, **TOWER}
    return hf.Mistral3Config(
        text_config=part(kind, **text), vision_config=vision, image_token_index=400,
        tie_word_embeddings=tie_word_embeddings,
    )  # fmt: skip


def _llama4() -> Any:
    vision = {
        **TOWER, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
    }  # fmt: skip
    return hf.Llama4Config(text_config=part("llama4_text"), vision_config=vision, image_token_index=400)


def _with_tower(kind: str, text: dict[str, Any], **over: Any) -> Any:
    vision = {"model_type": "siglip_vision_model", **TOWER}
    return CONFIG_MAPPING[kind](text_config=text, vision_config=vision, **over)


def _qwen(kind: str, text: dict[str, Any], **vision: Any) -> Any:
    return CONFIG_MAPPING[kind](text_config=text, vision_config={**PATCHES, **vision}, **IDS)


def _mllama() -> Any:
    text = part("mllama_text_model", cross_attention_layers=[1, 3], num_hidden_layers=4)
    vision = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_global_layers": 1, "image_size": 28,
        "attention_heads": 2, "patch_size": 14, "vision_output_dim": 64, "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1]], "max_num_tiles": 1,
    }  # fmt: skip
    return CONFIG_MAPPING["mllama"](text_config=text, vision_config=vision, image_token_index=400)


def _internvl() -> Any:
    vision = {**TOWER, "image_size": [28, 28], "patch_size": [14, 14]}
    return CONFIG_MAPPING["internvl"](text_config=part("qwen2"), vision_config=vision, image_token_id=400)


def _glm4v() -> Any:
    vision = {**PATCHES, "num_heads": 2, "image_size": 28, "patch_size": 14}
    vision = {key: value for key, value in vision.items() if key != "num_position_embeddings"}
    return CONFIG_MAPPING["glm4v"](text_config=part("glm4v_text", **MROPE), vision_config=vision, **IDS)


CONFIGS: dict[str, Callable[[], Any]] = {
    "gemma3": _gemma3,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "gemma4-moe": lambda: _gemma4(enable_moe_block=True, top_k_experts=2),
    "gemma4_unified": _gemma4_unified,
    "mistral3": lambda: _mistral3("ministral3"),
    "mistral3-untied": lambda: _mistral3("mistral", tie_word_embeddings=False),
    "mistral4": lambda: _mistral3("mistral4", num_key_value_heads=4, head_dim=8, tie_word_embeddings=False),
    "llama4": _llama4,
    "lfm2_vl": lambda: _with_tower(
        "lfm2_vl", part("lfm2", layer_types=["conv", "full_attention"] * 2), image_token_id=400
    ),
    "qwen2_5_vl": lambda: _qwen("qwen2_5_vl", part("qwen2_5_vl_text", **MROPE)),
    "qwen3_vl": lambda: _qwen("qwen3_vl", part("qwen3_vl_text", **MROPE), deepstack_visual_indexes=[0]),
    "qwen3_vl_moe": lambda: _qwen("qwen3_vl_moe", part("qwen3_vl_moe_text", **MROPE), deepstack_visual_indexes=[0]),
    "qwen3_5": lambda: _qwen("qwen3_5", part("qwen3_5_text", layer_types=LINEAR)),
    "qwen3_5_moe": lambda: _qwen("qwen3_5_moe", part("qwen3_5_moe_text", layer_types=LINEAR)),
    "mllama": _mllama,
    "internvl": _internvl,
    "idefics3": lambda: _with_tower("idefics3", part("llama"), image_token_id=400),
    "smolvlm": lambda: _with_tower("smolvlm", part("llama"), image_token_id=400),
    "glm4v": _glm4v,
    "aya_vision": lambda: _with_tower("aya_vision", part("cohere2"), image_token_index=400),
    "cohere2_vision": lambda: _with_tower("cohere2_vision", part("cohere2"), image_token_id=400),
    "paligemma": lambda: _with_tower("paligemma", part("gemma"), image_token_index=400),
    "llava": lambda: _with_tower("llava", part("llama"), image_token_index=400),
}
"""Families in which the text model is a part."""


# Its language model attends to later tokens of text, too, so nothing can be learned from what it predicts.
LOOKING_AHEAD = "paligemma"


def whole_model(name: str, *, seed: int = 3, **changes: Any) -> Any:
    """The whole model of a family in float32, with weights that show a mistake; `changes` are to its config."""
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    auto: Any = hf.AutoModelForImageTextToText
    torch.manual_seed(seed)
    model = auto.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    return model


def save_folder(model: Any, folder: Path, names: Names = "saved", *, shards: int = 1) -> Path:
    """Writes the whole model with the tiny tokenizer; `shards` is the number of weight files (not for `saved`)."""
    tokenizer = tiny_tokenizer()
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    if names == "saved":
        model.save_pretrained(folder)
    else:
        folder.mkdir(parents=True)
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        write_weights(folder, {renamed(name, names): tensor for name, tensor in weights_of(model).items()}, shards)
    tokenizer.save_pretrained(folder)
    return folder


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """The weights by the names of the model's own modules, each shared one once."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            found[name] = tensor.contiguous()
            seen.add(tensor.data_ptr())
    return found


def renamed(name: str, names: Names) -> str:
    """The name of a weight of the whole model in the files."""
    if names == "inner":
        return name
    for ours, theirs in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name.removeprefix("model.")


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Writes the tensors as a hub does, with an index if there are several files."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        chosen = dict(list(tensors.items())[number::shards])
        save_file(chosen, folder / file, {"format": "pt"})
        places |= dict.fromkeys(chosen, file)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def text_logits(model: Any, seed: int = 0) -> torch.Tensor:
    """The logits of three short texts."""
    # The forward of Llama 4's whole class reads a field of pictures in any case (transformers 5.24).
    model = model.language_model if isinstance(model, hf.Llama4ForConditionalGeneration) else model
    token_BT = torch.randint(3, TEXT, (3, 40), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=token_BT, use_cache=False).logits
    return logits
