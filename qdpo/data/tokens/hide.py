"""Replaces the text of special tokens in messages by single characters, so that it stays ordinary text."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PRIVATE = range(0xE000, 0xF900)
"""The private use area: characters that no template looks at."""


@dataclass(frozen=True)
class Hidden:
    """Messages and functions without special tokens' text; `spelt` maps each character to the text it replaces."""

    turns: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    tools: list[Any] | None
    spelt: Mapping[str, str]
    place: str
    """A character that occurs in none of them."""


def hide(
    tokenizer: "PreTrainedTokenizerBase",
    turns: list[dict[str, Any]],
    answers: list[dict[str, Any]],
    tools: list[Any] | None,
) -> Hidden:
    """Replace the text of every special token in all strings; characters that the texts use are left alone."""
    pattern = special_tokens(tokenizer)
    turns, answers = ([_without_escapes(turn, pattern) for turn in side] for side in (turns, answers))
    strings = list(_strings([turns, answers, tools]))
    found = {match[0] for text in strings for match in pattern.finditer(text)}
    free = (letter for letter in map(chr, PRIVATE) if not any(letter in text for text in strings))
    place = next(free)
    if not found:
        return Hidden(turns, answers, tools, {}, place)
    letter_of = dict(zip(sorted(found), free, strict=False))

    def swap(text: str) -> str:
        return pattern.sub(lambda match: letter_of[match[0]], text)

    spelt = {letter: text for text, letter in letter_of.items()}
    return Hidden(_mapped(turns, swap), _mapped(answers, swap), _mapped(tools, swap), spelt, place)


@lru_cache(maxsize=4)
def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> re.Pattern[str]:
    """Finds the text of any special token of the tokenizer."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _without_escapes(turn: dict[str, Any], pattern: re.Pattern[str]) -> dict[str, Any]:
    r"""The turn with arguments as an object where their text hides a special token in escapes, as in \u003c/s>."""
    if not any("\\" in text for text in _strings(turn.get("tool_calls"))):
        return turn

    def opened(call: Any) -> Any:
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(text := inner.get("arguments"), str):
            return call
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return call
        if not any(pattern.search(part) for part in _strings(value)):
            return call
        inner = {**inner, "arguments": value}
        return {**call, "function": inner} if "function" in call else inner

    return {**turn, "tool_calls": [opened(call) for call in turn["tool_calls"]]}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _strings(key)
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _mapped(value: Any, swap: Any) -> Any:
    if isinstance(value, str):
        return swap(value)
    if isinstance(value, Mapping):
        return {swap(key) if isinstance(key, str) else key: _mapped(part, swap) for key, part in value.items()}
    return [_mapped(part, swap) for part in value] if isinstance(value, list) else value
