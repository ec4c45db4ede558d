"""Thoughts in answers: the tags that models write around them, in a prompt's end and in a row's text."""

import re
from dataclasses import dataclass

OPENING = r"<[\w:.-]*think[\w:.-]*>|\[THINK\]|<\|START_THINKING\|>|<\|channel>thought\n|<\|open\|>think<\|sep\|>"
CLOSING = r"</[\w:.-]*think[\w:.-]*>|\[/THINK\]|<\|END_THINKING\|>|<channel\|>|<\|close\|>think<\|sep\|>"
_OPEN_AT_END = re.compile(rf"(?P<open>{OPENING})\s*\Z")
_CLOSED_AT_END = re.compile(rf"(?:{CLOSING})\s*\Z")
_CLOSED_AT_START = re.compile(rf"\A\s*(?:(?:{OPENING})\s*)?(?:{CLOSING})")
_OPEN_AT_START = re.compile(rf"\A\s*(?P<open>{OPENING})")
_CLOSE = re.compile(CLOSING)
_PAIRS = {
    "[THINK]": "[/THINK]",
    "<|START_THINKING|>": "<|END_THINKING|>",
    "<|channel>thought\n": "<channel|>",
    "<|open|>think<|sep|>": "<|close|>think<|sep|>",
}


@dataclass(frozen=True)
class Inline:
    """An answer's text that holds a thought: `is_open` if the opening tag is in the text as well."""

    open: str
    close: str
    thought: str
    rest: str
    """The text after the closing tag, without the white space before it."""
    from_thought: str
    """The text from behind the opening tag; the whole text if there is none."""
    is_open: bool


def opened(prompt: str) -> tuple[str, str] | None:
    """Opening and closing tag if the prompt ends inside a thought that it has opened."""
    found = _OPEN_AT_END.search(prompt)
    return (found["open"], closing_of(found["open"])) if found else None


def is_closed(prompt: str) -> bool:
    """True if the prompt ends with a closed thought, so that the model answers without one."""
    return _CLOSED_AT_END.search(prompt) is not None


def closing_of(opening: str) -> str:
    """The tag that closes a thought."""
    return _PAIRS.get(opening) or opening.replace("<", "</", 1)


def without_closed(text: str) -> str:
    """The text without a closed thought of white space, or a closing tag, at its start."""
    return _CLOSED_AT_START.sub("", text)


def without_opening(text: str) -> str:
    """The text without an opening tag at its start."""
    return _OPEN_AT_START.sub("", text)


def starts_closed(text: str) -> str:
    """The closed thought without words at the start of a text; empty if there is none."""
    found = _CLOSED_AT_START.match(text)
    return found[0] if found else ""


def filled(empty: str, thought: str) -> str:
    """A closed thought without words, with the thought in it; empty if its opening tag is not there."""
    opening = _OPEN_AT_START.match(empty)
    if opening is None:
        return ""
    space = "\n" * ("\n" in empty[opening.end() : empty.rfind(closing_of(opening["open"]))])
    return f"{empty[: opening.end()]}{space}{thought.strip()}{space}{closing_of(opening['open'])}"


def inline(text: str) -> Inline | None:
    """The thought at the start of an answer's text, with its tags or with the closing tag alone; None if none."""
    opening = _OPEN_AT_START.match(text)
    if opening is not None:
        close = closing_of(opening["open"])
        thought, found, rest = text[opening.end() :].partition(close)
        if not found:
            return None
        after = text[opening.end() :]
        return Inline(opening["open"], close, thought.strip(), rest.lstrip(), after, True)
    closing = _CLOSE.search(text)
    if closing is None:
        return None
    close = closing[0]
    opening_text = next((one for one, other in _PAIRS.items() if other == close), close.replace("</", "<", 1))
    if opening_text in text[: closing.start()]:
        return None  # a thought in the middle is text
    rest = text[closing.end() :].lstrip()
    if not rest.strip():
        return None  # a tag behind which nothing stands
    return Inline(opening_text, close, text[: closing.start()].strip(), rest, text, False)
