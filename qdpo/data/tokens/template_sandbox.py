"""A sandbox for chat templates in which no single operation can build something huge: sizes are counted as they grow.

Jinja's own sandbox keeps a template from the files and the interpreter, but not from memory: `'x' * 10**9`,
`center(10**9)`, a text doubled forty times. Here every operation that can make a value larger is counted before or just
after it, and a render ends once its values, steps or output pass the bounds. Time is bounded in `template_bounds`.
"""

from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from itertools import chain, islice
from string import Formatter
from typing import Any

from jinja2 import Template
from jinja2.environment import Environment
from jinja2.runtime import Context, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from qdpo.data.tokens.template_code import OPERATORS, CountingCode

LARGEST = 2**24  # characters of one text, or of one list with all that it holds
MOST_ITEMS = 2**18  # items of one list with all that it holds
TOTAL = 2**28  # characters and items made by one render, copies included
MOST_STEPS = 2_000_000  # turns of loops in one render
WIDEST = 1_000_000  # a number given to a method or filter that pads, repeats or cuts
MOST_BITS = 100_000  # of an integer; beyond it, `9 ** 9 ** 9` would calculate for hours
SLOW_TEXT = 200_000  # characters for filters whose time grows with the square of the text
WIDENING = {"center", "indent", "wordwrap", "tojson", "batch", "slice", "format", "xmlattr", "urlize", "truncate"}
SLOW = {"striptags", "urlize", "wordwrap"}
JINJAS = ("_loop_vars", "_block_vars")  # arguments of a call that jinja adds
SIMPLE = (int, float, bool, type(None))


class TooLarge(Exception):
    """A template builds more than a conversation can need."""


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """A copy of transformers' environment for templates, with counted operations. One per thread, as it has counts."""

    intercepted_binops = frozenset(OPERATORS)
    code_generator_class = CountingCode

    def __init__(self, like: Environment):
        super().__init__(
            trim_blocks=like.trim_blocks,
            lstrip_blocks=like.lstrip_blocks,
            keep_trailing_newline=like.keep_trailing_newline,
            extensions=[type(extension) for extension in like.extensions.values()],
            finalize=self.shown,
        )
        self.filters = {name: self._bounded_filter(name, function) for name, function in like.filters.items()}
        self.tests.update(like.tests)
        self.globals.update(like.globals)
        self._made = self._steps = 0

    def render_bounded(self, template: Template, values: Mapping[str, Any]) -> str:
        """The template's text. Raises: TooLarge, and whatever the template raises."""
        self._made = self._steps = 0
        return template.render(**values)

    # What the compiled template calls.

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: B902, N805
        for arg in args:
            if isinstance(arg, Iterator):  # of a list, as `_bounded_filter` makes them
                args = tuple([list(arg) if isinstance(arg, Iterator) else arg for arg in args])
                break
        if not isinstance(__obj, Macro):
            __self._check_call(__obj, args, kwargs)
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def step(self, written: int) -> None:
        """Count a turn of a loop, and the literal text in its body."""
        self._steps += 1
        self._made += written
        if self._steps > MOST_STEPS:
            raise TooLarge(f"its loops take more than {MOST_STEPS:,} turns")
        if self._made > TOTAL:
            self.count(0)

    def tilde(self, *parts: Any) -> str:
        """`a ~ b`."""
        return self.concat([self.shown(part) for part in parts])

    def concat(self, pieces: Iterable[str]) -> str:
        """The text that a template, a macro or a `{% set x %}…{% endset %}` has written."""
        pieces = list(pieces)
        self._allow(sum(map(len, pieces)))
        return "".join(pieces)

    def made(self, value: Any) -> Any:
        """`value`, once it is counted."""
        kind = type(value)
        if kind is str or kind is bytes:
            self._allow(len(value))
        elif kind in (list, tuple, dict, set):
            self._allow(weight(value))
        elif kind is int:
            self._check_bits(value.bit_length())
        return value

    def shown(self, value: Any) -> str:
        """`value` as it is written."""
        if type(value) is not str:
            self._allow(weight(value))
            value = str(value)
        self._made += len(value)
        if self._made > TOTAL:
            self.count(0)
        return value  # type: ignore[no-any-return]

    def count(self, size: int) -> None:
        """Add to what this render has made."""
        self._made += size
        if self._made > TOTAL:
            raise TooLarge(f"it builds more than {TOTAL:,} characters")

    def _allow(self, size: int) -> None:
        if size > LARGEST:
            raise TooLarge(f"it builds a value of more than {LARGEST:,} characters or items")
        self.count(size)

    # Operators.

    def add(self, *terms: Any) -> Any:
        """`a + b + …`."""
        for term in terms:
            if type(term) is not str:
                break
        else:
            return self.concat(terms)
        total = terms[0]
        for term in terms[1:]:
            if not isinstance(total, SIMPLE):
                self._allow(weight(total) + weight(term))
            total = total + term
        return total

    def multiply(self, left: Any, right: Any) -> Any:
        """`a * b`."""
        for value, times in ((left, right), (right, left)):
            if isinstance(times, int) and not isinstance(value, SIMPLE):
                self._allow(weight(value) * max(int(times), 0))
        if isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() + right.bit_length())
        return left * right

    def power(self, left: Any, right: Any) -> Any:
        """`a ** b`."""
        if isinstance(left, int) and isinstance(right, int):
            self._check_bits(left.bit_length() * max(right, 0))
        return left**right

    def modulo(self, left: Any, right: Any) -> Any:
        """`a % b`."""
        if isinstance(left, (str, bytes)):
            _check_format(str(left), "*" in str(left), _flat(right))
            self._allow(weight(left) + weight(right))
            return self.made(left % right)
        return left % right

    def _check_bits(self, bits: int) -> None:
        if bits > MOST_BITS:
            raise TooLarge(f"it calculates with integers of more than {MOST_BITS:,} bits")

    # Methods, functions and filters.

    def _check_call(self, called: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        method = getattr(called, "__wrapped__", called)  # jinja wraps `format`
        owner = getattr(method, "__self__", None)
        if isinstance(called, type) or owner is None or owner is self or isinstance(owner, BoundedSandbox):
            if getattr(called, "__name__", "") == "generate_lorem_ipsum":
                _check_numbers([*args, *kwargs.values()], 100)
            return
        values = [*args, *(value for key, value in kwargs.items() if key not in JINJAS)]
        name = getattr(called, "__name__", "")
        if name in ("format", "format_map") and isinstance(owner, str):
            values = list(chain.from_iterable(map(_flat, values)))
            specs = [spec or "" for _, _, spec, _ in Formatter().parse(owner)]
            _check_format(owner, any("{" in spec for spec in specs), values)
            self._allow(sum(map(weight, values)) * max(1, len(specs)) + len(owner))
            return
        if isinstance(owner, (str, bytes, bytearray, int)):
            _check_numbers(values, WIDEST)
        if isinstance(owner, (str, bytes, bytearray)):
            self._allow(_grown(owner, name, values))

    def _bounded_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        passes = getattr(function, "jinja_pass_arg", None)
        place = 0 if passes is None else 1

        def bounded(*args: Any, **kwargs: Any) -> Any:
            if len(args) > place:
                value = args[place]
                if isinstance(value, Iterator):
                    value = list(islice(value, LARGEST))
                    args = (*args[:place], value, *args[place + 1 :])
                self._check_filter(name, value, [*args[place + 1 :], *kwargs.values()])
            result = function(*args, **kwargs)
            if isinstance(result, Iterator):  # made now: made later, inside another function, it would not be counted
                return iter(self.made(list(islice(result, LARGEST + 1))))
            return self.made(result)

        if passes is not None:
            bounded.jinja_pass_arg = passes  # type: ignore[attr-defined]
        if getattr(function, "jinja_async_variant", False):
            bounded.jinja_async_variant = True  # type: ignore[attr-defined]
        return bounded

    def _check_filter(self, name: str, value: Any, options: list[Any]) -> None:
        if name in WIDENING:
            _check_numbers(options, WIDEST)
            if name == "format":
                _check_format(str(value), "*" in str(value), list(chain.from_iterable(map(_flat, options))))
            lengths = [abs(option) if isinstance(option, int) else weight(option) for option in _flat(options)]
            widths = [1, *lengths] if name not in ("truncate", "wordwrap", "center") else [1]
            self._allow(weight(value) * max(widths) + max([0, *lengths]))
        elif name == "replace":
            self._allow(_grown(str(value), "replace", options))
        elif name == "join":
            self._allow(weight(value) + weight(value) * sum(map(weight, options[:1])))
        elif name == "sum":
            if any(not isinstance(option, (int, float, str, Undefined)) for option in options):
                self._allow(weight(value) ** 2)  # lists are copied at every addition
        if name in SLOW and weight(value) > SLOW_TEXT:
            raise TooLarge(f"the filter {name} is given more than {SLOW_TEXT:,} characters")


def weight(value: Any) -> int:
    """Characters and items in a value with everything in it, each time that it occurs.

    Raises: TooLarge above the bounds: lists that hold one list twice, which holds another twice, grow unbuilt.
    """
    if isinstance(value, (str, bytes, bytearray)):
        return len(value) + 1
    if isinstance(value, (range, KeysView, ValuesView, ItemsView)):
        value = list(value)
    if not isinstance(value, (list, tuple, dict, set, frozenset)):
        return 1
    total, items, left = 0, 0, [value]
    while left:
        item = left.pop()
        items += 1
        if isinstance(item, (str, bytes, bytearray)):
            total += len(item)
        elif isinstance(item, dict):
            left.extend(item.keys())
            left.extend(item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            left.extend(item)
        if total > LARGEST or items + len(left) > MOST_ITEMS:
            raise TooLarge(f"it builds a value of more than {LARGEST:,} characters or {MOST_ITEMS:,} items")
    return total + items


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value.values()]
    return [*value] if isinstance(value, (list, tuple)) else [value]


def _check_numbers(values: list[Any], most: int) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > most:
            raise TooLarge(f"it pads, repeats or cuts by a number above {most:,}")


def _check_format(text: str, has_computed_widths: bool, values: list[Any]) -> None:
    digits = "".join(letter if letter.isdigit() else " " for letter in text).split()
    if any(len(number) > 6 for number in digits):
        raise TooLarge(f"it formats with a width above {WIDEST:,}")
    if has_computed_widths:
        _check_numbers(values, WIDEST)
        for value in values:
            if isinstance(value, str):  # a width may come from a text as well
                _check_format(value, False, [])


def _grown(text: str | bytes | bytearray, method: str, values: list[Any]) -> int:
    """Length of what a method of a text gives, or a bound on it."""
    if method == "replace" and len(values) >= 2:
        old, new = values[0], values[1]
        found = _count(text, old) if isinstance(old, type(text)) and old else len(text) + 1
        return len(text) + found * weight(new)
    if method == "join" and values:
        return weight(values[0]) * (1 + len(text))
    if method == "translate" and values and isinstance(values[0], dict):
        return (len(text) + 1) * max([1, *map(weight, values[0].values())])
    if method == "expandtabs":
        return len(text) + _count(text, "\t" if isinstance(text, str) else b"\t") * max(
            [8, *(value for value in values if isinstance(value, int))]
        )
    return len(text)


def _count(text: Any, part: Any) -> int:
    return int(text.count(part))
