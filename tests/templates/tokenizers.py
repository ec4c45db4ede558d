"""A small tokenizer for any chat template: every text in the template that looks like a special token is one."""

import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

KEPT = Path(__file__).parent
"""The templates kept here; README.md says where each is from."""
SPECIAL = re.compile(
    r"<\|[^\s<>|'\"{}]+\|>|<\|[^\s<>|'\"{}]+>|<[^\s<>|'\"{}]+\|>|<｜[^\s<>'\"{}]+｜>|</?s>|<(?:bos|eos|pad|unk)>"
    r"|<(?:start|end)_of_turn>|\[/?[A-Z][A-Z_]+\]|\]~!?b\[|\]~b\]|\[e~\[|<\[[a-z_]+\]>|<seed:(?:bos|eos)>"
)
WORDS = re.compile(r"</?(?:seed:)?(?:think|thinking|tool_calls?|tool_response|arg_key|arg_value)>")
"""Added tokens that are not special, as reasoning models have them."""
ENDS = (
    "<|im_end|>", "<|eot_id|>", "<|return|>", "<|end_of_msg|>", "<|role_end|>", "<|eot|>", "<|message_sep|>",
    "<turn|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "<seed:eos>",
    "[e~[", "<|endoftext|>", "</s>", "<|end|>", "<|user|>",
)  # fmt: skip
STARTS = ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<|startoftext|>", "<seed:bos>", "[gMASK]")
TEXT = [
    "the quick brown fox asks a question about Paris, 2 + 2 and the weather\n\n",
    '{"city": "Paris"}\n  it is four.',
]


def tokenizer_of(source: str, *, name: str = "template", eos: str | None = None) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the special tokens of the template `source`."""
    special = set(SPECIAL.findall(source))
    eos = eos or next((token for token in ENDS if token in special), "<|endoftext|>")
    bos = next((token for token in STARTS if token in special), None)
    if bos is None and "bos_token" in source:
        bos = "<s>"
        special.add(bos)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in sorted(special | {eos})])
    words = sorted(set(WORDS.findall(source)) - special)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in words])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, name_or_path=name)
    fast.chat_template = source
    return fast


def tokenizer_of_file(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer for the template in a file."""
    return tokenizer_of(path.read_text(encoding="utf-8"), name=path.stem)
