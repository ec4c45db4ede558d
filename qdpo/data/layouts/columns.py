"""Finds the columns of prompt, answers, winner, scores, system and tools: by name, or as the user says."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from qdpo.data.layouts.turns import excerpt
from qdpo.data.read.files import Sample
from qdpo.errors import ConfigError, DataError

Form = Literal["pairs", "winner", "ranked"]
"""A better and a worse column; two columns and one that says which won; or a list of answers, best first."""

PROMPTS = (
    "prompt",
    "question",
    "instruction",
    "conversations",
    "conversation",
    "query",
    "context",
    "history",
    "input",
    "messages",
)
PAIRS = (  # better and worse; from widely used data sets
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("response_j", "response_k"),
    ("preferred", "dispreferred"),
    ("preferred_output", "non_preferred_output"),
    ("preferred_response", "dispreferred_response"),
    ("chosen_answer", "rejected_answer"),
    ("chatgpt", "llama2-13b-chat"),
    ("response", "rejected_response"),  # ms-swift
)
CONTESTS = (
    ("response_a", "response_b"),
    ("response_0", "response_1"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("answer_a", "answer_b"),
    ("answer_0", "answer_1"),
    ("output_a", "output_b"),
    ("output_1", "output_2"),
    ("completion_a", "completion_b"),
    ("conversation_a", "conversation_b"),
    ("human_ref_A", "human_ref_B"),
)
WINNERS = ("winner", "better_response_id", "preference", "overall_preference", "preferred", "choice", "label", "labels")
LISTS = ("output", "outputs", "responses", "answers", "completions")
LIST_SCORES = ("scores", "ratings", "rewards")
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
    ("chosen-rating", "rejected-rating"),
)
CONTEST_SCORES = (
    ("score_a", "score_b"),
    ("score_0", "score_1"),
    ("score_1", "score_2"),
    ("score_A", "score_B"),
    ("winner_model_a", "winner_model_b"),  # LMSYS: 1 for the winner, 0 for the other; a tie has 0 for both
)
ROLES = ("prompt", "chosen", "rejected", "system", "winner", "tools", "context", "history", "ignore")
SEVERAL = ("context", "ignore")
"""Roles that may name several columns, as in a+b."""
PICTURES = {"image", "images", "audio", "audios", "video", "videos"}
SFT_COLUMNS = {"messages", "text", "completion", "response", "output", "answer", "conversations", "conversation"}


@dataclass(frozen=True)
class Unused:
    """A column with text that is not used: the number of rows looked at, and of those with text in it."""

    column: str
    filled: int
    rows: int
    example: str


@dataclass(frozen=True, kw_only=True)
class FoundColumns:
    """A data set's columns: `named` maps a role to its column; in a contest, the answers are chosen and rejected."""

    form: Form
    named: dict[str, str]
    scores: tuple[str, str] | None = None
    list_scores: str | None = None
    columns: Sequence[str] = field(default_factory=list)
    context: tuple[str, ...] = ()
    """Columns whose text belongs below the prompt."""
    unused: tuple[Unused, ...] = ()


def find_columns(sample: Sample, columns: Mapping[str, str], form: str, origin: str) -> FoundColumns:
    """The column of each role: as the user says, else by known names.

    Raises: DataError if no form or several forms fit, with what was found; ConfigError for an unknown role.
    """
    unknown = sorted(set(columns) - set(ROLES))
    if unknown:
        raise ConfigError(f"Unknown setting data.columns.{unknown[0]}. Known names are: {', '.join(ROLES)}.")
    for role, column in [(key, name) for key, given in columns.items() for name in _names(key, given, sample)]:
        if column not in sample.columns:
            raise DataError(
                f"data.columns.{role}={column} names a column that {origin} does not "
                f"have.{_near(column, sample)} Its columns are: {_listed(sample.columns)}."
            )
    _refuse_pictures(sample, origin)
    forms = _forms(sample, columns, origin)
    if form != "auto":
        forms = [found for found in forms if found.form == form]
        if not forms:
            raise DataError(
                f"data.format={form} does not fit the columns of {origin}: {_listed(sample.columns)}. Name the columns "
                "with data.columns.*, or leave data.format=auto."
            )
    if not forms:
        raise _no_pairs(sample, columns, origin)
    if len(forms) > 1:
        raise _several(forms, origin)
    named = dict(forms[0].named)
    tools = columns.get("tools", "tools")
    if tools in sample.columns and tools not in named.values():
        named["tools"] = tools
    rated = CONTEST_SCORES if forms[0].form == "winner" else SCORES
    scores = next((pair for pair in rated if set(pair) <= set(sample.columns)), None)
    return replace(forms[0], named=named, scores=scores, columns=sample.columns)


def names_in(given: str | None, sample: Sample) -> list[str]:
    """The columns that a setting such as a+b names; a name may itself have a plus sign."""
    return [] if not given else [given] if given in sample.columns else given.split("+")


def _names(role: str, given: str, sample: Sample) -> list[str]:
    return names_in(given, sample) if role in SEVERAL else [given]


def _forms(sample: Sample, columns: Mapping[str, str], origin: str) -> list[FoundColumns]:
    """All ways to read the columns as preferences."""
    here, found = set(sample.columns), list[FoundColumns]()
    if "winner" in columns or not {"chosen", "rejected"} & set(columns):
        winners = [columns["winner"]] if "winner" in columns else [name for name in WINNERS if name in here]
        scored = [pair for pair in CONTEST_SCORES if set(pair) <= here]
        given = (columns.get("chosen"), columns.get("rejected"))
        for one, other in [given] if all(given) else [pair for pair in CONTESTS if set(pair) <= here]:
            named = [name for name in winners if name not in (one, other)]
            if "winner" not in columns and {"better_response_id", "safer_response_id"} <= here:
                raise DataError(
                    f"{origin} says twice which answer won: better_response_id (more helpful) and safer_response_id "
                    "(safer). Choose data.columns.winner=better_response_id or data.columns.winner=safer_response_id."
                )
            winner = next(iter(named), None)
            if winner is not None or scored:
                sides = {"chosen": str(one), "rejected": str(other)}
                found.append(FoundColumns(form="winner", named=sides | ({"winner": winner} if winner else {})))
    if "winner" not in columns:
        found += [
            FoundColumns(form="pairs", named={"chosen": one, "rejected": other}) for one, other in _pairs(here, columns)
        ]
    lists = [name for name in LISTS if name in here and _holds_lists(sample, name)]
    # Next to a better and a worse answer, a list holds the answers that these were drawn from.
    if lists and not found and not columns.keys() & {"chosen", "rejected", "winner"}:
        scores = next((name for name in LIST_SCORES if name in here), None)
        found.append(FoundColumns(form="ranked", named={"chosen": lists[0], "rejected": lists[0]}, list_scores=scores))
    return found


def _pairs(here: set[str], columns: Mapping[str, str]) -> list[tuple[str, str]]:
    if {"chosen", "rejected"} <= set(columns):
        return [(columns["chosen"], columns["rejected"])]
    if "chosen" in columns:
        return [(columns["chosen"], other) for _one, other in PAIRS if other in here][:1]
    if "rejected" in columns:
        return [(one, columns["rejected"]) for one, _other in PAIRS if one in here][:1]
    return [pair for pair in PAIRS if set(pair) <= here]


def _holds_lists(sample: Sample, column: str) -> bool:
    cells = [row.get(column) for row in sample.rows.values()]
    lists = sum(isinstance(cell, list) and len(cell) > 1 and not _is_turns(cell) for cell in cells)
    return 2 * lists > len(cells)


def _is_turns(cell: list[Any]) -> bool:
    return all(isinstance(item, Mapping) and ("role" in item or "from" in item) for item in cell)


def _refuse_pictures(sample: Sample, origin: str) -> None:
    pictures = sorted(PICTURES & set(sample.columns))
    if pictures:
        raise DataError(
            f"{origin} has the column{'s' if len(pictures) > 1 else ''} {', '.join(map(repr, pictures))}: pairs with "
            "pictures or sound. qdpo trains on text only today (image pairs are planned). Use a text data set, or "
            "remove that column if the text makes sense without it."
        )


def _several(forms: list[FoundColumns], origin: str) -> DataError:
    ways = "; ".join(
        f"{found.form} ({', '.join(f'{role}={column}' for role, column in found.named.items())})" for found in forms
    )
    forms_differ = len({found.form for found in forms}) == len(forms)
    how = "data.format=…" if forms_differ else "data.columns.chosen=… and data.columns.rejected=…"
    return DataError(f"{origin} can be read in several ways: {ways}. Choose one with {how}.")


def _no_pairs(sample: Sample, columns: Mapping[str, str], origin: str) -> DataError:
    found = set(sample.columns)
    if sample.count == 1 and len(sample.rows) == 1:
        row = next(iter(sample.rows.values()))
        whole = [name for name, cell in row.items() if isinstance(cell, list) and cell and isinstance(cell[0], dict)]
        whole = [name for name in whole if not _is_turns(row[name])]
        if whole:
            return DataError(
                f"{origin} is one object whose {whole[0]!r} holds {len(row[whole[0]])} rows. qdpo reads an array of "
                f"rows, or one row a line: `jq -c '.{whole[0]}[]' FILE > rows.jsonl`."
            )
    has = [role for number, role in enumerate(("chosen", "rejected")) if found & {pair[number] for pair in PAIRS}]
    missing = [role for role in ("chosen", "rejected") if role not in has and role not in columns]
    if "label" in found and len(missing) == 2:
        return DataError(
            f"{origin} has single answers with a label (columns {_listed(sample.columns)}), not pairs. DPO needs two "
            "answers to a prompt. Join a good and a bad answer to each, or train on labels with KTO (TRL's KTOTrainer)."
        )
    if len(missing) == 2 and found & SFT_COLUMNS:
        return DataError(
            f"{origin} has one answer a row (columns {_listed(sample.columns)}): data for supervised fine-tuning "
            "(TRL's SFTTrainer). DPO needs `chosen` and `rejected`. If other columns hold them, name these with "
            "data.columns.chosen=NAME data.columns.rejected=NAME."
        )
    missing = missing or ["chosen", "rejected"]
    return DataError(
        f"{origin} has no column {' and no column '.join(map(repr, missing))}; its columns are: "
        f"{_listed(sample.columns)}.{_near(missing[0], sample)} Name the column with data.columns.{missing[0]}=NAME."
    )


def _near(name: str, sample: Sample) -> str:
    near = difflib.get_close_matches(name, sample.columns, n=3)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _listed(columns: Iterable[str]) -> str:
    return ", ".join(map(str, columns))


Sign = Literal["zero is first", "one is first", "negative is first", "names"]


def winner_sign(sample: Sample, found: FoundColumns, origin: str) -> Sign:
    """The convention of the winner column for which of two answers is better. Raises: DataError if it is unclear."""
    column, one = found.named["winner"], found.named["chosen"]
    cells = [row.get(column) for row in sample.rows.values()]
    values = {cell for cell in map(finite, cells) if cell is not None}
    if not values or (values == {1} and one != "human_ref_A"):  # 0/1 or 1/2? The columns' names may tell
        names = {side_named(cell, found.named["chosen"], found.named["rejected"]) for cell in cells}
        if names & {"first", "second"}:
            return "names"
    elif min(values) < 0:
        return "negative is first"  # HelpSteer3: −3 … 3, the first answer much better … much worse
    elif one == "human_ref_A":
        return "one is first"  # Stanford Human Preferences: 1 where A is better
    elif values <= {0, 1}:
        return "zero is first"
    elif values <= {1, 2}:
        return "one is first"
    shown = ", ".join(sorted({excerpt(cell, 20) for cell in cells})[:5])
    shown += " only, which may mean 0/1 or 1/2" if values == {1} else ""
    raise DataError(
        f"{origin}: column {column!r} should say which of {one} and {found.named['rejected']} is better, but holds "
        f"{shown}. Use 0/1, 1/2, a/b, the names of the two columns, or a number that is negative if the first is "
        "better."
    )


def first_wins(cell: Any, sign: Sign, one: str, other: str) -> bool | None:
    """True if the first of two answers won; None for a tie, an empty cell or a verdict for neither."""
    if sign == "names":
        side = side_named(cell, one, other)
        return None if side is None else side == "first"
    value = finite(cell)
    if value is None:
        return None
    if sign == "negative is first":
        return value < 0 if value else None
    first, second = {"zero is first": (0, 1), "one is first": (1, 0 if one == "human_ref_A" else 2)}[sign]
    return value == first if value in (first, second) else None


def side_named(cell: Any, one: str, other: str) -> Literal["first", "second"] | None:
    """Map a word such as `model_a`, `B` or `response_1` to one of two columns; None if it names neither."""
    word = str(cell).strip().lower()
    for side, column in (("first", one), ("second", other)):
        ending = column.lower()[-1]
        if word in (column.lower(), ending, f"model_{ending}", f"assistant_{ending}", f"answer_{ending}"):
            return side  # type: ignore[return-value]
    return None


def finite(cell: Any) -> float | None:
    """A cell as a number; None if it is empty, a word or not finite (NaN marks a missing value in a table)."""
    try:
        value = float(cell)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None
