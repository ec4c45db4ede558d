"""Keeps text from outside (servers, data, names, templates) from controlling the terminal: the door of plain output.

`protect_terminal` puts the door in front of stdout and stderr; `console.Screen` has its own, behind rich's colours.
"""

import io
import re
import sys
from typing import TextIO

# C0 except tab and newline, DEL, C1, the bidirectional embeddings, overrides and isolates, and lone surrogates, which
# no terminal's encoding can write. Marks (U+200E, U+200F) only help right-to-left text and stay.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# What a progress bar of a library writes to move within its own lines.
_BAR_MOVES = re.compile(r"(?:\n|\x1b\[A)*")


def clean(text: str) -> str:
    """The text with every control character as its JSON escape, so that it is seen and JSON keeps its meaning."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\r\n", "\n"))


class CleanStream(io.TextIOBase):
    """A text stream that cleans what is written to `raw_stream`.

    `may_redraw` lets progress bars of libraries (tqdm) return to the start of their line.
    """

    def __init__(self, raw_stream: TextIO, *, may_redraw: bool = False):
        self.raw_stream, self._may_redraw = raw_stream, may_redraw

    def write(self, text: str) -> int:
        if self._may_redraw and _BAR_MOVES.fullmatch(text):
            return self.raw_stream.write(text)
        start = "\r" if self._may_redraw and text.startswith("\r") else ""
        self.raw_stream.write(start + clean(text[len(start) :]))
        return len(text)

    def flush(self) -> None:
        self.raw_stream.flush()

    def isatty(self) -> bool:
        return self.raw_stream.isatty()

    def fileno(self) -> int:
        return self.raw_stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.raw_stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.raw_stream.errors


def protect_terminal() -> None:
    """Put the door in front of stdout and stderr; letters that their encoding lacks are written as escapes."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, CleanStream):
            continue
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, CleanStream(stream, may_redraw=name == "stderr"))
