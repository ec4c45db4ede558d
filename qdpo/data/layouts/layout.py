"""Detects a data set's layout (what its columns hold) from the content of many rows, and reports it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qdpo.data.layouts.before import read_before
from qdpo.data.layouts.columns import Form, FoundColumns, Sign, Unused, find_columns, finite, winner_sign
from qdpo.data.layouts.turns import CellKind, excerpt, kind_of
from qdpo.data.read.files import SAMPLED_ROWS, Sample
from qdpo.data.read.progress import Row
from qdpo.errors import DataError

TEXT_KEYS = ("text", "response", "answer", "content", "output", "completion")
SCORE_KEYS = ("score", "overall_score", "rating", "reward")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Recipe to turn a row of a data set into pairs: column names, and the kinds of their cells.

    In a contest, `chosen` and `rejected` are the two answers, whichever won; in a ranking, both name the list.
    """

    name: str
    why: str
    """One line for the screen: what was found, and how it is read."""
    prompt: str | None
    chosen: str
    rejected: str
    prompt_kind: CellKind = "null"
    answer_kind: CellKind = "text"
    form: Form = "pairs"
    repeats_prompt: bool = False
    """Plain-text answers begin with the text of the prompt column."""
    system: str | None = None
    context: tuple[str, ...] = ()
    """Columns whose text belongs below the prompt, such as Alpaca's `input`."""
    history: str | None = None
    """Column of the turns before the prompt."""
    unused: tuple[Unused, ...] = ()
    """Columns with text that are left out."""
    tools: str | None = None
    winner: str | None = None
    sign: Sign | None = None
    scores: tuple[str, str] | None = None
    list_scores: str | None = None
    answers_scored: bool = False
    """Each answer of a ranking has its own score or rank."""
    many_rejected: bool = False
    """The rejected column holds a list of answers; each makes a pair."""
    last_answer_only: bool = False

    @property
    def is_chat(self) -> bool:
        """True if the rows have roles. Otherwise they are text to continue, and a template may give them roles."""
        return (
            self.system is not None
            or self.history is not None
            or self.answer_kind != "text"
            or self.prompt_kind in ("turns", "dialogue")
        )


def sample_of(rows: Sequence[Row]) -> Sample:
    """A sample of rows in memory: up to 200, evenly spread."""
    last, count = len(rows) - 1, min(len(rows), SAMPLED_ROWS)
    indices = sorted({round(step * last / max(count - 1, 1)) for step in range(count)})
    picked = {index + 1: rows[index] for index in indices}
    return Sample(len(rows), list(dict.fromkeys(column for row in picked.values() for column in row)), picked)


def detect_layout(
    rows: Sample | Sequence[Row],
    columns: Mapping[str, str],
    origin: str,
    *,
    form: str = "auto",
    last_answer_only: bool = False,
) -> Layout:
    """Detect the layout of a data set from rows spread over it.

    `columns` is the user's `data.columns.*`, `form` is `data.format`; `origin` names the data in messages.
    Raises: DataError if no layout or several fit, or rows disagree; ConfigError for an unknown key in `columns`.
    """
    sample = rows if isinstance(rows, Sample) else sample_of(rows)
    if not sample.rows:
        raise DataError(f"{origin} has no rows. Check data.path, data.split and data.limit.")
    found = read_before(sample, find_columns(sample, columns, form, origin), columns, origin)
    look = _Look(sample, found, origin)
    details = look.details()
    name, meaning = look.name(details)
    used = ", ".join(f"{role}={column}" for role, column in found.named.items())
    if found.context and name != "alpaca":
        meaning += f"; {' and '.join(found.context)} is put below the prompt"
    if "history" in found.named:
        meaning += f"; {found.named['history']} holds the turns before the prompt"
    used += f", context={'+'.join(found.context)}" if found.context else ""
    why = f"{meaning} ({used}; {len(sample.rows)} of {sample.count} rows looked at)"
    return Layout(name=name, why=why, last_answer_only=last_answer_only, **details)


@dataclass(frozen=True)
class _Look:
    sample: Sample
    found: FoundColumns
    origin: str

    def details(self) -> dict[str, Any]:
        named, form = self.found.named, self.found.form
        prompt, chosen, rejected = named.get("prompt"), named["chosen"], named["rejected"]
        prompt_kind = self._column_kind(prompt) if prompt else "null"
        many = form == "pairs" and self._is_list(rejected)
        answer_kind: CellKind = "text" if form == "ranked" else self._answer_kind(chosen, chosen if many else rejected)
        return {
            "prompt": prompt,
            "chosen": chosen,
            "rejected": rejected,
            "prompt_kind": prompt_kind,
            "answer_kind": answer_kind,
            "form": form,
            "repeats_prompt": form == "pairs"
            and not many
            and answer_kind == prompt_kind == "text"
            and self._answers_repeat_prompt(),
            "system": named.get("system"),
            "context": self.found.context,
            "history": named.get("history"),
            "unused": self.found.unused,
            "tools": named.get("tools"),
            "winner": named.get("winner"),
            "sign": winner_sign(self.sample, self.found, self.origin) if "winner" in named else None,
            "scores": self.found.scores,
            "list_scores": self.found.list_scores,
            "answers_scored": form == "ranked" and self.found.list_scores is None and self._answers_scored(chosen),
            "many_rejected": many,
        }

    def name(self, details: Mapping[str, Any]) -> tuple[str, str]:
        """The layout's name and what it means, for the screen."""
        if details["form"] == "ranked":
            by = details["list_scores"]
            if by or details["answers_scored"]:
                order = f"the best has {f'the highest of {by}' if by else 'the highest score (or rank 1)'}"
            else:
                order = "the first is the best"
            return "ranked", f"a list of answers a row: {order}, and each worse answer makes a pair"
        if details["form"] == "winner":
            if details["winner"] is None:
                return "winner", f"two answers a row; the higher of {' and '.join(details['scores'])} is chosen"
            return "winner", f"two answers a row, and {details['winner']} says which is better ({details['sign']})"
        name, meaning = self._pairs_name(details)
        if details["system"] not in (None, "system") and name != "orca":
            meaning += f"; {details['system']} is the system message"
        if details["many_rejected"]:
            meaning += "; several rejected answers a row: each makes a pair"
        return name, meaning

    def _pairs_name(self, details: Mapping[str, Any]) -> tuple[str, str]:
        prompt_kind, answer_kind = details["prompt_kind"], details["answer_kind"]
        if answer_kind == "dialogue":
            return (
                "hh",
                "chosen and rejected are whole Human/Assistant texts: the text after the last Assistant: is the answer",
            )
        if answer_kind == "text":
            if details["repeats_prompt"]:
                return "text_with_prompt", "every answer begins with its prompt, which is removed"
            if prompt_kind == "dialogue":
                return "hh_prompt", "the prompt is a Human/Assistant text, the answers are text"
            if prompt_kind == "turns":
                return "messages", "the prompt is a list of messages, the answers are text"
            if details["system"]:
                return "orca", "system, question and both answers are text; they become a conversation"
            if details["prompt"] == "instruction" and details["context"] == ("input",):
                return "alpaca", "instruction, its input (put below it) and both answers are text"
            return "text", "prompt, chosen and rejected are plain text"
        if prompt_kind == "null":
            return (
                "implicit_messages",
                "chosen and rejected are message lists: their shared messages are the prompt",
            )
        chosen = [row.get(details["chosen"]) for row in self.sample.rows.values()]
        if any(isinstance(cell, Mapping) and "from" in cell for cell in chosen):
            return "sharegpt", "conversations with from/value, and one message an answer"
        if prompt_kind == "turns":
            return "messages", "prompt, chosen and rejected are lists of messages"
        if any(isinstance(cell, list) and len(cell) > 1 for cell in chosen):
            return (
                "ultrafeedback",
                "the answers repeat the prompt as messages, which is checked against the prompt column",
            )
        return "messages", "the prompt is text, the answers are messages"

    def _is_list(self, column: str) -> bool:
        """True if most cells are lists of answers, rather than lists of messages of one answer."""
        cells = [row.get(column) for row in self.sample.rows.values()]
        lists = [cell for cell in cells if isinstance(cell, list) and cell and kind_of(cell) != "turns"]
        return 2 * len(lists) > len(cells)

    def _answers_scored(self, column: str) -> bool:
        cells = [row.get(column) for row in self.sample.rows.values()]
        return any(answer_score(answer) is not None for cell in cells if isinstance(cell, list) for answer in cell)

    def _answer_kind(self, chosen: str, rejected: str) -> CellKind:
        kinds = {column: self._column_kind(column) for column in (chosen, rejected)}
        if len(set(kinds.values())) > 1 and "turns" in kinds.values():
            if not any(self._holds_messages(column) for column in kinds):
                return "text"  # messages that are only spelt out, and only on one side, are answers in JSON
            raise DataError(
                f"{self.origin}: {chosen} holds {_words(kinds[chosen])}, but {rejected} holds "
                f"{_words(kinds[rejected])}. Rewrite one of the columns: both answers must have the same form."
            )
        if kinds[chosen] == kinds[rejected]:
            kind = kinds[chosen]
        else:
            kind = "text"
        if kind == "text" and "prompt" not in self.found.named:
            return self._dialogue_or_error(chosen, rejected)
        return kind

    def _holds_messages(self, column: str) -> bool:
        return any(kind_of(row.get(column)) == "turns" for row in self.sample.rows.values())

    def _dialogue_or_error(self, chosen: str, rejected: str) -> CellKind:
        rows = self.sample.rows
        if 2 * sum(kind_of(row.get(chosen)) == "dialogue" for row in rows.values()) >= len(rows):
            return "dialogue"
        number, row = next(iter(rows.items()))
        raise DataError(
            f"{self.origin} has {chosen} and {rejected} as plain text, but no prompt column and no "
            rf"'\n\nHuman:' … '\n\nAssistant:' markers (row {number}: {excerpt(row.get(chosen))!r}). Splitting both "
            "texts where their letters begin to differ would cut into the answers. Name the prompt column with "
            f"data.columns.prompt=NAME (columns: {', '.join(self.sample.columns)})."
        )

    def _column_kind(self, column: str) -> CellKind:
        """The one kind of a column. Nulls and numbers are dropped later, row by row; text among messages is refused."""
        rows_of: dict[CellKind, list[int]] = {}
        for number, row in self.sample.rows.items():
            rows_of.setdefault(kind_of(row.get(column)), []).append(number)
        kinds: list[CellKind] = [kind for kind in rows_of if kind not in ("null", "other")]
        if not kinds:
            number, row = next(iter(self.sample.rows.items()))
            raise DataError(
                f"{self.origin}: column {column!r} holds neither text nor messages in any of {len(self.sample.rows)} "
                f"rows looked at (row {number}: {excerpt(row.get(column))!r}). Name another column with "
                f"data.columns.*; columns: {', '.join(self.sample.columns)}."
            )
        if len(kinds) == 1:
            return "turns" if kinds[0] == "encoded" else kinds[0]
        for kind in ("encoded", "dialogue"):  # a few damaged cells, or cells without markers, are dropped row by row
            if kind in kinds and 2 * len(rows_of[kind]) > len(self.sample.rows) and "turns" not in kinds:
                return "turns" if kind == "encoded" else "dialogue"
        if "turns" in kinds:
            other = next(kind for kind in kinds if kind != "turns")
            raise DataError(
                f"{self.origin}: the rows differ in format. Column {column!r} holds messages in row "
                f"{rows_of['turns'][0]} and text in row {rows_of[other][0]}. Convert all rows to one format, or put "
                "the two kinds into two files."
            )
        return "text"

    def _answers_repeat_prompt(self) -> bool:
        """True if every sampled answer begins with its prompt, which must be removed: else it would be trained on."""
        named = self.found.named

        def repeats(row: Row) -> bool:
            texts = [row.get(named[role]) for role in ("prompt", "chosen", "rejected")]
            prompt, *answers = [text.strip() for text in texts if isinstance(text, str)] or [""]
            if len(answers) < 2:
                return True  # a null: no evidence either way
            return bool(prompt) and all(answer.startswith(prompt) for answer in answers)

        return all(repeats(row) for row in self.sample.rows.values())


def answer_score(answer: Any) -> float | None:
    """The score of an answer of a ranking, higher is better; None if it has none."""
    if not isinstance(answer, Mapping):
        return None
    rank = finite(answer.get("rank"))
    if rank is not None:
        return -rank
    return next((score for key in SCORE_KEYS if (score := finite(answer.get(key))) is not None), None)


def _words(kind: CellKind) -> str:
    return "messages" if kind == "turns" else "text"
