"""Writes a merged model as one GGUF file: a header from config and tokenizer, then the weights one at a time."""

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from qdpo.errors import ConfigError
from qdpo.export.gguf.check import check_weights
from qdpo.export.gguf.form import (
    Array,
    Names,
    context_length,
    form_of,
    other_writer,
    require_exact,
    row_order,
)
from qdpo.export.gguf.vocabulary import Vocabulary, vocabulary
from qdpo.export.merge.weight_names import WeightPlace, text_weights, weights
from qdpo.export.servers import command
from qdpo.families.family import GgufForm
from qdpo.families.gguf_exact import full_rope, head_size
from qdpo.model.base.text_model import text_model
from qdpo.run import disk
from qdpo.train.start.tokenizer import RunTokenizer, tokenizer_in

Q = gguf.GGMLQuantizationType
TYPES = {"f32": Q.F32, "f16": Q.F16, "bf16": Q.BF16, "q8_0": Q.Q8_0}
FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
# llama.cpp's own quantisations, which need its tool; users type the name in lower case.
LLAMA_CPP_TYPES = {kind.name.removeprefix("MOSTLY_").lower() for kind in gguf.LlamaFileType} - set(TYPES)


@dataclass(frozen=True)
class Written:
    """The file written and the result of its verification."""

    vocabulary: str
    weights: int
    largest_error: float


def require_quant(quant: str, kinds: dict[str, Any], f16: Path) -> None:
    """Raises: ConfigError for a type that qdpo does not write; for llama.cpp's own types, with the two commands."""
    if quant in kinds:
        return
    if quant in LLAMA_CPP_TYPES:
        raise ConfigError(
            f"--quant {quant}: only llama.cpp's own tool writes this type. Export with `--quant bf16`, then run:\n"
            f"  {command('llama-quantize', f16, f16.with_name(f'model-{quant}.gguf'), quant.upper())}"
        )
    raise ConfigError(f"--quant {quant} is not known. Choose one of {', '.join(kinds)}.")


def write_gguf(
    merged: Path, out: Path, *, quant: str, name: str, base_gguf: Path | None, tokenizer: RunTokenizer | None = None
) -> Written:
    """Writes the model in `merged` to `out`; every weight is read back before the file gets its final name.

    `tokenizer` is the run's; None for the one in `merged`.

    Raises: ConfigError for a family, config or tokenizer that cannot be written, with llama.cpp's command;
    VerificationError if the file differs from the model; DiskError.
    """
    words = command("python", "convert_hf_to_gguf.py", merged, "--outfile", out, "--outtype", quant)
    otherwise = other_writer(merged, words)
    config, places = text_model(merged).config, text_weights(merged)
    form = form_of(config, otherwise)
    require_exact(form, config, otherwise)
    plan = [
        _planned(places[source], source, target, quant) for source, target in _entries(merged, places, form, config)
    ]
    rows = next(entry.shape[0] for entry in plan if entry.target == "token_embd.weight")
    found = tokenizer or tokenizer_in(merged)
    vocab = vocabulary(found.tokenizer, rows=rows, base_gguf=base_gguf, otherwise=otherwise, ends=found.ends)
    size = sum(entry.n_bytes for entry in plan)
    disk.need_space(out.parent, size, f"Writing {out.name}")
    errors: list[float] = []

    def fill(part: Path) -> None:
        _write(part, places, form, config, plan, vocab, quant, name)
        errors.append(check_weights(part, merged, form, config))

    disk.write_file(out, fill)
    return Written(vocab.origin, len(plan), errors[0])


@dataclass(frozen=True)
class _Entry:
    """One weight of the file."""

    source: str
    target: str
    shape: tuple[int, ...]
    kind: Any

    @property
    def n_bytes(self) -> int:
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // int(block) * int(block_bytes)


def _entries(merged: Path, places: dict[str, WeightPlace], form: GgufForm, config: Any) -> Iterator[tuple[str, str]]:
    names = Names(form, config, merged)
    for name in sorted(places):
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp uses the embedding if there is no head
        yield name, names.of(name)


def _planned(place: WeightPlace, source: str, target: str, quant: str) -> _Entry:
    from safetensors import safe_open

    with safe_open(place.path, framework="pt") as file:
        shape = tuple(file.get_slice(place.key).get_shape())
    kind = TYPES[quant]
    if len(shape) == 1:
        kind = Q.F32  # llama.cpp adds and multiplies norms and biases in float32
    elif shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = Q.F16  # a row is not a whole number of blocks
    return _Entry(source, target, shape, kind)


def stored(weight: Array, source: str, form: GgufForm, config: Any) -> Array:
    """The numbers that GGUF stores for a weight: rows in its order, norms shifted."""
    order = row_order(form, config, source)
    if order is not None:
        weight = weight[order]
    shifted: Array = weight + np.float32(form.norm_shift) if source.endswith("norm.weight") else weight
    return shifted


def _write(
    part: Path, places: dict[str, WeightPlace], form: GgufForm, config: Any, plan: list[_Entry], words: Vocabulary,
    quant: str, name: str,
) -> None:  # fmt: skip
    with closing(gguf.GGUFWriter(part, form.arch)) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[quant])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        _add_shape(writer, form, config)
        words.add_to(writer)
        extra = rope_factors(config)
        if extra is not None:
            writer.add_tensor_info("rope_freqs.weight", extra.shape, extra.dtype, extra.nbytes)
        for entry in plan:
            writer.add_tensor_info(entry.target, entry.shape, np.dtype(np.float32), entry.n_bytes, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if extra is not None:
            writer.write_tensor_data(extra)
        for (source, tensor), entry in zip(weights(places, [entry.source for entry in plan]), plan, strict=True):
            values = stored(tensor.float().numpy(), source, form, config)
            writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(values), entry.kind))


def _add_shape(writer: gguf.GGUFWriter, form: GgufForm, config: Any) -> None:
    rope = full_rope(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(form, config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if form.window_pattern is not None:
        writer.add_sliding_window(config.sliding_window)
        local = config.rope_parameters.get("sliding_attention", rope)
        writer.add_rope_freq_base_swa(local["rope_theta"])
    elif form.has_original_context:
        writer.add_sliding_window(0)
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def rope_factors(config: Any) -> Array | None:
    """The factor by which Llama 3's scaling lowers each rotary frequency, shape (head size / 2,); else None."""
    rope = full_rope(config)
    if rope["rope_type"] != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = head_size(config)
    plain = 1.0 / rope["rope_theta"] ** (np.arange(0, size, 2, dtype=np.float64) / size)
    scaled = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0].double().numpy()
    factors: Array = (plain / scaled).astype(np.float32)
    return factors
