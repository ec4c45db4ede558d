"""GGUF files say what the model is: read back by gguf, by transformers, and against each other."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer

from qdpo.errors import ConfigError, VerificationError
from qdpo.export.gguf import check, vocabulary
from qdpo.export.gguf.adapter import read_deltas, write_gguf_adapter
from qdpo.export.gguf.model import Written, write_gguf
from qdpo.families.family import FAMILIES
from qdpo.model.base.load import load_tokenizer, model_config
from tests.conftest import tiny_tokenizer
from tests.export.made import GEMMA, SHAPE, WRITABLE, pieces_tokenizer, save_adapter, save_base, save_merged


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: save_base(folder / name, config()) for name, config in WRITABLE.items()}


@pytest.fixture(scope="module")
def llama(bases: dict[str, Path]) -> Path:
    return bases["llama"]


def write(folder: Path, out: Path, quant: str = "f32") -> Written:
    return write_gguf(folder, out, quant=quant, name="a name", base_gguf=None)


def raw(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    tensors = gguf.GGUFReader(path).tensors
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy() for tensor in tensors}


@pytest.mark.parametrize("name", WRITABLE)
def test_transformers_reads_the_same_model(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """transformers undoes the order of rows and the shift of norms with code of its own."""
    base = bases[name]
    assert write(base, tmp_path / "model.gguf").largest_error < 1e-6
    if name != "gemma":  # transformers reads no GGUF of the first Gemma; llama.cpp does, in test_llama_cpp
        largest, kl = check.check_logits(tmp_path / "model.gguf", base, load_tokenizer(base), "f32")
        assert largest < 1e-3 and kl < 1e-6


@pytest.mark.parametrize("name", WRITABLE)
def test_the_adapter_is_what_merging_adds(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Two GGUF files, base and merged by PEFT, differ by exactly what the adapter's GGUF adds, row by row."""
    base = bases[name]
    adapter = save_adapter(tmp_path / "adapter", base, use_rslora=True, rank_pattern={"o_proj": 2})
    save_merged(tmp_path / "merged", base, adapter)
    error = write_gguf_adapter(adapter, base, tmp_path / "lora.gguf", quant="f32", name="a name")
    assert error < 1e-6
    for place, out in ((base, "base.gguf"), (tmp_path / "merged", "merged.gguf")):
        write(place, tmp_path / out)
    before, after = raw(tmp_path / "base.gguf"), raw(tmp_path / "merged.gguf")
    deltas = read_deltas(tmp_path / "lora.gguf")
    assert deltas
    for target, weight in before.items():
        expected = after[target] - weight
        found = deltas.get(target, torch.zeros(expected.shape)).numpy()
        assert np.abs(found - expected).max() < 1e-5, target
    assert set(deltas) <= set(before)


@pytest.mark.parametrize("quant", ["f16", "q8_0"])
def test_smaller_types_round_and_no_more(quant: str, llama: Path, tmp_path: Path) -> None:
    written = write(llama, tmp_path / "model.gguf", quant)
    assert 0 < written.largest_error < 2.0**-7
    _largest, kl = check.check_logits(tmp_path / "model.gguf", llama, load_tokenizer(llama), quant)
    assert kl < check.MAX_KL[quant]


def test_a_changed_file_is_noticed(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(llama, path, "q8_0")
    config = model_config(llama)
    check.check_weights(path, llama, FAMILIES["llama"].gguf, config)
    reader = gguf.GGUFReader(path, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.attn_q.weight")
    tensor.data[:] = tensor.data[::-1].copy()
    reader.data.flush()
    with pytest.raises(VerificationError, match="q_proj"):
        check.check_weights(path, llama, FAMILIES["llama"].gguf, config)
    with pytest.raises(VerificationError, match="read back, differs"):
        check.check_logits(path, llama, load_tokenizer(llama), "q8_0")


def test_the_header_says_what_llama_cpp_needs(bases: dict[str, Path], tmp_path: Path) -> None:
    write(bases["gemma2"], tmp_path / "model.gguf", "q8_0")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["general.architecture"] == "gemma2" and fields["general.name"] == "a name"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert fields["gemma2.attn_logit_softcapping"] == 50 and fields["gemma2.attention.sliding_window"] == 32
    assert fields["tokenizer.chat_template"] == tiny_tokenizer().chat_template
    assert fields["tokenizer.ggml.tokens"][2] == tiny_tokenizer().convert_ids_to_tokens(2)
    assert fields["tokenizer.ggml.eos_token_id"] == tiny_tokenizer().eos_token_id
    write(bases["mistral-window"], tmp_path / "model.gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["llama.context_length"].contents() == 256, "beyond its window the model would be another"


REFUSED = {
    "family": (lambda: hf.GPTNeoXConfig(**{**SHAPE, "num_key_value_heads": None}), "gpt_neox"),
    "rope": (
        lambda: hf.Qwen2Config(**SHAPE, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        "rotary scaling of type yarn",
    ),
    "window": (lambda: hf.Qwen2Config(**SHAPE, use_sliding_window=True, max_window_layers=1), "sliding windows"),
    "activation": (lambda: hf.LlamaConfig(**SHAPE, hidden_act="gelu"), "the activation gelu"),
    "biases": (lambda: hf.LlamaConfig(**SHAPE, attention_bias=True), "attention biases"),
    "query scale": (
        lambda: hf.Gemma2Config(**SHAPE, **{**GEMMA, "query_pre_attn_scalar": 9}),
        "a query scale of its own",
    ),
    "layer order": (
        lambda: hf.Gemma3TextConfig(**SHAPE, **GEMMA, layer_types=["full_attention"] * 2),
        "an unusual order of windowed layers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused_with_a_command(name: str, tmp_path: Path) -> None:
    config, reason = REFUSED[name]
    base = save_base(tmp_path / "it's a base", config())
    with pytest.raises(ConfigError, match=reason) as refused:
        write(base, tmp_path / "model.gguf")
    assert f"python convert_hf_to_gguf.py '{tmp_path}/it'\"'\"'s a base'" in str(refused.value)
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))


def test_an_adapter_of_another_family_is_refused_with_a_command(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", hf.GPTNeoXConfig(**{**SHAPE, "num_key_value_heads": None}))
    adapter = save_adapter(tmp_path / "adapter", base)
    with pytest.raises(ConfigError, match=r"gpt_neox.*\n  python convert_lora_to_gguf\.py --base"):
        write_gguf_adapter(adapter, base, tmp_path / "lora.gguf", quant="f32", name="n")
    assert not (tmp_path / "lora.gguf").exists()


def test_float16_that_loses_the_adapter_is_refused(llama: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", llama, lora_alpha=1e-6)
    with pytest.raises(VerificationError, match="--quant f32"):
        write_gguf_adapter(adapter, llama, tmp_path / "lora.gguf", quant="f16", name="n")
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".*"))
    write_gguf_adapter(adapter, llama, tmp_path / "lora.gguf", quant="f32", name="n")


def with_rule(rule: dict[str, Any], **model: Any) -> Any:
    """The tiny tokenizer with another way to split text."""
    tokenizer = tiny_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["pre_tokenizer"] = rule
    content["model"] |= model
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|im_end|>", pad_token="<|end|>"
    )


def named(tokenizer: Any, base_gguf: Path | None = None, rows: int = 400) -> vocabulary.Vocabulary:
    return vocabulary.vocabulary(tokenizer, rows=rows, base_gguf=base_gguf, otherwise="COMMAND")


@pytest.mark.parametrize("pre", vocabulary.SPLITS)
def test_a_tokenizer_is_known_by_its_rule(pre: str) -> None:
    whole = pre in vocabulary.TAKES_WORDS_WHOLE
    assert named(with_rule(vocabulary.SPLITS[pre], ignore_merges=whole)).fields["pre"][0] == pre
    with pytest.raises(ConfigError, match="COMMAND"):
        named(with_rule(vocabulary.SPLITS[pre], ignore_merges=not whole))


@pytest.mark.parametrize("kind", ["legacy", "first", "gemma"])
def test_a_vocabulary_of_pieces_is_known_by_its_merges(kind: str) -> None:
    tokenizer = pieces_tokenizer(kind)
    fields = named(tokenizer, rows=len(tokenizer) + 2).fields
    assert fields["model"][0] == "llama" and fields["add_space_prefix"][0] is (kind == "legacy")
    kinds = dict(zip(fields["tokens"][0], fields["token_type"][0], strict=True))
    assert kinds["<0x0A>"] == gguf.TokenType.BYTE and kinds["<unk>"] == gguf.TokenType.UNKNOWN
    assert kinds["<|im_end|>"] == gguf.TokenType.CONTROL
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Without one of the merges, llama.cpp would still join.
    content["model"]["merges"] = content["model"]["merges"][:-1]
    fewer = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), unk_token="<unk>")
    with pytest.raises(ConfigError, match="has no merge for"):
        named(fewer, rows=len(tokenizer))
    # With another order of merges, it would join others first.
    content["model"]["merges"] = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    content["normalizer"] = {"type": "Lowercase"}
    other = hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), unk_token="<unk>")
    with pytest.raises(VerificationError, match="other tokens"):
        named(other, rows=len(tokenizer))


def test_a_rule_that_is_almost_known_is_refused() -> None:
    rule = json.loads(json.dumps(vocabulary.SPLITS["qwen2"]).replace("N}", "N}{1,2}", 1))
    with pytest.raises(ConfigError, match="is unknown to qdpo"):
        named(with_rule(rule))


def test_rows_without_a_token_are_unused_and_a_token_without_row_is_an_error() -> None:
    size = len(tiny_tokenizer())
    kept = named(tiny_tokenizer(), rows=size + 3).fields
    assert kept["tokens"][0][-1] == f"[PAD{size + 2}]" and kept["token_type"][0][-1] == gguf.TokenType.UNUSED
    with pytest.raises(ConfigError, match="rows"):
        named(tiny_tokenizer(), rows=size - 1)


def test_fields_of_the_base_are_copied_when_they_are_the_trained_tokenizer(llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "base.gguf"
    write(llama, path)
    tokenizer = load_tokenizer(llama)
    copied = named(tokenizer, path)
    assert copied.fields == named(tokenizer).fields and copied.origin == "tokenizer fields of base.gguf"
    # The same tokens, split by another rule in training: that rule is named instead.
    digits = named(with_rule(vocabulary.SPLITS["smollm"]), path)
    assert digits.fields["pre"][0] == "gpt-2", "no digits are merged in this vocabulary: both rules give the same ids"
    with pytest.raises(VerificationError, match="eos token"):
        other = with_rule(vocabulary.BYTES)
        other.eos_token = "<|end|>"
        named(other, path)
    with pytest.raises(VerificationError, match="400 tokens"):
        named(tokenizer, path, rows=401)
