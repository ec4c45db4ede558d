"""Checks values that were read from JSON against the types of the fields that receive them."""

import functools
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

hints = functools.cache(get_type_hints)
SHOWN = 60
"""Characters of a wrong value in a message."""


def check_fields(kind: type, values: Mapping[str, object]) -> None:
    """Raises: TypeError if a value does not have the type of the field of that name in `kind`."""
    for name, value in values.items():
        if not fits(value, hints(kind)[name]):
            raise TypeError(f"{name} is {repr(value)[:SHOWN]}")


def fits(value: Any, hint: Any) -> bool:
    """True if the value has the type. A whole number is a float as well; true and false are not numbers."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any or hint is object:
        return True
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is Literal:
        return value in parts
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, (int, float))
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(one, parts[0]) for one in value)
    if origin is list:
        return isinstance(value, list) and all(fits(one, parts[0]) for one in value)
    if origin is not None and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            fits(key, parts[0]) and fits(one, parts[1]) for key, one in value.items()
        )
    return isinstance(value, type(None) if hint is None else hint)
