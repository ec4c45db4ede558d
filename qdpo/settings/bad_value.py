"""The error message for a value that a setting does not accept."""

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo


def explain(name: str, value: Any, origin: str, field: FieldInfo) -> str:
    """Return the error message for a value that the field does not accept: allowed values, and the help text."""
    value = "+".join(map(str, value)) if isinstance(value, list) else value
    choices = list(_literal_choices(field.annotation))
    help_text = (field.description or "").split("\n")[0]
    message = f"{name}={value} (from {origin}) is not {_kind(field)}."
    if choices:
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        message = f"{name}={value} (from {origin}): allowed are {', '.join(choices)}{_and_numbers(field)}.{hint}"
    return f"{message} {help_text}".strip()


def _and_numbers(field: FieldInfo) -> str:
    return " or a whole number" if "int" in str(field.annotation) else ""


def _kind(field: FieldInfo) -> str:
    text = str(field.annotation)
    bounds = [str(item) for item in field.metadata] + ([text] if "Ge(" in text or "Gt(" in text else [])
    joined = " ".join(bounds)
    words = []
    for sign, word in (("Gt(gt=", "above"), ("Ge(ge=", "at least"), ("Lt(lt=", "below"), ("Le(le=", "at most")):
        if sign in joined:
            words.append(f"{word} {joined.split(sign)[1].split(')')[0]}")
    if "list[float]" in text:
        return "a list of numbers, as in 0.8+0.2+1"
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    kind = next((words for name, words in kinds.items() if name in text), "text")
    return f"{kind} {' and '.join(words)}".strip()


def _literal_choices(annotation: Any) -> Iterator[str]:
    if getattr(annotation, "__origin__", None) is not None or get_args(annotation):
        for argument in get_args(annotation):
            if isinstance(argument, str):
                yield argument
            else:
                yield from _literal_choices(argument)
