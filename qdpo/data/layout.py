"""Which columns of a data set hold what, found from the content of many rows and said aloud."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qdpo.data.turns import Kind, excerpt, kind_of
from qdpo.errors import ConfigError, DataError

Row = Mapping[str, Any]

SAMPLED_ROWS = 200
ALIASES = {  # in order of preference; from data sets in wide use
    "prompt": ("prompt", "question", "instruction", "conversations", "query"),
    "chosen": ("chosen", "chosen_response", "response_chosen", "response_j", "chatgpt"),
    "rejected": ("rejected", "rejected_response", "response_rejected", "response_k", "llama2-13b-chat"),
    "system": ("system", "system_prompt"),
}
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
PICTURES = {"image", "images", "audio", "video", "videos"}
SFT_COLUMNS = {"messages", "text", "completion", "response", "output", "answer", "conversations", "conversation"}


@dataclass(frozen=True)
class Layout:
    """How to turn a row of one data set into a pair; column names, and what the cells hold."""

    name: str
    why: str
    """One line for the screen: what was found, and what follows from it."""
    prompt: str | None
    chosen: str
    rejected: str
    prompt_kind: Kind = "null"
    answer_kind: Kind = "text"
    repeats_prompt: bool = False
    """Plain-text answers begin with the text of the prompt column."""
    system: str | None = None
    context: str | None = None
    """Alpaca's `input`: text that belongs below the instruction."""
    scores: tuple[str, str] | None = None

    @property
    def is_chat(self) -> bool:
        """The rows say who speaks. Otherwise they are text to be continued, and a template may give them roles."""
        return self.system is not None or self.answer_kind != "text" or self.prompt_kind in ("turns", "dialogue")


@dataclass(frozen=True)
class _Sample:
    rows: dict[int, Row]
    found: list[str]
    origin: str


def detect_layout(rows: Sequence[Row], columns: Mapping[str, str], origin: str) -> Layout:
    """The layout of a data set, from up to 200 rows spread over it.

    `columns` is the user's `data.columns.*`; `origin` names the data in messages.
    Raises: DataError if no layout fits or rows disagree; ConfigError for an unknown key in `columns`.
    """
    if not len(rows):
        raise DataError(f"{origin} holds no rows. Check data.path, data.split and data.limit.")
    sample = _take_sample(rows, origin)
    named = _name_columns(sample, columns)
    prompt, chosen, rejected = named.get("prompt"), named["chosen"], named["rejected"]
    prompt_kind = _column_kind(sample, prompt) if prompt else "null"
    answer_kind = _answer_kind(sample, prompt, chosen, rejected)
    found: dict[str, Any] = {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "prompt_kind": prompt_kind,
        "answer_kind": answer_kind,
        "repeats_prompt": answer_kind == prompt_kind == "text" and _answers_repeat_prompt(sample, named),
        "system": named.get("system"),
        "context": "input" if prompt == "instruction" and "input" in sample.found else None,
        "scores": next((pair for pair in SCORES if set(pair) <= set(sample.found)), None),
    }
    name, meaning = _name(found, sample)
    counted = f"{len(sample.rows)} of {len(rows)} rows looked at"
    used = ", ".join(f"{role}={column}" for role, column in named.items())
    return Layout(name=name, why=f"{meaning} ({used}; {counted})", **found)


def _take_sample(rows: Sequence[Row], origin: str) -> _Sample:
    last, count = len(rows) - 1, min(len(rows), SAMPLED_ROWS)
    indices = sorted({round(step * last / max(count - 1, 1)) for step in range(count)})
    picked = {index + 1: rows[index] for index in indices}
    found = list(dict.fromkeys(column for row in picked.values() for column in row))
    return _Sample(picked, found, origin)


def _name_columns(sample: _Sample, columns: Mapping[str, str]) -> dict[str, str]:
    """Column of each role: the user's word first, then a known name. `chosen` and `rejected` are always there."""
    unknown = sorted(set(columns) - set(ALIASES))
    if unknown:
        raise ConfigError(f"Unknown setting data.columns.{unknown[0]}. It can be one of: {', '.join(ALIASES)}.")
    for role, column in columns.items():
        if column not in sample.found:
            raise DataError(
                f"data.columns.{role}={column} names a column that {sample.origin} does not "
                f"have.{_near(column, sample)} It has: {_listed(sample.found)}."
            )
    pictures = sorted(PICTURES & set(sample.found))
    if pictures:
        raise DataError(
            f"{sample.origin} has the column {pictures[0]!r}: pairs with pictures or sound. qdpo trains on text only; "
            "use a text data set, or remove that column if the text makes sense without it."
        )
    named = {}
    for role, aliases in ALIASES.items():
        known = [columns[role]] if role in columns else [alias for alias in aliases if alias in sample.found]
        if known:
            named[role] = known[0]
    missing = [role for role in ("chosen", "rejected") if role not in named]
    if missing:
        raise _no_pairs(sample, missing)
    return named


def _no_pairs(sample: _Sample, missing: list[str]) -> DataError:
    found = set(sample.found)
    if "label" in found and len(missing) == 2:
        return DataError(
            f"{sample.origin} has single answers with a label (columns {_listed(sample.found)}), not pairs. DPO needs "
            "two answers to one prompt; KTO trains on labels (TRL's KTOTrainer). Or join a good and a bad answer."
        )
    if len(missing) == 2 and found & SFT_COLUMNS:
        return DataError(
            f"{sample.origin} has one answer a row (columns {_listed(sample.found)}): data for supervised fine-tuning "
            "(TRL's SFTTrainer). DPO needs `chosen` and `rejected`; if two other columns hold them, say which with "
            "data.columns.chosen=NAME data.columns.rejected=NAME."
        )
    return DataError(
        f"{sample.origin} has no column {' and no column '.join(map(repr, missing))}; it has: {_listed(sample.found)}."
        f"{_near(missing[0], sample)} Map the columns yourself: data.columns.{missing[0]}=NAME."
    )


def _answer_kind(sample: _Sample, prompt: str | None, chosen: str, rejected: str) -> Kind:
    kinds = {column: _column_kind(sample, column) for column in (chosen, rejected)}
    if len(set(kinds.values())) > 1 and "turns" in kinds.values():
        raise DataError(
            f"{sample.origin}: {chosen} holds {_words(kinds[chosen])}, but {rejected} holds {_words(kinds[rejected])}. "
            "Both answers must have the same form; rewrite one of the columns."
        )
    if kinds[chosen] == kinds[rejected]:
        kind = kinds[chosen]
    else:
        kind = "text"
    if kind == "text" and prompt is None:
        dialogues = sum(kind_of(row.get(chosen)) == "dialogue" for row in sample.rows.values())
        if 2 * dialogues >= len(sample.rows):
            return "dialogue"
        number, row = next(iter(sample.rows.items()))
        raise DataError(
            f"{sample.origin} has {chosen} and {rejected} as plain text, but no prompt column and no "
            rf"'\n\nHuman:' … '\n\nAssistant:' markers (row {number}: {excerpt(row.get(chosen))!r}). Cutting both "
            "texts where their letters begin to differ would cut into the answers. Name the prompt with "
            f"data.columns.prompt=NAME (columns: {_listed(sample.found)})."
        )
    return kind


def _column_kind(sample: _Sample, column: str) -> Kind:
    """The one kind of a column. Nulls and numbers are left to be rejected row by row; text among messages is not."""
    rows_of: dict[Kind, list[int]] = {}
    for number, row in sample.rows.items():
        rows_of.setdefault(kind_of(row.get(column)), []).append(number)
    kinds: list[Kind] = [kind for kind in rows_of if kind not in ("null", "other")]
    if not kinds:
        value = next(iter(sample.rows.values())).get(column)
        raise DataError(
            f"{sample.origin}: column {column!r} holds neither text nor messages in any of {len(sample.rows)} rows "
            f"looked at (row 1: {excerpt(value)!r}). Name another column with data.columns.*; columns: "
            f"{_listed(sample.found)}."
        )
    if len(kinds) == 1:
        return "turns" if kinds[0] == "encoded" else kinds[0]
    if "turns" in kinds:
        other = next(kind for kind in kinds if kind != "turns")
        raise DataError(
            f"{sample.origin}: the rows differ in format. Column {column!r} holds messages in row "
            f"{rows_of['turns'][0]} and text in row {rows_of[other][0]}. Bring all rows into one format, or keep the "
            "two kinds in two files."
        )
    return "text"


def _answers_repeat_prompt(sample: _Sample, named: Mapping[str, str]) -> bool:
    """True if every answer looked at begins with its prompt: to leave it there would train on the prompt twice."""

    def repeats(row: Row) -> bool:
        texts = [row.get(named[role]) for role in ("prompt", "chosen", "rejected")]
        prompt, *answers = [text.strip() for text in texts if isinstance(text, str)] or [""]
        if len(answers) < 2:
            return True  # a null: no evidence either way
        return bool(prompt) and all(answer.startswith(prompt) for answer in answers)

    return all(repeats(row) for row in sample.rows.values())


def _name(found: Mapping[str, Any], sample: _Sample) -> tuple[str, str]:
    """The layout's name and what it means, for the screen."""
    prompt_kind, answer_kind = found["prompt_kind"], found["answer_kind"]
    if answer_kind == "dialogue":
        return (
            "hh",
            "chosen and rejected are whole Human/Assistant texts: what follows the last Assistant: is the answer",
        )
    if answer_kind == "text":
        if found["repeats_prompt"]:
            return "text_with_prompt", "every answer begins with its prompt, which is taken off"
        if prompt_kind == "dialogue":
            return "hh_prompt", "the prompt is a Human/Assistant text, the answers are text"
        if prompt_kind == "turns":
            return "messages", "the prompt is a list of messages, the answers are text"
        if found["system"]:
            return "orca", "system, question and both answers are text; they become a conversation"
        return "text", "prompt, chosen and rejected are plain text"
    if prompt_kind == "null":
        return "implicit_messages", "chosen and rejected are message lists: the prompt is the messages that they share"
    chosen = [row.get(found["chosen"]) for row in sample.rows.values()]
    if any(isinstance(cell, Mapping) and "from" in cell for cell in chosen):
        return "sharegpt", "conversations with from/value, and one message an answer"
    if prompt_kind == "turns":
        return "messages", "prompt, chosen and rejected are lists of messages"
    if any(isinstance(cell, list) and len(cell) > 1 for cell in chosen):
        return "ultrafeedback", "the answers repeat the prompt as messages: it is checked against the prompt column"
    return "messages", "the prompt is text, the answers are messages"


def _words(kind: Kind) -> str:
    return "messages" if kind == "turns" else "text"


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(columns)


def _near(name: str, sample: _Sample) -> str:
    near = difflib.get_close_matches(name, sample.found, n=3)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
