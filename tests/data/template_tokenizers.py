"""A small tokenizer for each family of chat templates: its special tokens, its BOS, its way with spaces.

The vocabularies are trained here on a few lines, so that nothing is downloaded; what surrounds them (normalizer,
pre-tokenizer, decoder, post-processor, flags of the special tokens) is that of the family's published tokenizer.json.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).with_name("templates")
TEXT = [  # without the text of any special token: no merge may lead to one
    "What is the capital of France? The capital of France is Paris, and the sea is not far from it.",
    "Please write a short poem about the sea, and keep it simple.\n\nSure, here it is:\n\n\n2+2=4\n  and\n    more \n",
    "the a an of and to in is it you that he was for on are with as I his they be at one have this 10 100 2024",
    "user\nassistant\nsystem\nmodel\n\nquestion answer text\nyes!\n\n no?\n",
]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THOUGHTS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
INST = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
PHI3 = ("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>")


@dataclass(frozen=True)
class Family:
    """How the template of one family writes an answer, and what its tokenizer does besides."""

    special: tuple[str, ...]
    eos: str
    end: str
    """Ends an answer: the token at which generation stops, with the space before it where the template writes one."""
    bos: str | None = None
    adds_bos: bool = False
    """Its post-processor puts BOS before any text."""
    plain_added: tuple[str, ...] = ()
    """Added tokens that are not special: in any text they are one id."""
    trims: bool = False
    before: str = ""
    """Stands between the prompt and the answer: written by the template, or put there by the tokenizer."""
    bos_for_each_exchange: bool = False
    refuses_system: bool = False
    alternates: bool = False


FAMILIES = {
    "chatml": Family(QWEN, "<|im_end|>", "<|im_end|>"),
    "llama2": Family(
        ("<unk>", "<s>", "</s>"),
        eos="</s>",
        end=" </s>",
        bos="<s>",
        adds_bos=True,
        trims=True,
        before=" ",
        bos_for_each_exchange=True,
        alternates=True,
    ),
    "llama3": Family(LLAMA3, "<|eot_id|>", "<|eot_id|>", LLAMA3[0], adds_bos=True, trims=True),
    "llama3_first": Family(LLAMA3, "<|end_of_text|>", "<|eot_id|>", LLAMA3[0], adds_bos=True, trims=True),
    "llama31": Family(LLAMA3, "<|eot_id|>", "<|eot_id|>", LLAMA3[0], adds_bos=True, trims=True),
    "mistral": Family(
        ("<unk>", "<s>", "</s>", *INST), "</s>", "</s>", "<s>", adds_bos=True, trims=True, before=" ", alternates=True
    ),
    "gemma": Family(
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        end="<end_of_turn>",
        bos="<bos>",
        adds_bos=True,
        trims=True,
        refuses_system=True,
        alternates=True,
    ),
    "qwen25": Family(QWEN, "<|im_end|>", "<|im_end|>", plain_added=THOUGHTS[:2]),
    "qwen3": Family(QWEN, "<|im_end|>", "<|im_end|>", plain_added=THOUGHTS),
    "phi3": Family(
        ("<unk>", "<s>", *PHI3), eos="<|endoftext|>", end="<|end|>", bos="<s>", plain_added=("</s>",), before=" "
    ),
}


@cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family, with its chat template; built once a session. Do not change it: copy it."""
    family = FAMILIES[name]
    backend = _sentencepiece(name, family) if family.special[0] in ("<unk>", "<pad>") else _byte_level(name)
    strips = name == "phi3"  # its special tokens swallow the white space behind them
    for texts, special in ((family.special, True), (family.plain_added, False)):
        tokens = [
            AddedToken(text, normalized=False, special=special, rstrip=strips and text not in ("<unk>", "<s>"))
            for text in texts
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(tokens)
    if family.adds_bos and family.bos:
        bos_id = backend.token_to_id(family.bos)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, bos_id)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=family.bos, eos_token=family.eos, name_or_path=name
    )
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    return tokenizer


def _byte_level(name: str) -> Tokenizer:
    """ChatML, Llama 3 and Qwen: bytes, cut into words first. Llama 3 joins three digits, Qwen normalises to NFC."""
    tokenizer = Tokenizer(models.BPE())
    if name.startswith("qwen"):
        tokenizer.normalizer = normalizers.NFC()
    words = WORDS.replace("DIGITS", r"\p{N}{1,3}" if name.startswith("llama3") else r"\p{N}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def _sentencepiece(name: str, family: Family) -> Tokenizer:
    """Llama 2, Mistral, Gemma and Phi-3: ▁ for a space, bytes for unknown letters, and no cutting into words.

    Llama 2 and Phi-3 put a space before every stretch of text between special tokens (the legacy way), Mistral only
    before the very first one, Gemma nowhere.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trained.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    )
    model = json.loads(trained.to_str())["model"]
    pieces = [*family.special, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"], "▁▁", "▁▁▁▁"]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [*map(tuple, model["merges"]), ("▁", "▁"), ("▁▁", "▁▁")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if name == "mistral":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif name == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if name != "gemma":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer
