"""Tokenises texts, so that every prompt has the ids it will have at inference."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qdpo.data.tokens.hide import special_tokens
from qdpo.data.tokens.render import Rendered
from qdpo.data.tokens.templates import uses_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IdLists = tuple[list[int], list[int], list[int]]
"""Prompt, chosen response, rejected response."""


class Encoder:
    """Tokenises rendered pairs in batches. `merged` counts responses that would share a token with the prompt."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template: str):
        self._tokenizer = tokenizer
        self._bos = tokenizer.bos_token_id
        self._adds_bos = not uses_chat_template(tokenizer, template) and _adds_bos(tokenizer)
        self.merged = 0

    def encode(self, texts: Sequence[Rendered]) -> Iterator[IdLists | None]:
        """Ids of each prompt and of its two responses; the prompt's ids are those of the prompt alone.

        A response is tokenised after its prompt, and its ids are what follows the prompt's. Only if a token would span
        the border (then the whole does not begin with the prompt's ids) is the response tokenised separately. Always
        doing so would be simpler, but SentencePiece-like tokenizers put a space before any text, which would be learnt.
        None if a message contains the text of a special token that this tokenizer cannot read as ordinary text.
        """
        if not texts:
            return
        sides = [(text, side) for text in texts for side in (text.chosen, text.rejected)]
        prompts = self._ids([(text.prompt, text.hidden) for text in texts])
        wholes = self._ids([(text.prompt + side, text.hidden) for text, side in sides])
        spanning = [n for n, whole in enumerate(wholes) if not _begins(whole, prompts[n // 2])]
        self.merged += len(spanning)
        alone = dict(zip(spanning, self._alone([(sides[n][1], sides[n][0].hidden) for n in spanning]), strict=True))
        for n, prompt in enumerate(prompts):
            pair = [alone[m] if m in alone else (wholes[m] or [])[len(prompt or []) :] for m in (2 * n, 2 * n + 1)]
            if prompt is None or pair[0] is None or pair[1] is None or None in (wholes[2 * n], wholes[2 * n + 1]):
                yield None
            else:
                yield self._with_one_bos(prompt), pair[0], pair[1]

    def _ids(self, texts: Sequence[tuple[str, Mapping[str, str]]]) -> list[list[int] | None]:
        """Ids without tokens that are not in the text. One call for all, so that fast tokenizers use all cores."""
        if not texts:
            return []
        encoded = self._plain_ids([text for text, _hidden in texts])
        return [
            self._hidden_ids(text, hidden) if hidden else ids
            for ids, (text, hidden) in zip(encoded, texts, strict=True)
        ]

    def _alone(self, texts: Sequence[tuple[str, Mapping[str, str]]]) -> list[list[int] | None]:
        """Ids of texts as continuations, without the space that a tokenizer puts before the first word."""
        guard = self._plain_ids(["\n"])[0]
        after = self._ids([("\n" + text, hidden) for text, hidden in texts])
        alone = self._ids(texts)
        spaced = [n for n, ids in enumerate(after) if ids is not None and ids[: len(guard)] == guard]
        return [(after[n] or [])[len(guard) :] if n in spaced else ids for n, ids in enumerate(alone)]

    def _plain_ids(self, texts: list[str], **options: bool) -> list[list[int]]:
        encoded = self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options
        )
        ids: list[list[int]] = encoded["input_ids"]
        return ids

    def _hidden_ids(self, text: str, hidden: Mapping[str, str]) -> list[int] | None:
        """Ids in which the template's special tokens are tokens, and those spelt out in a message are ordinary text.

        The text is split at the template's tokens, as tokenizers do themselves. A trial on the same text, with a
        harmless letter instead of the hidden ones, checks that this tokenizer gives the same ids for parts and whole.
        """
        harmless = dict.fromkeys(hidden, "x")
        expected = self._plain_ids([_with(text, harmless)])[0]
        for spaced in (True, False):
            if self._in_parts(text, harmless, spaced) == expected:
                return self._in_parts(text, hidden, spaced)
        return None

    def _in_parts(self, text: str, hidden: Mapping[str, str], spaced: bool) -> list[int]:
        """Ids of the parts between special tokens; unless `spaced`, only the first may get a space before it."""
        parts = re.split(f"({special_tokens(self._tokenizer).pattern})", text)
        flags = {token.content: token for token in self._tokenizer.added_tokens_decoder.values()}
        ids: list[int] = []
        for n, part in enumerate(parts):
            if n % 2:
                ids.append(self._tokenizer.convert_tokens_to_ids(part))
                continue
            before, after = (flags.get(parts[m]) if 0 <= m < len(parts) else None for m in (n - 1, n + 1))
            part = part.lstrip() if before and before.rstrip else part
            part = part.rstrip() if after and after.lstrip else part
            if part:
                with _spaces(self._tokenizer, before=spaced or n == 0):
                    ids += self._plain_ids([_with(part, hidden)], split_special_tokens=True)[0]
        return ids

    def _with_one_bos(self, ids: list[int]) -> list[int]:
        """Ids with one BOS at the front if the text has one, or if the tokenizer adds one to plain text; else none."""
        bos, written = self._bos, 0
        while written < len(ids) and ids[written] == bos:
            written += 1
        return [bos] * (self._adds_bos or written > 0) + ids[written:] if bos is not None else ids


def _begins(whole: list[int] | None, prompt: list[int] | None) -> bool:
    return whole is None or prompt is None or whole[: len(prompt)] == prompt


def _with(text: str, replacements: Mapping[str, str]) -> str:
    return text.translate({ord(letter): spelt for letter, spelt in replacements.items()})


@contextmanager
def _spaces(tokenizer: "PreTrainedTokenizerBase", *, before: bool) -> Iterator[None]:
    """While active, a SentencePiece-like tokenizer puts a space before a text only if `before`."""
    words: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
    scheme = getattr(words, "prepend_scheme", None)
    if before or scheme is None:
        yield
        return
    words.prepend_scheme = "never"
    try:
        yield
    finally:
        words.prepend_scheme = scheme


def _adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """True if the tokenizer by default begins a text with BOS, as it did when the base model was trained."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
