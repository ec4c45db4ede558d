"""Settings of a config that llama.cpp computes otherwise than transformers: no GGUF by qdpo for these. No torch."""

from typing import Any

from qdpo.families.family import GgufForm


def inexact(form: GgufForm, config: Any) -> str | None:
    """The setting of a transformers config that llama.cpp does not compute as transformers does, or None."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    rope = full_rope(config)
    head_dim = head_size(config)
    layers = getattr(config, "layer_types", None) or []
    checks = {
        f"the activation {activation}": activation != form.activation,
        f"rotary scaling of type {rope['rope_type']}": rope["rope_type"] not in form.ropes,
        "a partial rotary embedding": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "attention biases": not form.has_biases and bool(getattr(config, "attention_bias", False)),
        "MLP biases": bool(getattr(config, "mlp_bias", False)),
        "an untied output head": form.always_tied and not config.tie_word_embeddings,
        "attention in both directions": bool(getattr(config, "use_bidirectional_attention", False)),
        "sliding windows": bool(getattr(config, "use_sliding_window", False)),
        "a query scale of its own": getattr(config, "query_pre_attn_scalar", head_dim) != head_dim,
        "heads that do not fill the hidden size": form.heads_fill_hidden
        and head_dim * config.num_attention_heads != config.hidden_size,
        "an unusual order of windowed layers": form.window_pattern is not None
        and any(
            (kind == "full_attention") != (index % form.window_pattern == form.window_pattern - 1)
            for index, kind in enumerate(layers)
        ),
    }
    return next((reason for reason, applies in checks.items() if applies), None)


def full_rope(config: Any) -> Any:
    """Rotary settings of the layers that attend to all positions, by name."""
    rope = config.rope_parameters
    return rope.get("full_attention", rope)


def head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
