"""Tokenizers built on the spot: byte-level with and without a ChatML template, and one that puts a space first."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Human: What is the capital of France? Assistant: The capital of France is Paris.",
    "Please write a short poem about the sea, and keep it simple. Yes No Sure, here it is: 2+2=4",
    "the a an of and to in is it you that he was for on are with as I his they be at one have this",
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_level(**named):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|im_start|>", "<|im_end|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path="tiny", **named)


@pytest.fixture(scope="session")
def chat_tokenizer():
    tokenizer = _byte_level(eos_token="<|im_end|>", pad_token="<|end|>", extra_special_tokens=["<|im_start|>"])
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def base_tokenizer():
    """No chat template; ends texts with <|end|>."""
    return _byte_level(eos_token="<|end|>")


@pytest.fixture(scope="session")
def bos_tokenizer():
    """No chat template; opens any text with <s>, as Llama's tokenizers do."""
    tokenizer = _byte_level(eos_token="<|end|>", bos_token="<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="session")
def spaced_tokenizer():
    """Puts a space before any text, as SentencePiece models do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], initial_alphabet=["\n"])
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", name_or_path="spaced"
    )
