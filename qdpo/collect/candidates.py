"""The candidates file: one prompt a line, with several answers to choose between and the origin of each.

`qdpo sample` writes it. If written by hand or by another tool, a line needs only a `prompt` (text or messages) and
`answers` (texts, or objects with a `text`). Prompts and answers are identified by their content, so decisions survive
added lines, reordered lines and merged files.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from qdpo.data.layouts.origin import Origin, read_origin
from qdpo.data.layouts.pair import tools_of
from qdpo.data.layouts.turns import Message, RowProblem, excerpt, read_text, read_turns
from qdpo.data.read.files import missing_file
from qdpo.errors import DataError
from qdpo.run import disk

ID_LETTERS = 16
"""Hex digits of SHA-256 in the id of a prompt or an answer: a million ids collide with a chance of 1 in 37 million."""


@dataclass(frozen=True)
class Answer:
    """One answer; tokens, cut and seed are known if qdpo drew it."""

    text: str
    origin: Origin | None = None
    tokens: int | None = None
    cut: bool = False
    """True if the answer was cut at the length limit."""
    seed: int | None = None

    @cached_property
    def id(self) -> str:
        """Identifies the answer by its text."""
        return sha256(self.text.encode()).hexdigest()[:ID_LETTERS]

    def to_json(self) -> dict[str, Any]:
        """The known fields, as plain values."""
        found: dict[str, Any] = {"text": self.text}
        found |= {"tokens": self.tokens} if self.tokens is not None else {}
        found |= {"cut": True} if self.cut else {}
        found |= {"seed": self.seed} if self.seed is not None else {}
        return found | ({"from": self.origin.to_json()} if self.origin else {})


@dataclass(frozen=True)
class Candidates:
    """One prompt, and the distinct answers to it."""

    prompt: str | list[Message]
    answers: tuple[Answer, ...]
    place: str
    """File and line, for messages."""
    drawn: Mapping[str, Any] = field(default_factory=dict)
    """The sampling parameters of `qdpo sample`."""
    tools: list[Any] | None = None
    """The functions that the model was told of."""

    @cached_property
    def id(self) -> str:
        """Identifies the prompt by its content; a text equals a single user turn with that text."""
        content = [self.turns, self.tools] if self.tools else self.turns
        text = json.dumps(content, sort_keys=True, ensure_ascii=False)
        return sha256(text.encode()).hexdigest()[:ID_LETTERS]

    @property
    def turns(self) -> list[Message]:
        """The prompt as messages."""
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt

    def to_json(self) -> dict[str, Any]:
        """The candidates as a line of the file, as plain values."""
        answers = [answer.to_json() for answer in self.answers]
        beside = {"tools": self.tools, "drawn": dict(self.drawn)}
        return {"prompt": self.prompt, "answers": answers} | {name: value for name, value in beside.items() if value}

    def answer(self, id_: str) -> Answer | None:
        """The answer with that id; None if there is none."""
        return next((answer for answer in self.answers if answer.id == id_), None)


@dataclass(frozen=True)
class Collected:
    """Prompts with at least two different answers, in the order of the files, and notes on what was left out."""

    items: list[Candidates]
    notes: list[str]
    """Lines for the user."""


def read_candidates(paths: Sequence[Path]) -> Collected:
    """Read all prompts of these files. Lines with the same prompt, in one file or several, are merged.

    Raises: DataError, with file and line, for lines that cannot be read; DataError if no prompt has two answers.
    """
    first: dict[str, Candidates] = {}
    answers: dict[str, dict[str, Answer]] = {}
    empty = 0
    for item in (item for path in paths for item in read_lines(path)):
        first.setdefault(item.id, item)
        for answer in item.answers:
            if answer.text.strip():
                answers.setdefault(item.id, {}).setdefault(answer.id, answer)
            else:
                empty += 1
    merged = [replace(item, answers=tuple(answers.get(id_, {}).values())) for id_, item in first.items()]
    items = [item for item in merged if len(item.answers) > 1]
    notes = [f"{empty:,} empty answers are left out"] if empty else []
    if alone := len(merged) - len(items):
        notes.append(f"{alone:,} prompts are left out (fewer than two different answers)")
    if not items:
        shown = ", ".join(map(str, paths))
        raise DataError(
            f"{shown} has no prompt with two different answers. Draw more with `qdpo sample` at a higher --temperature "
            "or --n."
        )
    return Collected(items, notes)


def read_lines(path: Path) -> list[Candidates]:
    """The file's lines, unmerged. Raises: DataError, with file and line, for a line that cannot be read."""
    if not path.is_file():
        raise missing_file(path, "candidates")
    found = []
    try:
        text = disk.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8: {error}. Remove the damaged line.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            found.append(_read_line(line, f"{path} line {number}"))
    return found


def _read_line(line: str, place: str) -> Candidates:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not JSON ({error}): {excerpt(line)!r}. Fix or remove the line.") from None
    if not isinstance(value, Mapping) or not isinstance(value.get("answers"), list) or "prompt" not in value:
        keys = f"the columns {', '.join(value)}" if isinstance(value, Mapping) else type(value).__name__
        pairs = isinstance(value, Mapping) and {"chosen", "rejected"} <= set(value)
        way_out = "These are pairs already: train on them." if pairs else "`qdpo sample` writes such files."
        raise DataError(f"{place} has {keys} instead of a `prompt` and a list of `answers`. {way_out}")
    try:
        prompt = value["prompt"]
        prompt = read_text(prompt, "prompt") if isinstance(prompt, str) else read_turns(prompt, "prompt")
        if not prompt or (isinstance(prompt, str) and not prompt.strip()):
            raise RowProblem("null_field", "prompt is empty")
        tools = tools_of(value.get("tools"), "tools")
        answers = [_read_answer(answer, f"answers[{n}]") for n, answer in enumerate(value["answers"])]
    except RowProblem as problem:
        raise DataError(f"{place} cannot be used: {problem.detail}. Fix or remove the line.") from None
    drawn = value.get("drawn")
    return Candidates(prompt, tuple(answers), place, drawn if isinstance(drawn, Mapping) else {}, tools)


def _read_answer(cell: Any, column: str) -> Answer:
    if isinstance(cell, str):
        return Answer(read_text(cell, column))
    if not isinstance(cell, Mapping) or "text" not in cell:
        raise RowProblem("not_text", f"{column} is neither a text nor an object with a `text`: {excerpt(cell)!r}")
    numbers = {name: cell.get(name) for name in ("tokens", "seed")}
    for name, number in numbers.items():
        if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise RowProblem("not_text", f"{column}.{name} is {excerpt(number)!r}, not a whole number")
    return Answer(
        read_text(cell["text"], f"{column}.text"), read_origin(cell.get("from")), cut=cell.get("cut") is True, **numbers
    )
