"""A config for every family of text models: the real config class, at a size that trains in seconds, or wide enough for
a forecast.

A family is its model_type and what a small model of it must change. Everything else is filled in from a `Size` by the
names that the config class itself takes, so a new family is one line in TEXT.
"""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING

LINEAR = ["linear_attention", "full_attention"] * 2
WINDOWS = ["sliding_attention", "full_attention"] * 2
CONVOLUTIONS = ["conv", "full_attention"] * 2


@dataclass(frozen=True, kw_only=True)
class Size:
    """The numbers that all families are scaled by."""

    hidden: int
    inner: int
    heads: int
    key_heads: int
    head: int
    experts: int
    expert_inner: int
    low_rank: int
    rope: int
    state_heads: int
    state: int
    window: int
    vocabulary: int
    positions: int = 4096
    layers: int = 4

    @property
    def mla(self) -> dict[str, Any]:
        """Multi-head latent attention: every head has keys of its own, and the config's head_dim is the rotary part."""
        return {"num_key_value_heads": self.heads, "head_dim": self.rope}


TINY = Size(
    hidden=64, inner=128, heads=4, key_heads=2, head=16, experts=4, expert_inner=64, low_rank=32, rope=8,
    state_heads=4, state=16, window=32, vocabulary=1200,
)  # fmt: skip
MEDIUM = Size(
    hidden=1024, inner=2816, heads=16, key_heads=4, head=64, experts=8, expert_inner=704, low_rank=256, rope=32,
    state_heads=16, state=64, window=512, vocabulary=32000,
)  # fmt: skip

Changes = Callable[[Size], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """A text model's type, and what differs from the numbers that every config is given."""

    model_type: str
    changes: Changes = lambda size: {}


def _layers(*kinds: str) -> Changes:
    return lambda size: {"layer_types": list(kinds)}


def _mla() -> Changes:
    return lambda size: size.mla


def gemma4(size: Size) -> dict[str, Any]:
    """Both kinds of layers; heads of full attention are wider."""
    return {"layer_types": WINDOWS, "global_head_dim": 2 * size.head}


TEXT = {
    "llama": Family("llama"),
    "mistral": Family("mistral"),
    "ministral": Family("ministral"),
    "ministral3": Family("ministral3"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen3_5 (text)": Family("qwen3_5_text", _layers(*LINEAR)),
    "qwen3_5_moe (text)": Family("qwen3_5_moe_text", _layers(*LINEAR)),
    "qwen3_next": Family("qwen3_next", _layers(*LINEAR)),
    "qwen3_moe": Family("qwen3_moe"),
    "qwen2_moe": Family("qwen2_moe"),
    "qwen4_exp (text)": Family(
        "qwen4_exp_text",
        lambda size: {
            "layer_types": LINEAR, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": size.head,
            "indexer_budget": 512, "indexer_compress_ratio": 4, "hc_lowrank": 16, "hc_count": 2,
        },
    ),
    # Six layers: every sixth attends to all positions, as llama.cpp takes it.
    "gemma3 (text)": Family("gemma3_text", lambda size: {"num_hidden_layers": 6, "query_pre_attn_scalar": size.head}),
    "gemma3n (text)": Family(
        "gemma3n_text",
        lambda size: {
            "layer_types": WINDOWS, "laurel_rank": 8, "num_kv_shared_layers": 2, "activation_sparsity_pattern": None,
        },
    ),
    "gemma4 (text)": Family("gemma4_text", lambda size: gemma4(size)),
    "gemma4 (text, shared K and V)": Family(
        "gemma4_text", lambda size: {**gemma4(size), "num_kv_shared_layers": 2, "attention_k_eq_v": True}
    ),
    "gemma4 (text, experts)": Family(
        "gemma4_text",
        lambda size: {
            **gemma4(size), "enable_moe_block": True, "num_experts": size.experts, "top_k_experts": 2,
            "moe_intermediate_size": size.expert_inner,
        },
    ),
    "gemma4_unified (text)": Family("gemma4_unified_text", lambda size: gemma4(size)),
    "gpt_oss": Family("gpt_oss", _layers(*WINDOWS)),
    "llama4 (text)": Family(
        "llama4_text", lambda size: {"attention_chunk_size": size.positions, "intermediate_size_mlp": size.inner}
    ),
    "mixtral": Family("mixtral"),
    "phi3": Family("phi3"),
    "glm4": Family("glm4"),
    "glm4_moe": Family("glm4_moe"),
    "glm4_moe_lite": Family("glm4_moe_lite", _mla()),
    "granite": Family("granite"),
    "granitemoehybrid": Family("granitemoehybrid", _layers(*["mamba", "attention"] * 2)),
    "lfm2": Family("lfm2", _layers(*CONVOLUTIONS)),
    "lfm2_moe": Family("lfm2_moe", _layers(*CONVOLUTIONS)),
    "lfm3": Family("lfm3"),
    "nemotron_h": Family("nemotron_h"),
    "falcon_h1": Family("falcon_h1"),
    "olmo3": Family("olmo3", _layers(*WINDOWS)),
    "olmo_hybrid": Family("olmo_hybrid", _layers(*LINEAR)),
    "smollm3": Family("smollm3"),
    "exaone4": Family("exaone4", _layers(*WINDOWS)),
    "deepseek_v3": Family("deepseek_v3", _mla()),
    "deepseek_v32": Family(
        "deepseek_v32", lambda size: {**size.mla, "index_head_dim": size.low_rank, "index_topk": 16}
    ),
    "deepseek_v4": Family(
        "deepseek_v4",
        lambda size: {
            "o_lora_rank": 16, "index_head_dim": 16, "index_n_heads": 4, "index_topk": 16, "head_dim": 2 * size.head,
            "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * 2,
            # Short enough for the answers of a test.
            "compress_rates": {"heavily_compressed_attention": 16, "compressed_sparse_attention": 4},
        },
    ),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense"),
    "hunyuan_v1_moe": Family("hunyuan_v1_moe"),
    "ernie4_5": Family("ernie4_5"),
    "seed_oss": Family("seed_oss"),
    "cohere2": Family("cohere2", _layers(*WINDOWS)),
    "starcoder2": Family("starcoder2"),
    "minicpm3": Family("minicpm3", _mla()),
    "helium": Family("helium"),
    "apertus": Family("apertus"),
    "arcee": Family("arcee"),
    "bailing_hybrid": Family(
        "bailing_hybrid",
        lambda size: {"layer_types": LINEAR, "qk_rope_head_dim": size.head, "num_key_value_heads": size.heads},
    ),
    "kimi_linear": Family(
        "kimi_linear",
        lambda size: {
            "layer_types": LINEAR, "linear_head_dim": size.state, "linear_num_heads": size.state_heads, **size.mla,
        },
    ),
    "minimax_m2": Family("minimax_m2"),
    "hrm_text": Family("hrm_text"),
    "nanochat": Family("nanochat"),
    "granitemoe": Family("granitemoe"),
    "olmoe": Family("olmoe"),
    "olmo2": Family("olmo2"),
    "cohere2_moe": Family("cohere2_moe", _layers(*WINDOWS)),
    "exaone_moe": Family("exaone_moe", _layers(*WINDOWS)),
    "ernie4_5_moe": Family("ernie4_5_moe"),
    "dots1": Family("dots1", _layers(*WINDOWS)),
    "hy_v3": Family("hy_v3"),
    "mimo_v2_flash": Family("mimo_v2_flash", _layers(*WINDOWS)),
    "vaultgemma": Family(
        "vaultgemma", lambda size: {"layer_types": WINDOWS, "query_pre_attn_scalar": size.head}
    ),
}  # fmt: skip
# Parts that a class has only where it is asked for: its default of None is kept.
OPTIONAL = {
    "sliding_window", "q_lora_rank", "vocab_size_per_layer_input", "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size", "prefix_dense_intermediate_size",
}  # fmt: skip


def config_of(model_type: str, size: Size, changes: dict[str, Any], **ids: int) -> Any:
    """A config of this type and size; `ids` are those of the tokenizer's special tokens."""
    kind = CONFIG_MAPPING[model_type]
    defaults = taken_by(kind)
    other_names = getattr(kind, "attribute_map", {})
    given = {
        name: value
        for name, value in {**numbers(size), **ids}.items()
        if (name in defaults or other_names.get(name) in defaults)
        and not (name in OPTIONAL and defaults.get(name, 0) is None)
    }
    return kind(**{**given, **changes})


def text_config(family: Family, size: Size, **ids: int) -> Any:
    """The config of a family of TEXT."""
    return config_of(family.model_type, size, family.changes(size), **ids)


def taken_by(kind: Any) -> dict[str, Any]:
    """The arguments of a config class, with their defaults."""
    if dataclasses.is_dataclass(kind):
        return {field.name: field.default for field in dataclasses.fields(kind)}
    return {name: parameter.default for name, parameter in inspect.signature(kind.__init__).parameters.items()}


def numbers(size: Size) -> dict[str, Any]:
    """Every name that a config class may have for a number of `size`."""
    return {
        "vocab_size": size.vocabulary, "hidden_size": size.hidden, "intermediate_size": size.inner,
        "num_hidden_layers": size.layers, "num_attention_heads": size.heads, "num_key_value_heads": size.key_heads,
        "head_dim": size.head, "max_position_embeddings": size.positions, "sliding_window": size.window,
        "initializer_range": 0.1,
        # Mixtures of experts.
        "num_experts": size.experts, "num_local_experts": size.experts, "n_routed_experts": size.experts,
        "moe_num_experts": size.experts, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1,
        "topk_group": 1, "moe_intermediate_size": size.expert_inner, "first_k_dense_replace": 1,
        "n_shared_experts": 1, "moe_num_shared_experts": 1, "num_shared_experts": 1,
        "shared_expert_intermediate_size": size.expert_inner, "shared_intermediate_size": size.expert_inner,
        "moe_shared_expert_intermediate_size": size.expert_inner,
        # Latent attention.
        "q_lora_rank": size.low_rank, "kv_lora_rank": size.low_rank, "qk_rope_head_dim": size.rope,
        "qk_nope_head_dim": size.head, "v_head_dim": size.head,
        # Gated delta nets.
        "linear_num_value_heads": size.state_heads, "linear_num_key_heads": size.state_heads // 2,
        "linear_key_head_dim": size.state, "linear_value_head_dim": size.state, "linear_conv_kernel_dim": 4,
        # State-space layers.
        "mamba_n_heads": size.state_heads, "mamba_d_head": size.state, "mamba_d_state": size.state,
        "mamba_d_ssm": size.hidden, "mamba_chunk_size": 16, "mamba_n_groups": 1, "mamba_expand": 1,
        "mamba_num_heads": size.state_heads, "mamba_head_dim": size.state, "ssm_state_size": size.state,
        "n_groups": 1, "chunk_size": 16,
        # Embeddings of every layer.
        "vocab_size_per_layer_input": size.vocabulary, "hidden_size_per_layer_input": size.head,
        "num_kv_shared_layers": 0,
    }  # fmt: skip
