"""A small tokenizer of the class that transformers reads for a family, trained on the pairs that ship with qdpo."""

import json
from functools import cache
from typing import Any

import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

from qdpo.settings.layered import shipped_folder

WORDS = 1100
SPACE = "▁"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURNS = ["<|im_start|>", "<|im_end|>"]


def tokenizer_of(model_type: str) -> Any:
    """The family's tokenizer class over a small vocabulary, with a ChatML template."""
    name = TOKENIZER_MAPPING_NAMES.get(model_type) or TOKENIZER_MAPPING_NAMES.get(model_type.removesuffix("_text"))
    kind = tokenizer_class_from_name(name) if name else None
    if model_type.startswith(("gemma", "vaultgemma")):
        made = _pieces()
    elif kind is None or kind is hf.PreTrainedTokenizerFast:
        made = hf.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(_bytes()), bos_token="<|begin|>", eos_token="<|im_end|>",
            pad_token="<|end|>", extra_special_tokens=TURNS[:1],
        )  # fmt: skip
    else:
        model = json.loads(_bytes())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        ends = {"eos_token": "<|im_end|>", "pad_token": "<|end|>", "unk_token": "<|end|>"}
        made = kind(vocab=model["vocab"], merges=merges, **ends, extra_special_tokens=TURNS)
    made.chat_template = CHATML
    return made


def ids_of(tokenizer: Any) -> dict[str, int]:
    """The ids of its special tokens, as a model's config names them."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return {name: value for name, value in ids.items() if value is not None}


@cache
def _bytes() -> str:
    """Byte-level BPE, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|begin|>", *TURNS]
    tokenizer.train_from_iterator(
        _texts(),
        trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer.to_str()


def _pieces() -> Any:
    """SentencePiece's form, as Gemma has it: a sign for the space, bytes for unknown letters, every join a merge."""
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    learned.train_from_iterator(
        _texts(), trainers.BpeTrainer(vocab_size=WORDS - 300, special_tokens=["<unk>"], show_progress=False)
    )
    found = learned.get_vocab()
    ranked = [word for word in sorted(found, key=lambda word: found[word]) if word != "<unk>"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *TURNS]
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *ranked]
    vocab = {word: number for number, word in enumerate(words)}
    merges = [
        (word[:cut], word[cut:])
        for word in ranked
        for cut in range(1, len(word))
        if word[:cut] in found and word[cut:] in found
    ]
    return hf.GemmaTokenizer(vocab=vocab, merges=merges, extra_special_tokens=TURNS)


def _texts() -> list[str]:
    lines = (shipped_folder() / "demo-train.jsonl").read_text(encoding="utf-8").splitlines()
    return [text for row in map(json.loads, lines) for text in _strings(row)]


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for one in inside for text in _strings(one)]
