"""The tokenizer fields of a SentencePiece vocabulary (Llama 2, Mistral, Gemma, Phi-3), from its merges.

llama.cpp joins the two neighbours whose join scores highest; transformers' tokenizers join by the rank of a merge.
The score of a piece is therefore the negative rank of its first merge. Both agree when every way to join a piece is a
merge; that is checked, and a plain copy of llama.cpp's rule must give the trained ids on test texts.
"""

from collections.abc import Sequence
from typing import Any

import gguf

from qdpo.errors import ConfigError, VerificationError

SPACE = "\u2581"
BYTE_PIECES = {f"<0x{byte:02X}>" for byte in range(256)}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
LEGACY = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, REPLACE]}
UNSEEN = -1e6  # the score of a piece that no merge makes: a single character, or one that is never joined


def is_pieces(backend: dict[str, Any]) -> bool:
    """Whether a tokenizer.json holds such a vocabulary."""
    model = backend["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback")) and set(model["vocab"]) >= BYTE_PIECES


def space_first(backend: dict[str, Any], otherwise: str) -> bool:
    """Whether text after a special token gets a space before it. Raises: ConfigError for an unknown way of spaces.

    With Metaspace's scheme "first", only the very beginning of a text does; a chat begins with a special token.
    """
    normalizer, splitting = backend["normalizer"], backend["pre_tokenizer"]
    if normalizer == LEGACY and splitting is None:
        return True
    if normalizer == REPLACE and (splitting is None or splitting.get("pattern") == {"String": " "}):
        return False
    if normalizer is None and (splitting or {}).get("type") == "Metaspace" and not splitting["split"]:
        return bool(splitting["prepend_scheme"] == "always")
    raise ConfigError(
        "The tokenizer of this model treats spaces in a way that qdpo cannot name to llama.cpp. llama.cpp's own "
        f"converter may:\n  {otherwise}"
    )


def piece_scores(backend: dict[str, Any], texts: Sequence[str], otherwise: str) -> list[float]:
    """The score of each row's piece. Raises: ConfigError if a piece can be joined in a way that is no merge."""
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
                    f"The tokenizer's merges do not join {pair[0]!r} and {pair[1]!r}, which llama.cpp would. "
                    f"llama.cpp's own converter may:\n  {otherwise}"
                )
    return [scores.get(text, UNSEEN) for text in texts]


def require_same_pieces(
    tokenizer: Any, backend: dict[str, Any], scores: Sequence[float], probes: Sequence[str]
) -> None:
    """Raises: VerificationError if llama.cpp's way of joining gives other ids than the tokenizer on one of `probes`."""
    vocab = backend["model"]["vocab"]
    score = {piece: scores[index] for piece, index in vocab.items() if index < len(scores)}
    for probe in probes:
        expected = tokenizer(probe, add_special_tokens=False).input_ids
        # A text starts as transformers starts it here; what llama.cpp puts before it is its flag's matter.
        leads = backend["normalizer"] == LEGACY or (backend["pre_tokenizer"] or {}).get("prepend_scheme") in (
            "first",
            "always",
        )
        text = (SPACE if leads and not _metaspace_has_space(backend, probe) else "") + probe.replace(" ", SPACE)
        if _joined(text, score, vocab) != expected:
            raise VerificationError(
                f"llama.cpp's way of joining pieces gives other tokens than the model was trained with, for example on "
                f"{probe!r}. A GGUF file would not be the model that was trained."
            )


def _metaspace_has_space(backend: dict[str, Any], text: str) -> bool:
    """Whether Metaspace leaves the beginning as it is, because a space stands there already."""
    return backend["normalizer"] is None and text.startswith(" ")


def _joined(text: str, score: dict[str, float], vocab: dict[str, int]) -> list[int]:
    """Ids of a text: the best-scored pair of neighbours is joined, the leftmost of equals, until none is left."""
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
