"""A random model of 2 layers with a byte tokenizer and a chat template, for trying a script out within a minute."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tiny_base(folder: Path, *, hybrid: bool = False) -> Path:
    """Writes model and tokenizer as a hub folder holds them; 64 wide, grouped-query attention, always the same.

    A Llama, or a Qwen3.5 text model with a gated delta net before its layer of attention.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|end|>", extra_special_tokens=["<|im_start|>"]
    )
    wrapped.chat_template = CHATML
    torch.manual_seed(7)
    size = dict(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.2, vocab_size=len(wrapped), eos_token_id=wrapped.eos_token_id, bos_token_id=None,
        pad_token_id=wrapped.pad_token_id,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(LlamaConfig(**size))
    if hybrid:
        layers = {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
        heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
        widths = {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**size, **layers, **heads, **widths))
    model.save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder
