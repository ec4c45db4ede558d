"""The digest of a config: what changes a forward pass changes it, and nothing else."""

from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from qdpo.families.forward_values import forward_digest

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
CHANGES: dict[str, list[dict[str, Any]]] = {
    "mistral": [
        {"sliding_window": 130}, {"sliding_window": None}, {"rms_norm_eps": 1e-5}, {"hidden_act": "gelu"},
        {"rope_parameters": YARN}, {"rope_parameters": {**YARN, "factor": 8.0}}, {"head_dim": 4},
        {"max_position_embeddings": 77}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True},
        {"pad_token_id": 3}, {"a_field_of_tomorrow": 1},
    ],
    "gemma2": [
        {"attn_logit_softcapping": 10.0}, {"final_logit_softcapping": None}, {"query_pre_attn_scalar": 100},
        {"layer_types": ["full_attention", "full_attention"]},
    ],
    "granite": [{"logits_scaling": 2.0}, {"residual_multiplier": 0.5}, {"attention_multiplier": 0.1}],
    "cohere2": [{"logit_scale": 0.5}, {"layer_norm_eps": 1e-3}],
    "mixtral": [{"num_experts_per_tok": 1}],
    "phimoe": [{"router_jitter_noise": 0.5}],
    "qwen3_moe": [{"norm_topk_prob": True}, {"decoder_sparse_step": 2}],
    "deepseek_v3": [{"routed_scaling_factor": 1.0}, {"n_group": 2}, {"topk_group": 2}],
}  # fmt: skip
SAME: list[dict[str, Any]] = [
    {"attention_dropout": 0.1}, {"eos_token_id": [1, 2]}, {"bos_token_id": 7}, {"use_cache": False},
    {"dtype": "bfloat16"}, {"initializer_range": 0.5}, {"architectures": ["Other"]}, {"name_or_path": "elsewhere"},
    {"id2label": {0: "a", 1: "b"}}, {"transformers_version": "5.17.0"},
]  # fmt: skip


def digest(kind: str, **changes: Any) -> str:
    return forward_digest(CONFIG_MAPPING[kind](**{**SMALL, **changes}).to_dict())


@pytest.mark.parametrize("kind", CHANGES)
def test_what_changes_the_numbers_changes_the_digest(kind: str) -> None:
    digests = {digest(kind), *(digest(kind, **change) for change in CHANGES[kind])}
    assert len(digests) == 1 + len(CHANGES[kind])


@pytest.mark.parametrize("change", SAME, ids=str)
def test_what_changes_no_number_does_not(change: dict[str, Any]) -> None:
    assert digest("mistral", **change) == digest("mistral")


def test_other_families_with_the_same_values_differ() -> None:
    assert digest("mistral", sliding_window=None) != digest("llama")


def test_parts_count_as_the_whole_does() -> None:
    inner = CONFIG_MAPPING["gemma3"](text_config={"sliding_window": 64}).to_dict()
    other = CONFIG_MAPPING["gemma3"](text_config={"sliding_window": 128}).to_dict()
    dropped = CONFIG_MAPPING["gemma3"](text_config={"sliding_window": 64, "attention_dropout": 0.5}).to_dict()
    assert forward_digest(inner) == forward_digest(dropped) != forward_digest(other)
