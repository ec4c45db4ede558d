"""Compares a row's texts with what a template has made of them."""

import json
from collections.abc import Iterator
from typing import Any


def holds(text: str, part: Any) -> bool:
    """True if `text` contains the letters and digits of `part` in their order, whatever is between them."""
    part = str(part).strip()
    return part in text or _letters(part) in _letters(text)


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text))


def holds_value(text: str, part: str) -> bool:
    """True if `text` contains a text of a tool call, as it is or with the escapes that JSON has for it."""
    return any(holds(text, form) for form in (part, json.dumps(part, ensure_ascii=False)[1:-1], json.dumps(part)[1:-1]))


def leaves(value: Any) -> Iterator[str]:
    """The texts and numbers in a JSON value, keys left out."""
    if isinstance(value, dict):
        for part in value.values():
            yield from leaves(part)
    elif isinstance(value, list):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield str(value)


def parting(one: str, other: str) -> str:
    """The place where two texts begin to differ, for a message."""
    place = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, place - 20)
    return f"{one[start : place + 40]!r} became {other[start : place + 40]!r}"
