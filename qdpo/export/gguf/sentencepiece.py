"""The tokenizer fields of a SentencePiece vocabulary (Llama 2, Mistral, Gemma, Phi-3), from its merges.

llama.cpp merges the two neighbours with the highest score; transformers' tokenizers merge by rank. The score of a piece
is therefore the negative rank of its first merge. Both agree if every way to form a piece is a merge. That is checked,
and a plain copy of llama.cpp's rule must give the trained ids on test texts.
"""

from collections.abc import Sequence
from typing import Any

import gguf

from qdpo.errors import ConfigError, VerificationError

SPACE = "\u2581"
BYTE_PIECES = {f"<0x{byte:02X}>" for byte in range(256)}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
LEGACY = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACE]}
UNSEEN = -1e6  # the score of a piece that no merge forms: a single character, or a piece that is never merged


def is_pieces(backend: dict[str, Any]) -> bool:
    """True if a tokenizer.json holds a SentencePiece vocabulary."""
    model = backend["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback")) and set(model["vocab"]) >= BYTE_PIECES


def space_first(backend: dict[str, Any], otherwise: str) -> bool:
    """True if text after a special token gets a space before it. Raises: ConfigError for an unknown handling of spaces.

    With Metaspace's scheme "first", only the beginning of a text gets a space; a chat begins with a special token.
    """
    normalizer, splitting = backend["normalizer"], backend["pre_tokenizer"]
    if normalizer == LEGACY and splitting is None:
        return True
    if normalizer == REPLACE and (splitting is None or splitting.get("pattern") == {"String": " "}):
        return False
    if normalizer is None and (splitting or {}).get("type") == "Metaspace" and not splitting["split"]:
        return bool(splitting["prepend_scheme"] == "always")
    raise ConfigError(
        "This model's tokenizer treats spaces in a way that qdpo cannot express for llama.cpp. Try llama.cpp's "
        f"converter:\n  {otherwise}"
    )


def piece_scores(backend: dict[str, Any], texts: Sequence[str], otherwise: str) -> list[float]:
    """The score of each row's piece. Raises: ConfigError if a piece can be formed in a way that is not a merge."""
    model = backend["model"]
    vocab = model["vocab"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    known = set(pairs)
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(pairs):
        scores.setdefault(left + right, -float(rank))
    added = {token["content"] for token in backend["added_tokens"]} | BYTE_PIECES
    for piece in vocab.keys() - added:
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            if pair not in known and pair[0] in vocab and pair[1] in vocab and added.isdisjoint(pair):
                raise ConfigError(
                    f"The tokenizer has no merge for {pair[0]!r} and {pair[1]!r}, but llama.cpp would merge them. "
                    f"Try llama.cpp's converter:\n  {otherwise}"
                )
    return [scores.get(text, UNSEEN) for text in texts]


def require_same_pieces(
    tokenizer: Any, backend: dict[str, Any], scores: Sequence[float], probes: Sequence[str]
) -> None:
    """Raises: VerificationError if llama.cpp's merging and the tokenizer give different ids to a text of `probes`."""
    vocab = backend["model"]["vocab"]
    score = {piece: scores[index] for piece, index in vocab.items() if index < len(scores)}
    for probe in probes:
        expected = tokenizer(probe, add_special_tokens=False).input_ids
        # The text starts as in transformers; a prefix from llama.cpp is controlled by its own flag.
        leads = backend["normalizer"] == LEGACY or (backend["pre_tokenizer"] or {}).get("prepend_scheme") in (
            "first",
            "always",
        )
        text = (SPACE if leads and not _metaspace_has_space(backend, probe) else "") + probe.replace(" ", SPACE)
        if _joined(text, score, vocab) != expected:
            raise VerificationError(
                f"llama.cpp's merging of pieces gives other tokens than the model was trained with, for example on "
                f"{probe!r}. A GGUF file would not be the model that was trained."
            )


def _metaspace_has_space(backend: dict[str, Any], text: str) -> bool:
    """True if Metaspace leaves the beginning unchanged, because the text already starts with a space."""
    return backend["normalizer"] is None and text.startswith(" ")


def _joined(text: str, score: dict[str, float], vocab: dict[str, int]) -> list[int]:
    """Ids of a text: repeatedly merges the neighbours with the highest score (leftmost on a tie) until none merge."""
    pieces = list(text)
    while True:
        joins = [
            (score[a + b], -index)
            for index, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False))
            if a + b in score
        ]
        if not joins:
            break
        index = -max(joins)[1]
        pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]
    ids: list[int] = []
    for piece in pieces:
        ids += [vocab[piece]] if piece in vocab else [vocab[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return ids


def piece_type(token_id: int, text: str, unknown: int | None, added: dict[int, dict[str, Any]]) -> int:
    """The type of a row's piece in GGUF."""
    if text in BYTE_PIECES:
        kind = gguf.TokenType.BYTE
    elif token_id == unknown:
        kind = gguf.TokenType.UNKNOWN
    elif token_id in added:
        kind = gguf.TokenType.CONTROL if added[token_id]["special"] else gguf.TokenType.USER_DEFINED
    else:
        kind = gguf.TokenType.NORMAL
    return int(kind)
