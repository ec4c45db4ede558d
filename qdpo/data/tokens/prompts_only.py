"""Reads prompts without answers from a file, and renders and tokenises them exactly as those of training rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.data.layouts.before import ASKED, SYSTEMS, after_earlier, below, earlier_turns, is_prose
from qdpo.data.layouts.columns import PROMPTS
from qdpo.data.layouts.layout import detect_layout
from qdpo.data.layouts.pair import Message, Rejection, to_pair, tools_of
from qdpo.data.layouts.turns import RowProblem, is_dialogue, kind_of, read_dialogue, read_text, read_turns, tools_in
from qdpo.data.read.files import FileRows, data_files, missing_file
from qdpo.data.read.progress import BadLine
from qdpo.data.read.source import open_source
from qdpo.data.tokens.encode import Encoder
from qdpo.data.tokens.render import Renderer
from qdpo.errors import DataError
from qdpo.settings.schema import DataConfig

TEXT_FILES = (".txt", ".md")


@dataclass(frozen=True)
class Prompt:
    """The turns before an answer; if `is_chat` is False, one user turn with the text unchanged."""

    turns: list[Message]
    is_chat: bool
    origin: str
    """File and line, for messages."""
    tools: list[Any] | None = None
    """The functions that the model may call."""


def read_prompts(path: Path, asked_by: str = "--prompts") -> list[Prompt]:
    """The prompts of a file: the non-blank lines of a text, or the column `prompt` or `messages` of a data file.

    `asked_by` names the setting in messages. Raises: DataError, with the line, for a prompt that cannot be used.
    """
    if not path.is_file():
        raise missing_file(path, asked_by)
    if path.suffix in TEXT_FILES:
        lines = enumerate(path.read_text(encoding="utf-8").split("\n"), 1)  # read_text converts other line ends
        found = [Prompt(_question(line), False, f"{path} line {number}") for number, line in lines if line.strip()]
    else:
        rows = FileRows(data_files(path)).located()
        found = [_prompt(row, PROMPTS, f"{place.file} line {place.line}") for place, row in rows]
    if not found:
        raise DataError(f"{path} has no prompts. Give one a line (.txt), or a column `prompt` (.jsonl).")
    return found


def prompts_of(path: str, *, column: str | None, shipped: Path) -> list[Prompt]:
    """The prompts of a text with one a line, or of any data set: a file, a folder, a hub id, bundled:NAME.

    `column` names the column of the prompts. For preference pairs without such a column, the prompt is what both
    answers share. Raises: DataError, with the line, for a prompt that cannot be used.
    """
    local = Path(path).expanduser()
    if local.suffix in TEXT_FILES:
        return read_prompts(local, "the prompts")
    source = open_source(path, shipped=shipped)
    sample = source.rows.read_sample()
    if column is not None and column not in sample.columns:
        raise DataError(f"--column={column}: {path} has no such column. Its columns are: {', '.join(sample.columns)}.")
    names = [column] if column else [name for name in PROMPTS if name in sample.columns]
    layout = None
    if column is None:
        try:
            layout = detect_layout(sample, {}, source.name)
        except DataError:  # not pairs, or not clear: the columns of prompts are read, if there are any
            if not names:
                raise
    found = []
    for number, (place, row) in enumerate(source.rows.located(), 1):
        origin = f"{place.file} line {place.line}"
        if layout is None:
            found.append(_prompt(row, names, origin))
        elif not isinstance(row, BadLine):
            pair = to_pair(row, number, layout)
            if isinstance(pair, Rejection):
                raise DataError(f"{origin} cannot be used ({pair.reason}): {pair.detail}. Fix or remove the row.")
            found.append(Prompt(pair.prompt, pair.is_chat, origin, pair.tools))
    return found


def encode_prompts(prompts: Sequence[Prompt], tokenizer: Any, config: DataConfig) -> list[list[int]]:
    """Ids of each prompt, with the same code and settings (template, system message) as for training rows.

    Raises: DataError that names a prompt which the chat template refuses.
    """
    renderer = Renderer.of(tokenizer, config)
    rendered = []
    for prompt in prompts:
        text = renderer.prompt(prompt.turns, prompt.tools, is_chat=prompt.is_chat)
        if isinstance(text, Rejection):
            raise DataError(f"The prompt in {prompt.origin} cannot be used ({text.reason}): {text.detail}.")
        rendered.append(text)
    encoded = list(Encoder(tokenizer, config.template).encode(rendered))
    for prompt, ids in zip(prompts, encoded, strict=True):
        if ids is None:
            raise DataError(
                f"The prompt in {prompt.origin} contains the text of a special token, which this tokenizer cannot read "
                "as ordinary text. Change or remove the prompt."
            )
    return [ids[0] for ids in encoded if ids is not None]


def _prompt(row: Any, columns: Sequence[str], origin: str) -> Prompt:
    if isinstance(row, BadLine):
        raise DataError(f"{origin} cannot be read: {row.detail}.")
    filled = [name for name in columns if kind_of(row.get(name)) != "null"]
    filled = [name for name in filled if name == filled[0] or str(row[name]).strip() not in str(row[filled[0]])]
    name, *others = filled or [next((name for name in columns if name in row), "prompt")]
    try:
        before, system = _before(row, name, others)
        if len(columns) > 1:
            others += _beside(row, name, system)
        tools = tools_of(row.get("tools") or tools_in(row.get(name)), "tools")
        if others:
            raise RowProblem(
                "several_prompts",
                f"there is text in {name} and in {', '.join(others)}, so some of it would be lost",
            )
        cell = row.get(name)
        if isinstance(cell, str) and is_dialogue(cell):
            turns = read_dialogue(cell, name)
            turns = turns[:-1] if not turns[-1]["content"] else turns  # the text ends with a bare "Assistant:"
        elif isinstance(cell, str):
            if not cell.strip():
                raise RowProblem("null_field", f"{name} is empty")
            text = read_text(cell, name)
            text = below(text, row, ("input",)) if name == "instruction" and "input" in filled else text
            return Prompt([*before, *_question(text)], bool(before or tools), origin, tools)
        else:
            turns = read_turns(cell, name)
    except RowProblem as problem:
        raise DataError(f"{origin}: {problem.detail}. Give `prompt` as text or as a list of messages.") from None
    if turns[-1]["role"] == "assistant":
        raise DataError(f"{origin}: the prompt ends with an answer. Its last turn must be the user's.")
    own = turns[0]["role"] == "system" and system is not None
    if own and before[0]["content"].strip() not in turns[0]["content"]:
        raise DataError(f"{origin}: {name} and {system} hold two different system messages. Remove one.")
    return Prompt(after_earlier(before[own:], turns), True, origin, tools)


def _before(row: Any, name: str, others: list[str]) -> tuple[list[Message], str | None]:
    """System message and earlier turns of a row, and the column of the system message.

    Columns that are used leave `others`.
    """
    if name == "instruction" and "input" in others:
        others.remove("input")
    turns: list[Message] = []
    system = next((column for column in SYSTEMS if kind_of(row.get(column)) == "text"), None)
    if system is not None:
        turns.append({"role": "system", "content": read_text(row[system], system)})
    if "history" in others:
        turns += earlier_turns(row["history"], "history")
        others.remove("history")
    return turns, system


def _beside(row: Any, name: str, system: str | None) -> list[str]:
    """Further columns with text that belongs before an answer, and is not in the prompt or the system message."""
    shown = f"{row.get(name)}\n{row.get(system)}"
    texts = {column: row.get(column) for column in (*SYSTEMS, *ASKED) if kind_of(row.get(column)) == "text"}
    return [
        column
        for column, text in texts.items()
        if column != system and text.strip() not in shown and (column in SYSTEMS or is_prose(text))
    ]


def _question(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]
