"""One row to one preference pair, or to a named reason why it cannot be used.

A pair is one decision: one prompt, and two different final answers of the assistant.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qdpo.data.layout import Layout as Layout
from qdpo.data.layout import Row
from qdpo.data.layout import detect_layout as detect_layout
from qdpo.data.turns import Message as Message
from qdpo.data.turns import RowProblem, excerpt, read_dialogue, read_text, read_turns, same_turn


@dataclass(frozen=True)
class Pair:
    """A prompt and two answers to it."""

    prompt: list[Message]
    """The turns before the answer. Where `is_chat` is False: one user turn that holds the prompt text as it was."""
    chosen: str
    rejected: str
    row: int
    is_chat: bool
    """False where the row was plain text without roles."""


@dataclass(frozen=True)
class Rejection:
    """A row that is not used; `reason` is a short name to count, `detail` a sentence to read."""

    row: int
    reason: str
    detail: str


def to_pair(row: Row, index: int, layout: Layout) -> Pair | Rejection:
    """The pair of row number `index` (counted from 1, so that it is the line of a JSONL file), or why there is none."""
    try:
        _refuse_tie(row, layout)
        prompt, chosen, rejected = _split(row, layout)
        prompt = _with_system(prompt, row, layout)
        _check(prompt, chosen, rejected)
    except RowProblem as problem:
        return Rejection(index, problem.reason, problem.detail)
    return Pair(prompt, chosen, rejected, index, layout.is_chat)


def scores_disagree(row: Row, layout: Layout) -> bool:
    """True where the score columns rate the rejected answer above the chosen one."""
    scores = _scores(row, layout)
    return scores is not None and scores[0] < scores[1]


def _split(row: Row, layout: Layout) -> tuple[list[Message], str, str]:
    """Prompt turns and the two answers: the longest common run of whole turns is the prompt, never of letters."""
    given = _given_prompt(row, layout)
    chosen, rejected = (
        _whole_conversation(given, _answer_turns(row, column, given, layout), column, layout)
        for column in (layout.chosen, layout.rejected)
    )
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and same_turn(chosen[shared], rejected[shared]):
        shared += 1
    for column, turns in ((layout.chosen, chosen), (layout.rejected, rejected)):
        if turns[-1]["role"] != "assistant":
            raise RowProblem("no_final_assistant", f"{column} ends with a {turns[-1]['role']} turn")
    if max(len(chosen), len(rejected)) - shared > 1:
        raise _not_one_decision(chosen[shared], rejected[shared], shared, layout)
    return chosen[:shared], chosen[-1]["content"], rejected[-1]["content"]


def _not_one_decision(chosen: Message, rejected: Message, turn: int, layout: Layout) -> RowProblem:
    texts = " / ".join(excerpt(side["content"]) for side in (chosen, rejected))
    where = f"chosen and rejected part at turn {turn + 1} ({texts})"
    if layout.answer_kind == "dialogue" or "assistant" not in (chosen["role"], rejected["role"]):
        return RowProblem("prompts_differ", where)
    return RowProblem("several_response_turns", f"{where}, before the last answer: more than one decision")


def _given_prompt(row: Row, layout: Layout) -> list[Message]:
    """The turns of the prompt column; none where the prompt is only found inside the answers."""
    if layout.prompt is None:
        return []
    value = row.get(layout.prompt)
    if layout.prompt_kind == "turns":
        return read_turns(value, layout.prompt)
    if layout.prompt_kind == "dialogue":
        turns = read_dialogue(value, layout.prompt)
        return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
    text = read_text(value, layout.prompt)
    context = row.get(layout.context) if layout.context else None
    if isinstance(context, str) and context.strip():
        text = f"{text}\n\n{context}"
    return [{"role": "user", "content": text}]


def _answer_turns(row: Row, column: str, given: list[Message], layout: Layout) -> list[Message]:
    value = row.get(column)
    if layout.answer_kind == "turns":
        return read_turns(value, column)
    if layout.answer_kind == "dialogue":
        return read_dialogue(value, column)
    text = read_text(value, column)
    if layout.repeats_prompt:
        prompt = given[0]["content"]
        if not text.lstrip().startswith(prompt.strip()):
            raise RowProblem("prompt_column_differs", f"{column} does not begin with the prompt as the other rows do")
        text = text.lstrip()[len(prompt.strip()) :]
    return [{"role": "assistant", "content": text}]


def _whole_conversation(given: list[Message], turns: list[Message], column: str, layout: Layout) -> list[Message]:
    """The prompt column and an answer column joined, where the answer column may repeat the prompt."""
    if not given:
        return turns
    if layout.prompt_kind == "text":
        asked = [turn["content"].strip() for turn in turns if turn["role"] == "user"]
        if given[0]["content"].strip() in (asked[:1] + asked[-1:]):
            return turns
    spoken = [turn for turn in given if turn["role"] != "system"]
    for prefix in (given, spoken):
        if len(turns) > len(prefix) and all(map(same_turn, prefix, turns)):
            return [*given[: len(given) - len(prefix)], *turns]
    if turns[0]["role"] == "assistant":
        return [*given, *turns]
    raise RowProblem(
        "prompt_column_differs",
        f"{layout.prompt} is {excerpt(given[-1]['content'])!r}, "
        f"but {column} begins with {excerpt(turns[0]['content'])!r}",
    )


def _with_system(prompt: list[Message], row: Row, layout: Layout) -> list[Message]:
    value = row.get(layout.system) if layout.system else None
    if value is None or (prompt and prompt[0]["role"] == "system"):
        return prompt
    text = read_text(value, str(layout.system))
    return [{"role": "system", "content": text}, *prompt] if text.strip() else prompt


def _check(prompt: list[Message], chosen: str, rejected: str) -> None:
    if not any(turn["role"] == "user" for turn in prompt) or not prompt[-1]["content"].strip():
        raise RowProblem("empty_prompt", "there is no question before the answers")
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise RowProblem("empty_response", f"{side} is empty")
    if chosen.strip() == rejected.strip():
        how = "are the same text" if chosen == rejected else "differ only in white space at the ends"
        raise RowProblem("identical_responses", f"chosen and rejected {how}: {excerpt(chosen)!r}")


def _refuse_tie(row: Row, layout: Layout) -> None:
    scores = _scores(row, layout)
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
