"""Reads rows of a JSON file: one array of objects, or one object a line.

An array is read item by item, however it is broken into lines, so that it is never held in memory.
"""

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from qdpo.data.read.filetext import chunks, lines, opened
from qdpo.data.read.progress import DEEPEST, BadLine, Numbered, Reading, Row, is_deep
from qdpo.data.read.skip import JsonValue
from qdpo.errors import DataError

SHOWN_BEFORE = 25
"""Number of characters that an error message shows before the damaged place."""
SKIP = "Fix or remove the line, or skip such lines with data.skip_bad_lines=true."
SPACE = re.compile(r"[ \t\r\n]*")


def read_json(reading: Reading) -> Iterator[Numbered]:
    """Read an array of objects, or one object a line; decided by content, not by file name."""
    with opened(reading) as file:
        start = b""
        while not start and (more := file.read(4096)):
            start = more.lstrip(codecs.BOM_UTF8 + b" \t\r\n")
    if start.startswith(b"["):
        yield from _read_array(reading)
        return
    for number, line in lines(reading):
        if isinstance(line, BadLine):
            yield number, line
        elif line.strip():
            yield number, _read_object(reading, number, line)


class _RepeatedKey(ValueError):
    """An object names a key twice, with two values."""

    def __init__(self, key: str):
        super().__init__(f"the key {key!r} occurs twice in an object, with two values")
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen and seen[key] != value:
                raise _RepeatedKey(key)
            seen[key] = value
    return found


STRICT, PLAIN = json.JSONDecoder(object_pairs_hook=_object), json.JSONDecoder()


def _repeated(number: int, key: str) -> BadLine:
    return BadLine(f"line {number}: the key {key!r} occurs twice in an object, with two values", "repeated_key")


def _read_object(reading: Reading, number: int, line: str) -> Row | BadLine:
    try:
        row = STRICT.decode(line)
    except _RepeatedKey as error:
        return _repeated(number, error.key)
    except (ValueError, RecursionError) as error:
        return reading.bad_line(number, _not_json(error, line))
    if not isinstance(row, dict):
        return reading.bad_line(number, f": {type(row).__name__} instead of an object {{…}} with columns.")
    if is_deep(row, line):
        return reading.bad_line(number, f": the row nests more than {DEEPEST} lists and objects. {SKIP}")
    return row


def _not_json(error: Exception, line: str) -> str:
    line = line.strip()
    shown = line if len(line) <= 80 else f"{line[:50]} … {line[-25:]}"
    problem = getattr(error, "msg", None) or str(error)
    whole = "It seems to be one object over several lines: write its rows out, one a line. " if line == "{" else ""
    return (
        f" is not JSON ({problem}): {shown!r}. {whole}The file must be one object a line, or one array of objects. "
        f"{SKIP}"
    )


def _read_array(reading: Reading) -> Iterator[Numbered]:
    """The objects of one JSON array, however it is broken into lines; one item at a time is in memory."""
    for item, (line, row) in enumerate(_array_items(reading), 1):
        if not isinstance(row, dict | BadLine):
            raise DataError(
                f"{reading.path}, line {line}: item {item} of the array is {type(row).__name__}, not an object {{…}} "
                "with columns."
            )
        yield line, row


def _array_items(reading: Reading) -> Iterator[tuple[int, Any]]:
    with closing(chunks(reading)) as texts:  # an error may leave the file half read
        yield from _items(_Window(reading, texts))


def _items(text: "_Window") -> Iterator[tuple[int, Any]]:
    text.skip("[")
    is_first = True
    while True:
        mark = text.peek()
        if mark == "]":
            text.skip("]")
            if text.peek():
                raise text.error("there is text after the end of the array")
            return
        if not is_first:
            if mark != ",":
                raise text.error("the array is not closed" if not mark else "a comma is missing between two items")
            text.skip(",")
            text.peek()
        yield text.line, text.item()
        is_first = False


class _Window:
    """The part of a JSON text that is in memory."""

    def __init__(self, reading: Reading, texts: Iterator[str]):
        self._reading, self.line, self._text, self._place, self._texts = reading, 1, "", 0, texts

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            match = SPACE.match(self._text, self._place)
            assert match is not None
            self._go_to(match.end())
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._read():
                return ""

    def skip(self, mark: str) -> None:
        assert self.peek() == mark
        self._place += 1

    def item(self) -> Any:
        """The value that begins here, or why it is left out; one that is too large is never in memory as a whole."""
        number = self.line
        decoder, wanted, repeated, most = STRICT, 1, None, self._reading.max_bytes
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._place)
            except _RepeatedKey as error:
                decoder, repeated = PLAIN, error.key
                continue
            except json.JSONDecodeError as error:
                is_torn = error.pos >= len(self._text) - 16 or error.msg.startswith("Unterminated string")
                if is_torn and len(self._text) - self._place > most:
                    self._skip_item()
                    return self._reading.too_large(number)
                if is_torn and any([self._read() for _ in range(wanted)]):
                    wanted *= 2
                    continue
                self._go_to(error.pos)
                raise self.error(error.msg) from None
            except (ValueError, RecursionError) as error:
                raise self.error(str(error)) from None
            size, text = end - self._place, self._text[self._place : end]
            self._go_to(end)
            if size > most:
                return self._reading.too_large(number)
            if is_deep(value, text):
                raise self.error(f"the item nests more than {DEEPEST} lists and objects")
            return value if repeated is None else _repeated(number, repeated)

    def _skip_item(self) -> None:
        """Go to the end of the list, object or text that begins here, without all of it in memory."""
        value = JsonValue()
        while (end := value.feed(self._text[self._place :])) is None:
            self._go_to(len(self._text))
            if not self._read():
                raise self.error("the array is not closed")
        self._go_to(self._place + end)

    def error(self, problem: str) -> DataError:
        shown = self._text[max(0, self._place - SHOWN_BEFORE) : self._place + 50]
        return DataError(
            f"{self._reading.path}, line {self.line} is not JSON ({problem}): {shown!r}. Fix it there. The file must "
            "be one object a line, or one array of objects."
        )

    def _go_to(self, place: int) -> None:
        self.line += self._text.count("\n", self._place, place)
        self._place = place

    def _read(self) -> bool:
        more = next(self._texts, "")
        if more:
            seen = max(0, self._place - SHOWN_BEFORE)
            self._text, self._place = self._text[seen:] + more, self._place - seen
        return bool(more)
