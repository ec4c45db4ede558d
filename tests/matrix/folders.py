"""Natively multimodal models as their makers ship them: a text model nested in a whole one, with a small tower.

The whole class writes the files, so the names of the tensors are those of hub folders.
"""

from collections.abc import Callable
from typing import Any

import transformers as hf

from tests.matrix.configs import TEXT, Size, config_of, text_config

VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_position_embeddings": 16,
}  # fmt: skip
# Token ids that stand for a picture; none of them is in a text.
QWEN_IDS = {"image_token_id": 1190, "video_token_id": 1191, "vision_start_token_id": 1192, "vision_end_token_id": 1193}
GEMMA_IDS = {"image_token_id": 1190, "boi_token_id": 1191, "eoi_token_id": 1192}
Make = Callable[[Size, dict[str, int]], Any]


def _text(family: str, size: Size, ids: dict[str, int]) -> dict[str, Any]:
    config: dict[str, Any] = text_config(TEXT[family], size, **ids).to_dict()
    return config


def _qwen3_5(size: Size, ids: dict[str, int]) -> Any:
    vision = {**QWEN_VISION, "out_hidden_size": size.hidden}
    return hf.Qwen3_5Config(text_config=_text("qwen3_5 (text)", size, ids), vision_config=vision, **QWEN_IDS)


def _qwen3_5_moe(size: Size, ids: dict[str, int]) -> Any:
    vision = {**QWEN_VISION, "out_hidden_size": size.hidden}
    return hf.Qwen3_5MoeConfig(text_config=_text("qwen3_5_moe (text)", size, ids), vision_config=vision, **QWEN_IDS)


def _qwen3_vl(size: Size, ids: dict[str, int]) -> Any:
    text = config_of("qwen3_vl_text", size, {}, **ids).to_dict()
    vision = {**QWEN_VISION, "out_hidden_size": size.hidden, "deepstack_visual_indexes": [0]}
    return hf.Qwen3VLConfig(text_config=text, vision_config=vision, **QWEN_IDS)


def _gemma3(size: Size, ids: dict[str, int]) -> Any:
    pictures = {"image_token_index": 1190, "boi_token_index": 1191, "eoi_token_index": 1192, "mm_tokens_per_image": 4}
    return hf.Gemma3Config(text_config=_text("gemma3 (text)", size, ids), vision_config=VISION, **pictures)


def _gemma3n(size: Size, ids: dict[str, int]) -> Any:
    audio = {"hidden_size": 32, "conf_num_hidden_layers": 1, "conf_num_attention_heads": 2, "vocab_offset": 1180}
    audio |= {"vocab_size": 4}
    vision = {"hidden_size": 32, "vocab_offset": 1176, "vocab_size": 4}
    return hf.Gemma3nConfig(
        text_config=_text("gemma3n (text)", size, ids), vision_config=vision, audio_config=audio, **GEMMA_IDS,
        audio_token_id=1193, boa_token_id=1194, eoa_token_id=1195,
    )  # fmt: skip


def _gemma4(size: Size, ids: dict[str, int]) -> Any:
    vision = {**VISION, "num_key_value_heads": 2, "head_dim": 16}
    return hf.Gemma4Config(
        text_config=_text("gemma4 (text)", size, ids), vision_config=vision, audio_config=None, **GEMMA_IDS,
        video_token_id=1193, audio_token_id=1194,
    )  # fmt: skip


def _gemma4_unified(size: Size, ids: dict[str, int]) -> Any:
    vision = {"mm_embed_dim": size.hidden, "mm_posemb_size": size.hidden, "output_proj_dims": size.hidden}
    return hf.Gemma4UnifiedConfig(
        text_config=_text("gemma4_unified (text)", size, ids), vision_config=vision, audio_config=None, **GEMMA_IDS,
        video_token_id=1193, audio_token_id=1194,
    )  # fmt: skip


def _pixtral(text: dict[str, Any]) -> Any:
    vision = {**VISION, "model_type": "pixtral", "head_dim": 16}
    return hf.Mistral3Config(text_config=text, vision_config=vision, image_token_index=1190)


def _mistral4(size: Size, ids: dict[str, int]) -> Any:
    return _pixtral(config_of("mistral4", size, size.mla, **ids).to_dict())


def _llama4(size: Size, ids: dict[str, int]) -> Any:
    out = {name: size.hidden for name in ("vision_output_dim", "projector_input_dim", "projector_output_dim")}
    return hf.Llama4Config(
        text_config=_text("llama4 (text)", size, ids), vision_config={**VISION, **out}, image_token_index=1190
    )


def _lfm2_vl(size: Size, ids: dict[str, int]) -> Any:
    vision = {**VISION, "model_type": "siglip2_vision_model", "num_patches": 4}
    return hf.Lfm2VlConfig(
        text_config=_text("lfm2", size, ids), vision_config=vision, image_token_id=1190, projector_hidden_size=64
    )


FOLDERS: dict[str, Make] = {
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gemma4_unified": _gemma4_unified,
    "mistral3 (Mistral Small 3)": lambda size, ids: _pixtral(_text("mistral", size, ids)),
    "mistral3 (Ministral 3)": lambda size, ids: _pixtral(_text("ministral3", size, ids)),
    "mistral4": _mistral4,
    "qwen3_vl": _qwen3_vl,
    "llama4": _llama4,
    "gemma3n": _gemma3n,
    "lfm2_vl": _lfm2_vl,
}
