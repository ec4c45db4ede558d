"""Finds the end of a row that is too large to read, in pieces and without a loop over its marks: JSON and CSV."""

import re

import numpy as np

BEYOND_MARK = np.zeros(256, np.int8)
BEYOND_MARK[list(b"[{")], BEYOND_MARK[list(b"]}")] = 1, -1
SLICE = 2**16
COMMA, QUOTE = ord(","), ord('"')
QUOTED = re.compile(rb'(?:[^"]++|"")*+')


class JsonValue:
    """Follows JSON text piece by piece to the comma or bracket behind the value that begins it."""

    def __init__(self) -> None:
        self._depth, self._quoted, self._torn = 0, 0, False

    def feed(self, text: str) -> int | None:
        """The place in `text` at which the value has ended, or None if it goes on."""
        for start in range(0, len(text), SLICE):
            end = self._feed(text[start : start + SLICE])
            if end is not None:
                return start + end
        return None

    def _feed(self, text: str) -> int | None:
        data = text.encode("latin-1", "replace")  # one byte a character
        if self._torn:
            data = b"_" + data[1:]  # a backslash ended the last piece: whatever follows is part of the text
        data = data.replace(b"\\\\", b"__").replace(b'\\"', b"__")
        self._torn = data.endswith(b"\\")
        if self._quoted and b'"' not in data:
            return None
        marks = np.frombuffer(data, np.uint8)
        quoted = (np.cumsum(marks == QUOTE, dtype=np.int32) + self._quoted) & 1
        depth = np.cumsum(BEYOND_MARK[marks] * (1 - quoted), dtype=np.int32) + self._depth
        ended = np.flatnonzero((depth < 0) | ((depth == 0) & (quoted == 0) & (marks == COMMA)))
        if len(ended):
            return int(ended[0])
        self._depth, self._quoted = int(depth[-1]), int(quoted[-1])
        return None


class CsvRow:
    """Follows CSV text piece by piece to the end of a row."""

    def __init__(self, delimiter: str):
        mark = re.escape(delimiter.encode())
        self._stop = re.compile(b"[\n" + mark + b"]")
        quoted = rb'"(?:[^"]++|"")*+"'
        self._cells = re.compile(
            b"(?:" + mark + b"++|(?:" + quoted + b")?+[^\"\n" + mark + b"][^\n" + mark + b"]*+" + mark
            + b"|" + quoted + mark + b")*+"
        )  # fmt: skip
        self._quoted, self._at_quote, self._at_start, self.ended = False, False, True, False

    @property
    def is_open(self) -> bool:
        return self._quoted and not self._at_quote

    def feed(self, text: bytes) -> None:
        place = 0
        while place < len(text) and not self.ended:
            if self._at_quote:
                self._at_quote = False
                if text[place] == QUOTE:  # two of them are one, and the cell goes on
                    place += 1
                    continue
                self._quoted = False
            if self._quoted:
                within = QUOTED.match(text, place)
                assert within is not None
                place = within.end() + 1
                self._at_quote = place <= len(text)
                continue
            if self._at_start:
                whole = self._cells.match(text, place)
                assert whole is not None
                place = whole.end()
                if place < len(text) and text[place] == QUOTE:
                    self._quoted, self._at_start = True, False
                    place += 1
                    continue
            found = self._stop.search(text, place)
            self._at_start = found is not None or (place == len(text) and self._at_start)
            place = found.end() if found else len(text)
            self.ended = found is not None and found.group() == b"\n"
