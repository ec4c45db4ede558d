"""The facts about each family of models, by transformers' model_type: a new family is one more entry. No torch.

A field that is None is a missing feature: without a `layer` there is no forecast, without a `gguf` no GGUF file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class LayerForm:
    """A decoder layer, as far as its structure affects its memory."""

    norms: int = 2
    """RMS norms per layer over the hidden width."""
    head_norms: bool = False
    """Queries and keys are normalised too."""
    fused_mlp: bool = False
    """Gate and up are one matrix, which is dequantised at once."""
    copied_output: bool = False
    """The attention output is copied before its last product."""
    scored: bool = False
    """Attention scores are soft-capped, so they are computed in blocks."""


@dataclass(frozen=True, kw_only=True)
class GgufForm:
    """The family's weights as GGUF, and the variants that llama.cpp computes as transformers does."""

    arch: str
    is_interleaved: bool = False
    """llama.cpp rotates neighbouring rows of a head, so the rows of q and k are reordered."""
    norm_shift: float = 0.0
    """Added to the weights of norms: Gemma's multiply by 1 + w in transformers and by w in llama.cpp."""
    activation: str = "silu"
    has_biases: bool = False
    always_tied: bool = False
    ropes: tuple[str, ...] = ("default", "linear", "llama3")
    """Rotary scalings that llama.cpp computes in the same way."""
    heads_fill_hidden: bool = False
    """True if llama.cpp assumes that the heads together are as wide as the hidden state."""
    has_original_context: bool = False
    """True if the file holds the context length before rotary scaling, and a window of 0."""
    read_as: str | None = None
    """The model_type as which transformers reads the file, if it is not the family's own."""
    is_readable: bool = True
    """False if transformers does not read the family's files at all."""
    window_pattern: int | None = None
    """Every n-th layer attends to all positions, the others within a window; None: llama.cpp has no window here."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """The facts about one model_type."""

    layer: LayerForm | None = None
    """Checked against a traced step by tests/measure/test_trace.py."""
    tied: bool = False
    """Head and embedding share one table where a config.json does not say."""
    transposed: bool = False
    """Linear layers are stored with inputs first."""
    gguf: GgufForm | None = None
    defaults: Mapping[str, int] = field(default_factory=dict)
    """Numbers of transformers' class that a multimodal model's config.json may leave out of its text part."""


_GELU = "gelu_pytorch_tanh"

FAMILIES = {
    "llama": Family(layer=LayerForm(), gguf=GgufForm(arch="llama", is_interleaved=True)),
    "mistral": Family(layer=LayerForm(), gguf=GgufForm(arch="llama", is_interleaved=True, read_as="llama")),
    "qwen2": Family(layer=LayerForm(), gguf=GgufForm(arch="qwen2", has_biases=True, ropes=("default", "linear"))),
    "qwen3": Family(layer=LayerForm(head_norms=True), gguf=GgufForm(arch="qwen3", ropes=("default", "linear"))),
    "smollm3": Family(layer=LayerForm(), tied=True),
    "granite": Family(layer=LayerForm()),
    "gemma": Family(
        layer=LayerForm(),
        tied=True,
        gguf=GgufForm(
            arch="gemma", norm_shift=1.0, activation=_GELU, always_tied=True, ropes=("default",), is_readable=False
        ),
    ),
    "gemma2": Family(
        layer=LayerForm(norms=4, scored=True, copied_output=True),
        tied=True,
        gguf=GgufForm(
            arch="gemma2", norm_shift=1.0, activation=_GELU, always_tied=True, ropes=("default",), window_pattern=2
        ),
    ),
    "gemma3_text": Family(
        layer=LayerForm(norms=4, head_norms=True, copied_output=True),
        tied=True,
        gguf=GgufForm(arch="gemma3", norm_shift=1.0, activation=_GELU, ropes=("default", "linear"), window_pattern=6),
        defaults={
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "vocab_size": 262_208,
            "max_position_embeddings": 131_072,
        },  # fmt: skip
    ),
    "phi3": Family(
        layer=LayerForm(fused_mlp=True, copied_output=True),
        gguf=GgufForm(arch="phi3", ropes=("default",), heads_fill_hidden=True, has_original_context=True),
    ),
    "olmo2": Family(layer=LayerForm(head_norms=True)),
    "gpt2": Family(transposed=True),
    "openai-gpt": Family(transposed=True),
}
WITH_FORECAST = [name for name, family in FAMILIES.items() if family.layer is not None]
WITH_GGUF = [name for name, family in FAMILIES.items() if family.gguf is not None]
