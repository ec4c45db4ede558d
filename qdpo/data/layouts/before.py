"""Finds all that a row puts before its answers: prompt, system message, earlier turns, text below the prompt.

A column with such text that nothing says how to use is asked about; any other column with text is listed as not used.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qdpo.data.layouts.columns import PROMPTS, FoundColumns, Unused, names_in
from qdpo.data.layouts.origin import COLUMNS as ORIGINS
from qdpo.data.layouts.turns import Message, RowProblem, decode_turns, excerpt, is_null, kind_of, read_text, read_turns
from qdpo.data.read.files import Sample
from qdpo.data.read.progress import Row
from qdpo.errors import DataError

SYSTEMS = (
    "system",
    "system_prompt",
    "system_message",
    "system_msg",
    "system_instruction",
    "system_instructions",
    "system_content",
    "sys_prompt",
)
ASKED = (
    "passage",
    "passages",
    "document",
    "documents",
    "paragraph",
    "article",
    "background",
    "evidence",
    "knowledge",
    "source_text",
    "chat_history",
    "conversation_history",
    "dialogue_history",
    "dialog_history",
    "previous_turns",
    "previous_messages",
)
"""Names of columns that, like PROMPTS and SYSTEMS, hold text to put before an answer."""
FEW_LOST = 0.1
"""Share of a column's cells that may differ from the text in use before the user is asked."""
FEW_LABELS = 0.2
LABEL_WORDS = 6
PROSE_WORDS = 4
PROSE_LETTERS = 8
"""Letters beyond ASCII from which a text without spaces counts as prose."""


def read_before(sample: Sample, found: FoundColumns, columns: Mapping[str, str], origin: str) -> FoundColumns:
    """The columns with those of prompt, system message, context and history; `unused` lists what is left out.

    Raises: DataError, with the settings to choose from, if it is unclear how a column belongs before the answers.
    """
    look = _Before({**sample.rows, **sample.firsts}, sample, found, columns, origin)
    named = {role: column for role, column in look.named().items() if column}
    found = replace(found, named={**found.named, **named}, context=look.context(named.get("prompt")))
    return replace(found, unused=tuple(look.unused(found)))


@dataclass(frozen=True)
class _Before:
    rows: Mapping[int, Row]
    sample: Sample
    found: FoundColumns
    columns: Mapping[str, str]
    origin: str

    def _free(self, names: Iterable[str]) -> list[str]:
        gone = {*self.found.named.values(), *names_in(self.columns.get("ignore"), self.sample)}
        gone |= {*self.context(None), self.columns.get("history", "")}
        return [name for name in names if name in self.sample.columns and name not in gone]

    def named(self) -> dict[str, str | None]:
        prompts, systems = self._free(PROMPTS), self._free(SYSTEMS)
        filled = [name for name in prompts if self._filled(name)]
        history = self.columns.get("history")
        if history is None and "history" in filled and len(filled) > 1 and self._is_history("history"):
            history = "history"
        filled = [name for name in filled if name != history and (name != "messages" or self._ends_with_question())]
        left = [name for name in prompts if name not in (history, "messages")]
        prompt = self.columns.get("prompt") or next(iter(filled or left), None)
        system = self.columns.get("system") or next(iter([s for s in systems if self._filled(s)] or systems), None)
        return {"prompt": prompt, "system": system, "history": history}

    def context(self, prompt: str | None) -> tuple[str, ...]:
        """The columns to be put below the prompt: as the user says, or Alpaca's `input`."""
        if "context" in self.columns:
            return tuple(names_in(self.columns["context"], self.sample))
        is_alpaca = prompt == "instruction" and "input" in self._free(["input"])
        return ("input",) if is_alpaca else ()

    def unused(self, found: FoundColumns) -> Iterator[Unused]:
        """The columns with text that nothing uses. Raises: DataError for those that belong before the answers."""
        gone = {*found.named.values(), *found.context, *(found.scores or ()), found.list_scores, *ORIGINS}
        gone |= set(names_in(self.columns.get("ignore"), self.sample))
        asked = list[Unused]()
        for column in self.sample.columns:
            if column in gone:
                continue
            belongs = column in (*PROMPTS, *SYSTEMS, *ASKED)
            cells = [(row, cell) for row in self.rows.values() if _texts(cell := row.get(column), belongs)]
            if not belongs or column in ASKED:
                prose = [(row, cell) for row, cell in cells if any(map(is_prose, _texts(cell, belongs)))]
                cells = prose if 2 * len(prose) > len(cells) and not _are_labels(prose) else []
            lost = [cell for row, cell in cells if not _stands(cell, row, found, anywhere=not belongs)]
            if not lost:
                continue
            left = Unused(column, len(cells), len(self.rows), excerpt(next(_texts_of(lost[0])), 40))
            if belongs and "prompt" not in self.columns and len(lost) > FEW_LOST * len(cells):
                asked.append(left)
            else:
                yield left
        if asked:
            raise self._ask(asked, found)

    def _ask(self, asked: Sequence[Unused], found: FoundColumns) -> DataError:
        named, names = found.named, [left.column for left in asked]
        shown = ", ".join(
            f"{left.column} (in {left.filled} of {left.rows} rows, as {left.example!r})" for left in asked
        )
        ways = []
        for name in names:
            if self._is_history(name):
                ways.append(f"data.columns.history={name} puts it before the prompt as earlier turns")
            elif name in SYSTEMS:
                ways.append(f"data.columns.system={name} makes it the system message")
        texts = [name for name in names if name not in SYSTEMS and not self._is_history(name)]
        texts = [name for name in texts if self._is_text(name)]
        if texts and "prompt" in named:
            ways.append(f"data.columns.context={'+'.join(texts)} puts {_it(texts)} below {named['prompt']}")
        if texts and "prompt" not in named:
            ways.append(f"data.columns.prompt={texts[0]} makes it the prompt")
        ways.append(f"data.columns.ignore={'+'.join(names)} leaves {_it(names)} out")
        prompt = f"the prompt is {named['prompt']}" if "prompt" in named else "the prompt is taken from the answers"
        return DataError(
            f"{self.origin}: {prompt}, and text that may belong before the answers is also in {shown}. Without it, the "
            f"model would learn to answer what it was not shown. Choose: {'; or '.join(ways)}."
        )

    def _filled(self, column: str) -> bool:
        return any(_texts(row.get(column), True) for row in self.rows.values())

    def _is_text(self, column: str) -> bool:
        kinds = [kind_of(row.get(column)) for row in self.rows.values()]
        return set(kinds) <= {"text", "null"}

    def _is_history(self, column: str) -> bool:
        """True if all cells are earlier turns that end with an answer."""
        cells = [cell for row in self.rows.values() if _texts(cell := row.get(column), True)]
        return bool(cells) and all(map(_is_earlier, cells))

    def _ends_with_question(self) -> bool:
        """True if the column `messages` is the answers' prompt, and not a copy of a whole conversation."""
        answers = [row.get(self.found.named["chosen"]) for row in self.rows.values()]
        if any(len(turns) > 1 and turns[0]["role"] != "assistant" for turns in map(_turns, answers)):
            return False
        ends = [turns[-1]["role"] for row in self.rows.values() if (turns := _turns(row.get("messages")))]
        return bool(2 * sum(role != "assistant" for role in ends) > len(ends))


def earlier_turns(cell: Any, column: str) -> list[Message]:
    """The turns of a conversation before its last question: messages, or lists of a question and its answer.

    Raises: RowProblem `bad_history`.
    """
    if not _texts(cell, True):
        return []
    pairs = _parsed(cell)
    if isinstance(pairs, list) and all(_is_exchange(pair) for pair in pairs):
        return [
            {"role": role, "content": read_text(text, column)}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    if kind_of(cell) not in ("turns", "encoded"):
        raise RowProblem("bad_history", f"{column} holds neither messages nor lists of question and answer")
    turns = read_turns(cell, column)
    if turns[-1]["role"] == "user":
        raise RowProblem("bad_history", f"{column} ends with a question, and the prompt is another one")
    return turns


def after_earlier(earlier: list[Message], turns: list[Message]) -> list[Message]:
    """The turns behind earlier ones; their system message goes to the front."""
    if earlier and earlier[0]["role"] != "system" and turns[0]["role"] == "system":
        return [turns[0], *earlier, *turns[1:]]
    return [*earlier, *turns]


def below(text: str, row: Row, columns: Sequence[str]) -> str:
    """The prompt with the texts of these columns below it, an empty line between. Raises: RowProblem `not_text`."""
    for column in columns:
        cell = row.get(column)
        if not is_null(cell) and read_text(cell, column).strip():
            text = f"{text}\n\n{cell}"
    return text


def unused_warning(unused: Sequence[Unused]) -> str:
    """The sentence for columns with text that are left out."""
    shown = ", ".join(f"{left.column} (in {left.filled} of {left.rows} rows, as {left.example!r})" for left in unused)
    return (
        f"columns with text that are not used: {shown}. data.columns.context=NAME puts one below the prompt; "
        f"data.columns.ignore={'+'.join(left.column for left in unused)} leaves them out without a warning"
    )


def is_prose(text: str) -> bool:
    """True for text that someone wrote to be read, rather than an id, a name, a date, an address or a label."""
    if "://" in text and len(text.split()) < 2 * PROSE_WORDS:
        return False
    words = [word for word in text.split() if sum(map(str.isalpha, word)) > 1]
    return len(words) >= PROSE_WORDS or sum(letter.isalpha() and letter > "\u02ff" for letter in text) >= PROSE_LETTERS


def _are_labels(cells: Sequence[tuple[Row, Any]]) -> bool:
    """True for a few short texts that are repeated all over the rows, such as topics."""
    texts = Counter(text for _row, cell in cells for text in _texts(cell, False))
    return len(texts) < FEW_LABELS * len(cells) and max(len(text.split()) for text in texts) <= LABEL_WORDS


def _is_earlier(cell: Any) -> bool:
    try:
        return bool(earlier_turns(cell, ""))
    except RowProblem:
        return False


def _is_exchange(pair: Any) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)


def _parsed(cell: Any) -> Any:
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            return cell
    return cell


def _turns(cell: Any) -> list[Message]:
    try:
        return read_turns(cell, "") if kind_of(cell) in ("turns", "encoded") else []
    except RowProblem:
        return []


def _texts(cell: Any, with_numbers: bool) -> list[str]:
    """The texts in a cell, however nested, that are not empty."""
    if with_numbers and isinstance(cell, int | float) and not isinstance(cell, bool):
        return [] if is_null(cell) else [str(cell)]
    return [text for text in _texts_of(cell) if text.strip()]


def _texts_of(cell: Any) -> Iterator[str]:
    if isinstance(cell, str):
        turns = decode_turns(cell)
        yield from [cell] if turns is None else _texts_of(turns)
    elif isinstance(cell, Mapping):
        is_turn = ("role" in cell or "from" in cell) and ("content" in cell or "value" in cell)
        parts = [cell.get("content"), cell.get("value")] if is_turn else list(cell.values())
        for part in parts:
            yield from _texts_of(part)
    elif isinstance(cell, list | tuple):
        for part in cell:
            yield from _texts_of(part)
    elif isinstance(cell, int | float) and not isinstance(cell, bool):
        yield str(cell)


def _stands(cell: Any, row: Row, found: FoundColumns, *, anywhere: bool) -> bool:
    """True if all text of the cell is used before the answers, or is an answer (part of one, if `anywhere`)."""
    roles = ("prompt", "system", "history")
    before = [text for role in roles for text in _texts(row.get(found.named.get(role, "")), True)]
    before += [text for column in found.context for text in _texts(row.get(column), True)]
    last = list[str]()
    for column in (found.named["chosen"], found.named["rejected"]):
        answer = row.get(column)
        texts = _texts(answer, True)
        if kind_of(answer) == "dialogue" and isinstance(answer, str):
            head, _, tail = answer.rpartition("\n\nAssistant:")
            texts = [head, tail]
        if found.form != "ranked" and kind_of(answer) in ("turns", "encoded", "dialogue"):
            before += texts[:-1]
            texts = texts[-1:]
        last += texts
    shown = "\n".join(map(_plain, before))
    answers = list(map(_plain, last))
    is_list = not isinstance(cell, str) or kind_of(cell) == "encoded"
    for text in map(_plain, _texts(cell, True)):
        if text in shown or (is_list and text in answers):
            continue
        if not (anywhere and any(text in answer for answer in answers)):
            return False
    return True


def _plain(text: str) -> str:
    return " ".join(text.split())


def _it(names: Sequence[str]) -> str:
    return "it" if len(names) == 1 else "them"
