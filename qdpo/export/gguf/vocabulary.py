"""The tokenizer fields of a GGUF file, from which llama.cpp produces the same token ids.

llama.cpp splits text by its own rules, which a file only names (`tokenizer.ggml.pre`). The name is set if the tokenizer
splits by that exact rule, or copied from the GGUF file that the base came from; in both cases the rule must give the
trained tokenizer's ids on texts that distinguish the rules. llama.cpp does not compose accents (NFC, as Qwen's
tokenizer does), so its input must already be composed, as keyboards produce it.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

from qdpo.errors import ConfigError, VerificationError
from qdpo.export.gguf import sentencepiece
from qdpo.model.base.tokenizer_files import Template
from qdpo.train.start.tokenizer import NO_ENDS, Ends

WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
# tokenizer.ggml.pre → the tokenizer.json splitting that llama.cpp applies under that name.
SPLITS: dict[str, dict[str, Any]] = {
    "gpt-2": BYTES,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]},
    "llama-bpe": _split(rf"{ENDINGS}|{WORD}|\p{{N}}{{1,3}}|{REST}"),
    "qwen2": _split(rf"{ENDINGS}|{WORD}|\p{{N}}|{REST}"),
}
# Under these names a word that is itself a token is taken whole, regardless of the merges.
TAKES_WORDS_WHOLE = {"llama-bpe"}
# Letters, digits in runs, endings, punctuation before newlines, spaces in runs, scripts without spaces, emoji.
PROBES = (
    "Hello world! It's 2026, isn't it? We'Ll see: 3 33 333 3333 33333 3.14159 1,000,000",
    "  two  spaces   three\n\nnew lines\n \n\t\ttabs \r\n end   ",
    "def f(x):\n    return x**2 - 7*x + 10  # 123abc 4d5\n",
    "naïve café — Straße, 東京タワー 한국어 русский язык العربية ១២៣ ४५६",
    "…!!! ???... ---===+++ /path/to/file.txt?x=1&y=22 a_b_c CamelCaseWords 🚀🦙 x²",
)


@dataclass
class Vocabulary:
    """Fields `tokenizer.ggml.*` by name without that prefix, each with its GGUF type, and the chat template."""

    fields: dict[str, tuple[Any, gguf.GGUFValueType, gguf.GGUFValueType | None]] = field(default_factory=dict)
    chat_template: Template | None = None
    origin: str = ""

    def add_to(self, writer: gguf.GGUFWriter) -> None:
        for name, (value, kind, element) in self.fields.items():
            writer.add_key_value(f"tokenizer.ggml.{name}", value, kind, element)
        if self.chat_template is not None:
            several, named = self.chat_template, []
            if isinstance(several, dict):
                named = [{"name": name, "template": source} for name, source in several.items()]
            writer.add_chat_template(named or several)


def vocabulary(
    tokenizer: Any, *, rows: int, base_gguf: Path | None, otherwise: str, ends: Ends = NO_ENDS
) -> Vocabulary:
    """The fields for a transformers tokenizer and an embedding of `rows` rows.

    Raises: ConfigError for a tokenizer with an unknown rule, with the remedy; VerificationError if the base's own
    fields would give other ids.
    """
    if not tokenizer.is_fast:
        raise ConfigError(
            "This model's tokenizer has no tokenizer.json, so its splitting rule is unknown. Try llama.cpp's "
            f"converter:\n  {otherwise}"
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    words = (
        _from_gguf(base_gguf, tokenizer, backend, rows, otherwise, ends)
        if base_gguf
        else _built(tokenizer, backend, rows, otherwise)
    )
    _add_ends(words, tokenizer.eos_token_id, ends)
    words.chat_template = tokenizer.chat_template or None
    return words


def _add_ends(words: Vocabulary, eos: int | None, ends: Ends) -> None:
    """The tokens at which llama.cpp stops, next to eos: the end of a turn (eot), then that of a message (eom)."""
    turn = next((token for token in ends.trained if token != eos), None)
    others = [token for token in (*ends.trained, *ends.every) if token not in (eos, turn)]
    for name, token in (("eos", eos), ("eot", turn), ("eom", next(iter(others), None))):
        # Its own eot or eom stays in the fields of the base's file, unless another token was trained.
        if token is not None and (name != "eom" or "eom_token_id" not in words.fields):
            words.fields[f"{name}_token_id"] = (int(token), gguf.GGUFValueType.UINT32, None)


def _from_gguf(
    path: Path, tokenizer: Any, backend: dict[str, Any], rows: int, otherwise: str, ends: Ends
) -> Vocabulary:
    reader = gguf.GGUFReader(path)
    found = Vocabulary(origin=f"tokenizer fields of {path.name}")
    for key, value in reader.fields.items():
        if key.startswith("tokenizer.ggml."):
            element = value.types[1] if value.types[0] == gguf.GGUFValueType.ARRAY else None
            found.fields[key.removeprefix("tokenizer.ggml.")] = (value.contents(), value.types[0], element)
    tokens = found.fields["tokens"][0]
    if len(tokens) != rows:
        raise VerificationError(
            f"{path.name} has {len(tokens)} tokens, but the model's embedding has {rows} rows. Its tokenizer cannot be "
            "copied."
        )
    known = tokenizer.get_vocab()
    moved = [token for index, token in enumerate(tokens) if known.get(token, index) != index]
    if moved:
        raise VerificationError(
            f"{path.name} and the model's tokenizer give different ids to {len(moved)} tokens, such as {moved[0]!r}. "
            "Use the model's safetensors folder as base instead of the .gguf."
        )
    pre = found.fields.get("pre", ("", None, None))[0]
    if found.fields["model"][0] == "gpt2" and pre in SPLITS and _differing(backend, pre) is not None:
        # transformers 5.23 omits the splitting of digits when it builds a tokenizer from a SmolLM file.
        rule = _rule(backend, otherwise)
        _require_same_ids(backend, rule)
        found.fields["pre"] = (rule, gguf.GGUFValueType.STRING, None)
        found.origin += f", but the rule {rule} instead of {pre}, which splits some texts differently from training"
    special = {"bos": "bos_token_id", "eos": "eos_token_id"}
    for ours, theirs in special.items():
        wanted, stored = getattr(tokenizer, f"{ours}_token_id"), found.fields.get(theirs, (None,))[0]
        if wanted != stored and not (ours == "eos" and stored in ends.every):
            raise VerificationError(
                f"The {ours} token is {wanted} in the model's tokenizer but {stored} in {path.name}. Use the model's "
                "safetensors folder as base instead of the .gguf."
            )
    return found


def _built(tokenizer: Any, backend: dict[str, Any], rows: int, otherwise: str) -> Vocabulary:
    texts, types = _tokens(tokenizer, backend, rows)
    kinds = gguf.GGUFValueType
    fields = {"tokens": (texts, kinds.ARRAY, kinds.STRING), "token_type": (types, kinds.ARRAY, kinds.INT32)}
    if sentencepiece.is_pieces(backend):
        scores = sentencepiece.piece_scores(backend, texts, otherwise)
        sentencepiece.require_same_pieces(tokenizer, backend, scores, PROBES)
        first = sentencepiece.space_first(backend, otherwise)
        found = Vocabulary(fields, origin="SentencePiece's tokenizer rule")
        found.fields["model"], found.fields["pre"] = ("llama", kinds.STRING, None), ("default", kinds.STRING, None)
        found.fields["scores"] = (scores, kinds.ARRAY, kinds.FLOAT32)
        found.fields["add_space_prefix"] = (first, kinds.BOOL, None)
    else:
        pre = _rule(backend, otherwise)
        _require_same_ids(backend, pre)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]]
        found = Vocabulary(fields, origin=f"tokenizer rule {pre}")
        found.fields["model"], found.fields["pre"] = ("gpt2", kinds.STRING, None), (pre, kinds.STRING, None)
        found.fields["merges"] = (merges, kinds.ARRAY, kinds.STRING)
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = getattr(tokenizer, f"{ours}_token_id")
        if token_id is not None:
            found.fields[f"{theirs}_token_id"] = (int(token_id), kinds.UINT32, None)
    ids = tokenizer("a").input_ids
    found.fields["add_bos_token"] = (bool(ids and ids[0] == tokenizer.bos_token_id), kinds.BOOL, None)
    found.fields["add_eos_token"] = (bool(ids and ids[-1] == tokenizer.eos_token_id), kinds.BOOL, None)
    return found


def _rule(backend: dict[str, Any], otherwise: str) -> str:
    """The name of the rule by which a tokenizer.json splits text."""
    splitting, model = _plain(backend["pre_tokenizer"]), backend["model"]
    normalizer = (backend["normalizer"] or {}).get("type")
    if model["type"] == "BPE" and not model.get("byte_fallback") and normalizer in (None, "NFC"):
        whole = bool(model.get("ignore_merges"))
        for name, known in SPLITS.items():
            if splitting == _plain(known) and (whole == (name in TAKES_WORDS_WHOLE)):
                return name
    raise ConfigError(
        f"llama.cpp's name for this model's tokenizer (a {model['type']} model that splits by "
        f"{json.dumps(splitting)[:150]}) is unknown to qdpo. Try llama.cpp's converter:\n  {otherwise}"
    )


def _plain(splitting: Any) -> Any:
    """A pre-tokenizer without the setting that does not affect ids."""
    if isinstance(splitting, dict):
        return {key: _plain(value) for key, value in splitting.items() if key != "trim_offsets"}
    return [_plain(value) for value in splitting] if isinstance(splitting, list) else splitting


def _require_same_ids(backend: dict[str, Any], pre: str) -> None:
    text = _differing(backend, pre)
    if text is not None:
        raise VerificationError(
            f"llama.cpp's rule {pre!r} gives other tokens than the model was trained with, for example on {text!r}. A "
            "GGUF file with this rule would not be the model that was trained."
        )


def _differing(backend: dict[str, Any], pre: str) -> str | None:
    """The first text of PROBES on which the rule's ids differ from the tokenizer's."""
    from tokenizers import Tokenizer

    trained = Tokenizer.from_str(json.dumps(backend))
    model = {**backend["model"], "ignore_merges": pre in TAKES_WORDS_WHOLE}
    named = Tokenizer.from_str(
        json.dumps({**backend, "pre_tokenizer": SPLITS[pre], "normalizer": None, "model": model})
    )
    for text in PROBES:
        if trained.encode(text, add_special_tokens=False).ids != named.encode(text, add_special_tokens=False).ids:
            return text
    return None


def _tokens(tokenizer: Any, backend: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Each row's token as text and its type; rows without a token are marked unused."""
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if max(by_id) >= rows:
        raise ConfigError(
            f"The tokenizer has the token id {max(by_id)}, but the model's embedding has only {rows} rows. Resize the "
            "embedding, or use the model's own tokenizer."
        )
    added = {token["id"]: token for token in backend["added_tokens"]}
    unknown = tokenizer.unk_token_id if sentencepiece.is_pieces(backend) else None
    texts, types = [], []
    for token_id in range(rows):
        token = by_id.get(token_id)
        texts.append(f"[PAD{token_id}]" if token is None else token)
        unused = int(gguf.TokenType.UNUSED)
        types.append(unused if token is None else sentencepiece.piece_type(token_id, token, unknown, added))
    return texts, types
