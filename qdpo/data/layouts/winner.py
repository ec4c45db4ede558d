"""Finds a row's better and worse answer: by column, by a verdict, by scores or by a ranking."""

from collections.abc import Iterator, Mapping
from typing import Any

from qdpo.data.layouts.columns import finite, first_wins
from qdpo.data.layouts.layout import TEXT_KEYS, Layout, answer_score
from qdpo.data.layouts.turns import RowProblem, excerpt, read_text
from qdpo.data.read.progress import Row

RANKED_REJECTED = "\0rejected"
"""A second column for the rejected answer of a ranking, whose answers share one column."""


def two_answers(row: Row, layout: Layout) -> Iterator[Row]:
    """The row with one answer in each of the two columns; several rows if one answer beats several others.

    Raises: RowProblem if no answer is better.
    """
    _refuse_tie(row, layout)
    if layout.form == "ranked":
        best, worse = _ranked(row, layout)
        yield from ({**row, layout.chosen: best, RANKED_REJECTED: text} for text in worse)
    elif layout.form == "winner":
        one, other = row.get(layout.chosen), row.get(layout.rejected)
        chosen, rejected = (one, other) if _first_wins(row, layout) else (other, one)
        yield {**row, layout.chosen: chosen, layout.rejected: rejected}
    elif layout.many_rejected:
        cell = row.get(layout.rejected)
        if not cell:
            raise RowProblem("null_field", f"{layout.rejected} is empty")
        yield from ({**row, layout.rejected: text} for text in (cell if isinstance(cell, list) else [cell]))
    else:
        yield row


def _first_wins(row: Row, layout: Layout) -> bool:
    if layout.winner is None:
        scores = _scores(row, layout)
        if scores is None:
            raise RowProblem("null_field", f"{' or '.join(layout.scores or ())} is not a number")
        return scores[0] > scores[1]
    assert layout.sign is not None
    first = first_wins(row.get(layout.winner), layout.sign, layout.chosen, layout.rejected)
    if first is None:
        raise RowProblem("tie", f"{layout.winner} is {row.get(layout.winner)!r}: neither answer won")
    return first


def _ranked(row: Row, layout: Layout) -> tuple[str, list[str]]:
    cells = row.get(layout.chosen)
    if not isinstance(cells, list):
        read_text(cells, layout.chosen)  # null, or a number
    if not isinstance(cells, list) or len(cells) < 2:
        raise RowProblem("one_answer", f"{layout.chosen} has fewer than two answers: {excerpt(cells)}")
    texts = [_text_of(cell, layout.chosen) for cell in cells]
    if layout.list_scores is None and not layout.answers_scored:
        return texts[0], texts[1:]
    scores = _list_scores(row, cells, layout)
    best = scores.index(max(scores))
    worse = [text for text, score in zip(texts, scores, strict=True) if score < scores[best]]
    if not worse:
        raise RowProblem("tie", f"all {len(texts)} answers have the score {scores[best]:g}")
    return texts[best], worse


def _list_scores(row: Row, answers: list[Any], layout: Layout) -> list[float]:
    """The score of each answer of a ranking; higher is better."""
    if layout.list_scores is None:
        column, found = layout.chosen, [answer_score(answer) for answer in answers]
    else:
        column, cells = layout.list_scores, row.get(layout.list_scores)
        found = [finite(cell) for cell in cells] if isinstance(cells, list) else []
    scores = [score for score in found if score is not None]
    if len(scores) != len(answers) or len(found) != len(answers):
        raise RowProblem("null_field", f"{column} does not have a score for each of {len(answers)} answers")
    return scores


def _text_of(cell: Any, column: str) -> str:
    if isinstance(cell, Mapping):
        cell = next((cell[key] for key in TEXT_KEYS if cell.get(key) is not None), None)
    return read_text(cell, column)


def scores_disagree(row: Row, layout: Layout) -> bool:
    """True if the score columns rate the rejected answer above the chosen one."""
    scores = _scores(row, layout) if layout.form == "pairs" else None
    return scores is not None and scores[0] < scores[1]


def _refuse_tie(row: Row, layout: Layout) -> None:
    scores = _scores(row, layout) if layout.winner is None else None
    if scores is not None and layout.scores is not None and scores[0] == scores[1]:
        raise RowProblem("tie", f"{layout.scores[0]} and {layout.scores[1]} are both {scores[0]:g}")
    if row.get("status") == "tie":
        raise RowProblem("tie", "the column status says 'tie'")


def _scores(row: Mapping[str, Any], layout: Layout) -> tuple[float, float] | None:
    if layout.scores is None:
        return None
    chosen, rejected = (finite(row.get(column)) for column in layout.scores)
    return None if chosen is None or rejected is None else (chosen, rejected)  # None: this row was not scored
