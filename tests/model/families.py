"""Tiny random models of many families, built from their configs, with an adapter that does something; tiny rows."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers as hf

from qdpo.data.tokens.pack import PairRow
from qdpo.data.tokens.sieve import TokenPair
from qdpo.model.base.text_model import decoder_of
from qdpo.model.fast import attention
from qdpo.model.fast.logps import Head
from qdpo.model.policy import adapter, recompute
from qdpo.model.policy.adapter import Policy, RowLayout
from qdpo.model.policy.forward import row_scores
from qdpo.model.policy.row import RowTensors
from qdpo.train.step.step import row_tensors

CPU = torch.device("cpu")
Families = dict[str, Callable[[], Any]]

SIZE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 160,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FALCON = {
    "vocab_size": 160,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}
ONE_KEY_HEAD_EACH = {name: value for name, value in SIZE.items() if name != "num_key_value_heads"}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "factor": 4.0,
}

# Plain softmax attention through transformers' registry: SDPA pair by pair.
SHARED: Families = {
    "llama": lambda: hf.LlamaConfig(**SIZE),
    "qwen2": lambda: hf.Qwen2Config(**SIZE),
    "qwen3": lambda: hf.Qwen3Config(**SIZE, head_dim=8),
    "mistral-window": lambda: hf.MistralConfig(**SIZE, sliding_window=6),
    "gemma": lambda: hf.GemmaConfig(**SIZE, head_dim=8),
    "gemma3-window": lambda: hf.Gemma3TextConfig(
        **SIZE, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: hf.Phi3Config(**SIZE),
    "phi3-longrope": lambda: hf.Phi3Config(**SIZE, rope_parameters=LONG_ROPE, original_max_position_embeddings=32),
    "granite": lambda: hf.GraniteConfig(**SIZE, logits_scaling=2.0),
    "cohere": lambda: hf.CohereConfig(**SIZE, logit_scale=0.5),
    "olmo2": lambda: hf.Olmo2Config(**SIZE),
    "smollm3": lambda: hf.SmolLM3Config(**SIZE),
    "starcoder2": lambda: hf.Starcoder2Config(**SIZE),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**ONE_KEY_HEAD_EACH),
    "mixtral": lambda: hf.MixtralConfig(**SIZE, num_local_experts=4),
    "gpt2": lambda: hf.GPT2Config(**GPT2),
}
# Soft-capped scores or sinks: products written out pair by pair.
SCORED: Families = {
    # Random scores are small: this cap bends them.
    "gemma2-softcap": lambda: hf.Gemma2Config(**SIZE, head_dim=8, sliding_window=6, attn_logit_softcapping=1.0),
    "gpt-oss-sinks": lambda: hf.GptOssConfig(**SIZE, head_dim=8, num_local_experts=4, sliding_window=6),
}
# Attention that cannot be ours: a mask of T×T, with the function that the family has.
MASKED: Families = {
    "falcon": lambda: hf.FalconConfig(**FALCON),
    "stablelm": lambda: hf.StableLmConfig(**SIZE),
    "xglm": lambda: hf.XGLMConfig(
        vocab_size=160, d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, init_std=0.2, scale_embedding=False
    ),
}
# Families in which a shared row would be wrong.
SEPARATE: Families = {
    "bloom-alibi": lambda: hf.BloomConfig(vocab_size=160, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.2),
    "falcon-alibi": lambda: hf.FalconConfig(**FALCON, alibi=True),
    "gpt-neo-local": lambda: hf.GPTNeoConfig(
        vocab_size=160, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        window_size=6, initializer_range=0.2,
    ),
    "falcon-h1-mamba": lambda: hf.FalconH1Config(
        **SIZE, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8
    ),
    "qwen3-next": lambda: hf.Qwen3NextConfig(
        **SIZE, head_dim=8, num_experts=4, num_experts_per_tok=2, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    ),
    "llama4": lambda: hf.Llama4TextConfig(
        **SIZE, head_dim=8, num_local_experts=2, intermediate_size_mlp=64, attention_chunk_size=4096
    ),
    "olmo-hybrid": lambda: hf.OlmoHybridConfig(
        **SIZE, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "mamba": lambda: hf.MambaConfig(vocab_size=160, hidden_size=32, num_hidden_layers=2, initializer_range=0.2),
}  # fmt: skip
# peft refuses to adapt the linear layers that a Mamba block's kernel reads by itself, and warns about fused experts.
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TARGETS = {
    "falcon_h1": ATTENTION, "mamba": ["in_proj"], "mixtral": ATTENTION, "qwen3_next": ATTENTION,
    "llama4_text": ATTENTION, "olmo_hybrid": ATTENTION,
}  # fmt: skip


def build(config: Any, attention_name: str | None) -> Any:
    """The family's causal model in float32, frozen; with None for attention, as transformers chooses it."""
    attention.register()
    torch.manual_seed(1)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention_name)
    # Sinks are born uninitialised.
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            parameter.data.normal_()
    return model.float().eval().requires_grad_(False)


def make_policy(
    config: Any,
    *,
    kept_layers: int | str = "all",
    attention_name: str | None = attention.NAME,
    layout: RowLayout = "spans",
    dtype: torch.dtype = torch.float32,
) -> Policy:
    """A policy whose adapter does something: B is not zero."""
    model = build(config, attention_name).to(dtype)
    targets = TARGETS.get(config.model_type, ["all-linear"])
    peft = adapter.new_adapter(model, rank=4, alpha=8, targets=targets, rslora=False, seed=0)
    torch.manual_seed(2)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    causal = peft.get_base_model()
    policy = Policy(peft, decoder_of(causal), Head.of(causal), CPU, layout, tile_mib=1)
    recompute.Layers(policy.backbone).keep(kept_layers)
    return policy


def pairs(count: int = 3) -> list[TokenPair]:
    rng = np.random.default_rng(4)
    sizes = [(9, 4, 7), (3, 8, 2), (12, 1, 5)][:count]
    return [
        TokenPair(*(rng.integers(3, 160, n, dtype=np.int32) for n in size), row) for row, size in enumerate(sizes, 1)
    ]


def tiny_row(count: int = 3) -> RowTensors:
    return row_tensors(PairRow(pairs(count)), CPU)


def scores(policy: Policy, row: RowTensors, layout: RowLayout | None = None) -> torch.Tensor:
    """The row's log-probs; `layout` is the policy's from here on."""
    policy.layout = layout or policy.layout
    return row_scores(policy, row.token_T, row.position_T, row.source_N, row.label_N, row.spans, metrics=False).logp


Scored = tuple[torch.Tensor, dict[str, torch.Tensor]]


def differentiated(policy: Policy, row: RowTensors, layout: RowLayout | None = None) -> Scored:
    """Log-probs, and the adapter's gradients of a weighted sum of them."""
    logp = scores(policy, row, layout)
    policy.peft.zero_grad()
    (logp * torch.linspace(-1, 1, len(logp), device=logp.device)).sum().backward()
    return logp.detach(), {
        name: p.grad.clone() for name, p in policy.adapter_parameters().items() if p.grad is not None
    }


def assert_equal(found: Scored, expected: Scored) -> None:
    """Log-probs and every adapter gradient agree, to the rounding of float32."""
    assert (found[0] - expected[0]).abs().max() < 2e-5
    largest = max(gradient.abs().max() for gradient in expected[1].values())
    assert found[1].keys() == expected[1].keys() and largest > 0
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= 2e-6 * largest, name
