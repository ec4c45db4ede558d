"""Which of a row's answers is the better one, and which the worse: by its column, a verdict, scores or a ranking."""

from collections.abc import Iterator, Mapping
from typing import Any

from qdpo.data.columns import first_wins
from qdpo.data.layout import SCORE_KEYS, TEXT_KEYS, Layout, Row
from qdpo.data.turns import RowProblem, excerpt, read_text

RANKED_REJECTED = "\0rejected"
"""The second column that a ranking is given, whose answers share one."""


def two_answers(row: Row, layout: Layout) -> Iterator[Row]:
    """The row with one answer in each of the two columns; several rows where one answer beats several others.

    Raises: RowProblem where no answer is better.
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
        raise RowProblem("one_answer", f"{layout.chosen} holds no two answers: {excerpt(cells)}")
    texts = [_text_of(cell, layout.chosen) for cell in cells]
    scores: Any = row.get(layout.list_scores) if layout.list_scores else [_score_of(cell) for cell in cells]
    if not isinstance(scores, list) or len(scores) != len(texts) or any(score is None for score in scores):
        if layout.list_scores:
            raise RowProblem("null_field", f"{layout.list_scores} has no score for each of {len(texts)} answers")
        return texts[0], texts[1:]
    best = max(range(len(texts)), key=lambda place: (float(scores[place]), -place))
    worse = [text for text, score in zip(texts, scores, strict=True) if float(score) < float(scores[best])]
    if not worse:
        raise RowProblem("tie", f"all {len(texts)} answers have the score {float(scores[best]):g}")
    return texts[best], worse


def _text_of(cell: Any, column: str) -> str:
    if isinstance(cell, Mapping):
        cell = next((cell[key] for key in TEXT_KEYS if cell.get(key) is not None), None)
    return read_text(cell, column)


def _score_of(cell: Any) -> float | None:
    if not isinstance(cell, Mapping):
        return None
    if isinstance(cell.get("rank"), int | float):
        return -float(cell["rank"])
    score = next((cell[key] for key in SCORE_KEYS if cell.get(key) is not None), None)
    try:
        return None if score is None else float(score)
    except (TypeError, ValueError):
        return None


def scores_disagree(row: Row, layout: Layout) -> bool:
    """True where the score columns rate the rejected answer above the chosen one."""
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
    cells = [row.get(column) for column in layout.scores]
    try:
        chosen, rejected = (float(cell) for cell in cells if cell not in (None, ""))
    except (TypeError, ValueError):  # fewer than two numbers: this row was not scored
        return None
    return chosen, rejected
