"""Tiny random models of many families, built from their configs."""

from typing import Any

import torch
import transformers as hf

SIZE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 160,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Families whose attention goes through transformers' registry and is plain softmax: prompts can be shared.
SHARED = {
    "llama": lambda: hf.LlamaConfig(**SIZE),
    "qwen2": lambda: hf.Qwen2Config(**SIZE),
    "qwen3": lambda: hf.Qwen3Config(**SIZE, head_dim=8),
    "mistral-window": lambda: hf.MistralConfig(**SIZE, sliding_window=6),
    "gemma": lambda: hf.GemmaConfig(**SIZE, head_dim=8),
    "gemma3-window": lambda: hf.Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=6),
    "phi3": lambda: hf.Phi3Config(**SIZE),
    "granite": lambda: hf.GraniteConfig(**SIZE, logits_scaling=2.0),
    "cohere": lambda: hf.CohereConfig(**SIZE, logit_scale=0.5),
    "olmo2": lambda: hf.Olmo2Config(**SIZE),
    "smollm3": lambda: hf.SmolLM3Config(**SIZE),
    "gpt2": lambda: hf.GPT2Config(**GPT2),
}
# Families in which a shared row would be wrong, or cannot be computed by this attention function.
REFUSED = {
    "gemma2-softcap": lambda: hf.Gemma2Config(**SIZE, head_dim=8),
    "bloom-alibi": lambda: hf.BloomConfig(vocab_size=160, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    "falcon": lambda: hf.FalconConfig(
        vocab_size=160, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3
    ),
    "falcon-h1-mamba": lambda: hf.FalconH1Config(
        **SIZE, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8
    ),
}


def build(config: Any, attention: str) -> Any:
    """The family's causal model in float32, frozen, with the given attention function."""
    torch.manual_seed(1)
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.float().eval().requires_grad_(False)
