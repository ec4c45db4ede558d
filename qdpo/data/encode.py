"""Texts to token ids, so that every prompt has the ids it will have at inference."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qdpo.data.render import Texts, uses_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IdLists = tuple[list[int], list[int], list[int]]
"""Prompt, chosen response, rejected response."""


def encode(texts: list[Texts], tokenizer: "PreTrainedTokenizerBase", template: str) -> Iterator[IdLists]:
    """Ids of each prompt and of the two responses behind it; the prompt's ids are those of the prompt alone.

    A response is tokenised behind its prompt, and its ids are what follows the prompt's. Only where a token would span
    the border (then the whole does not begin with the prompt's ids) is the response tokenised by itself. Always by
    itself would be simpler, but SentencePiece-like tokenizers put a space before any text, which would be learnt.
    """
    if not texts:
        return
    sides = [side for _, *both in texts for side in both]
    prompts = _ids([prompt for prompt, _, _ in texts], tokenizer)
    wholes = _ids([prompt + side for prompt, *both in texts for side in both], tokenizer)
    spanning = [n for n, whole in enumerate(wholes) if whole[: len(prompts[n // 2])] != prompts[n // 2]]
    alone = dict(zip(spanning, _ids([sides[n] for n in spanning], tokenizer), strict=True))
    responses = [alone[n] if n in alone else whole[len(prompts[n // 2]) :] for n, whole in enumerate(wholes)]
    bos = tokenizer.bos_token_id
    adds_bos = not uses_chat_template(tokenizer, template) and _adds_bos(tokenizer)
    for n, prompt in enumerate(prompts):
        yield _with_one_bos(prompt, bos, adds_bos), responses[2 * n], responses[2 * n + 1]


def _ids(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    """Ids without any token that the text does not spell out. One call: the fast tokenizers use all cores for it."""
    if not texts:
        return []
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True where the tokenizer, left to itself, opens a text with BOS, as it did when the base model was trained."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _with_one_bos(ids: list[int], bos: int | None, adds_bos: bool) -> list[int]:
    """At most one BOS at the front; one where there is one already, or where the tokenizer adds it to plain text."""
    written = 0
    while written < len(ids) and ids[written] == bos:
        written += 1
    return [bos] * (adds_bos or written > 0) + ids[written:] if bos is not None else ids
