"""Converts a row into its preference pairs, or into a named reason why it cannot be used.

A pair is one decision: a prompt, and two different final answers of the assistant.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from qdpo.data.layouts.before import after_earlier, below, earlier_turns
from qdpo.data.layouts.layout import Layout as Layout
from qdpo.data.layouts.layout import detect_layout as detect_layout
from qdpo.data.layouts.turns import Message as Message
from qdpo.data.layouts.turns import (
    RowProblem,
    excerpt,
    is_null,
    read_dialogue,
    read_text,
    read_turns,
    same_turn,
    tools_in,
)
from qdpo.data.layouts.winner import RANKED_REJECTED, two_answers
from qdpo.data.read.files import Sample
from qdpo.data.read.progress import DEEPEST, Row, is_deep
from qdpo.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A prompt and two answers to it."""

    prompt: list[Message]
    """The turns before the answer. If `is_chat` is False: one user turn with the prompt's text unchanged."""
    chosen: str
    rejected: str
    row: int
    is_chat: bool
    """False if the row was plain text without roles."""
    turns: tuple[Message, Message] | None = None
    """Both answers as messages, if they hold more than text (tool calls)."""
    tools: list[Any] | None = None
    """The functions that the model may call, as chat templates take them."""
    mended: tuple[tuple[str, str], ...] = ()
    """Repairs made while reading, each a short name and a sentence."""

    def answers(self) -> tuple[Message, Message]:
        """Both answers as the last turns of a conversation."""
        if self.turns is not None:
            return self.turns
        return {"role": "assistant", "content": self.chosen}, {"role": "assistant", "content": self.rejected}


@dataclass(frozen=True)
class Rejection:
    """A row that is not used; `reason` is a short name to count, `detail` a sentence to read."""

    row: int
    reason: str
    detail: str


# Faults that may affect a whole data set, with the remedy; single rows with such a fault are dropped.
WAYS_OUT = {
    "unknown_role": "Rename the roles.",
    "no_final_assistant": "Chosen and rejected must end with the assistant's answer.",
    "several_response_turns": "data.last_answer_only=true keeps the shared turns and the last answer of each side.",
    "null_field": "Check how the file was written, or name other columns with data.columns.*.",
    "not_text": "Check how the file was written, or name other columns with data.columns.*.",
}


def check_sample(sample: Sample, layout: Layout, origin: str) -> None:
    """Raises: DataError if most rows of the sample share a fault that makes the whole data set unusable."""
    faults = [
        found
        for number, row in sample.rows.items()
        for found in to_pairs(row, number, layout)
        if isinstance(found, Rejection) and found.reason in WAYS_OUT
    ]
    for reason, count in Counter(fault.reason for fault in faults).items():
        if 2 * count > len(sample.rows):
            first = next(fault for fault in faults if fault.reason == reason)
            raise DataError(
                f"{origin}: {count} of {len(sample.rows)} sampled rows cannot be used ({reason}). Row {first.row}: "
                f"{first.detail}. {WAYS_OUT[reason]}"
            )


def to_pairs(row: Row, index: int, layout: Layout, *, keep_empty_rejected: bool = False) -> list[Pair | Rejection]:
    """The pairs of row number `index` (counted from 1), or the reason why there is none.

    A row makes one pair, or, if it has several worse answers, a pair with each.
    """
    try:
        rows = list(two_answers(row, layout))
    except RowProblem as problem:
        return [Rejection(index, problem.reason, problem.detail)]
    return [_to_pair(two, index, layout, keep_empty_rejected) for two in rows]


def to_pair(row: Row, index: int, layout: Layout) -> Pair | Rejection:
    """The first pair of a row, or the reason why there is none."""
    return to_pairs(row, index, layout)[0]


def _to_pair(row: Row, index: int, layout: Layout, keep_empty_rejected: bool) -> Pair | Rejection:
    try:
        try:
            prompt, chosen, rejected, mended = _split(row, layout)
        except RowProblem as problem:
            if problem.reason != "prompt_column_differs" or not layout.context:
                raise
            prompt, chosen, rejected, mended = _split(row, replace(layout, context=()))  # the answers lack the context
            prompt = _with_context(prompt, row, layout)
        prompt = _with_system(_with_before(prompt, row, layout), row, layout, mended)
        _check(prompt, chosen, rejected, keep_empty_rejected)
        tools = _tools(row, layout)
    except RowProblem as problem:
        return Rejection(index, problem.reason, problem.detail)
    plain = all(set(turn) == {"role", "content"} for turn in (chosen, rejected))
    turns = None if plain else (chosen, rejected)
    return Pair(
        prompt=prompt,
        chosen=chosen["content"],
        rejected=rejected["content"],
        row=index,
        is_chat=layout.is_chat,
        turns=turns,
        tools=tools,
        mended=tuple(mended),
    )


def _split(row: Row, layout: Layout) -> tuple[list[Message], Message, Message, list[tuple[str, str]]]:
    """Prompt turns and the two answers: the prompt is the longest common prefix in whole turns, never in letters."""
    given = _given_prompt(row, layout)
    rejected_column = RANKED_REJECTED if layout.form == "ranked" else layout.rejected
    chosen, rejected = (
        _whole_conversation(given, _answer_turns(row, column, given, layout), column, layout)
        for column in (layout.chosen, rejected_column)
    )
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and same_turn(chosen[shared], rejected[shared]):
        shared += 1
    for column, turns in ((layout.chosen, chosen), (layout.rejected, rejected)):
        if turns[-1]["role"] != "assistant":
            raise RowProblem("no_final_assistant", f"{column} ends with a {turns[-1]['role']} turn")
    mended = []
    if chosen[:shared] != rejected[:shared]:
        mended.append(("prompt_whitespace", "the prompts of both sides differed in white space; chosen's is used"))
    if max(len(chosen), len(rejected)) - shared > 1:
        if not layout.last_answer_only or chosen[shared]["role"] != "assistant":
            raise _not_one_decision(chosen[shared], rejected[shared], shared, layout)
        left_out = max(len(chosen), len(rejected)) - shared - 1
        mended.append(("last_answer_only", f"{left_out} turns before the last answer were left out"))
    return chosen[:shared], chosen[-1], rejected[-1], mended


def _not_one_decision(chosen: Message, rejected: Message, turn: int, layout: Layout) -> RowProblem:
    texts = " / ".join(excerpt(side["content"]) for side in (chosen, rejected))
    where = f"chosen and rejected differ from turn {turn + 1} on ({texts})"
    if layout.answer_kind == "dialogue" or "assistant" not in (chosen["role"], rejected["role"]):
        return RowProblem("prompts_differ", where)
    return RowProblem("several_response_turns", f"{where}, before the last answer: more than one decision")


def _given_prompt(row: Row, layout: Layout) -> list[Message]:
    """The turns before the answers that have columns of their own; empty if the prompt is only part of the answers."""
    if layout.prompt is None:
        return []
    value = row.get(layout.prompt)
    earlier = earlier_turns(row.get(layout.history), layout.history) if layout.history else []
    if layout.prompt_kind == "turns":
        turns = read_turns(value, layout.prompt)
    elif layout.prompt_kind == "dialogue":
        turns = read_dialogue(value, layout.prompt)
        turns = turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
    else:
        turns = [{"role": "user", "content": read_text(value, layout.prompt)}]
    return after_earlier(earlier, _with_context(turns, row, layout))


def _with_before(prompt: list[Message], row: Row, layout: Layout) -> list[Message]:
    """A prompt that only the answers held, with the columns of context and earlier turns."""
    if layout.prompt is not None or not prompt:
        return prompt
    earlier = earlier_turns(row.get(layout.history), layout.history) if layout.history else []
    return after_earlier(earlier, _with_context(prompt, row, layout))


def _with_context(turns: list[Message], row: Row, layout: Layout) -> list[Message]:
    if not layout.context or not below("", row, layout.context):
        return turns
    if turns[-1]["role"] != "user":
        names = " and ".join(layout.context)
        raise RowProblem("context_without_question", f"{names} cannot be put below a {turns[-1]['role']} turn")
    return [*turns[:-1], turns[-1] | {"content": below(turns[-1]["content"], row, layout.context)}]


def _answer_turns(row: Row, column: str, given: list[Message], layout: Layout) -> list[Message]:
    value = row.get(column)
    if layout.answer_kind == "turns":
        return read_turns(value, column)
    if layout.answer_kind == "dialogue":
        return read_dialogue(value, column)
    text = read_text(value, layout.rejected if column == RANKED_REJECTED else column)
    if layout.repeats_prompt:
        prompt = given[-1]["content"]
        if not text.lstrip().startswith(prompt.strip()):
            raise RowProblem("prompt_column_differs", f"{column} does not begin with the prompt as the other rows do")
        text = text.lstrip()[len(prompt.strip()) :]
    return [{"role": "assistant", "content": text}]


def _whole_conversation(given: list[Message], turns: list[Message], column: str, layout: Layout) -> list[Message]:
    """Join the prompt column and an answer column, which may repeat the prompt."""
    if not given:
        return turns
    if layout.prompt_kind == "text":
        asked = [turn["content"].strip() for turn in turns if turn["role"] == "user"]
        if given[-1]["content"].strip() in (asked[:1] + asked[-1:]):
            earlier = given[:-1]
            is_told = len(turns) > len(earlier) and all(map(same_turn, earlier, turns))
            return turns if is_told else [*earlier, *turns]
    spoken = [turn for turn in given if turn["role"] != "system"]
    for prefix in (given, spoken):
        if len(turns) > len(prefix) and all(map(same_turn, prefix, turns)):
            return [*given[: len(given) - len(prefix)], *turns]
    if turns[0]["role"] == "assistant":
        return [*given, *turns]
    if turns[-1]["role"] != "assistant":
        raise RowProblem("no_final_assistant", f"{column} ends with a {turns[-1]['role']} turn")
    raise RowProblem(
        "prompt_column_differs",
        f"{layout.prompt} is {excerpt(given[-1]['content'])!r}, "
        f"but {column} begins with {excerpt(turns[0]['content'])!r}",
    )


def _with_system(prompt: list[Message], row: Row, layout: Layout, mended: list[tuple[str, str]]) -> list[Message]:
    value = row.get(layout.system) if layout.system else None
    if is_null(value):
        return prompt
    text = read_text(value, str(layout.system))
    if prompt and prompt[0]["role"] == "system":
        if text.strip() not in prompt[0]["content"]:
            left = f"{layout.system} was left out ({excerpt(text)!r}): the conversation has a system message of its own"
            mended.append(("system_column_left_out", left))
        return prompt
    return [{"role": "system", "content": text}, *prompt] if text.strip() else prompt


def _tools(row: Row, layout: Layout) -> list[Any] | None:
    value = row.get(layout.tools) if layout.tools else None
    if not value:
        cells = (row.get(column) for column in (layout.prompt, layout.chosen, layout.rejected) if column)
        value = next(filter(None, map(tools_in, cells)), None)
    return tools_of(value, layout.tools or "tools")


def tools_of(value: Any, column: str) -> list[Any] | None:
    """The functions of a cell, also where they are JSON text. Raises: RowProblem `bad_tools`."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise RowProblem("bad_tools", f"{column} is not JSON: {excerpt(value)}") from None
    if value is not None and not isinstance(value, list):
        raise RowProblem("bad_tools", f"{column} holds {type(value).__name__}, not a list of functions")
    if is_deep(value):
        raise RowProblem("bad_tools", f"{column} nests more than {DEEPEST} lists and objects")
    return value or None


def _check(prompt: list[Message], chosen: Message, rejected: Message, keep_empty_rejected: bool) -> None:
    if not any(turn["role"] == "user" for turn in prompt) or not prompt[-1]["content"].strip():
        raise RowProblem("empty_prompt", "there is no question before the answers")
    if prompt[-1]["role"] == "assistant":
        raise RowProblem(
            "prompt_ends_with_answer", "the prompt ends with an assistant turn, which chosen would continue"
        )
    for side, turn in (("chosen", chosen), ("rejected", rejected)):
        if not turn["content"].strip() and not {"tool_calls", "reasoning_content"} & turn.keys():
            if side == "chosen":
                raise RowProblem("empty_response", "chosen is empty")
            if not keep_empty_rejected:
                raise RowProblem("empty_response", "rejected is empty (data.keep_empty_rejected=true keeps such pairs)")
    if same_turn(chosen, rejected):
        if chosen["content"] == rejected["content"]:
            raise RowProblem(
                "identical_responses", f"chosen and rejected are the same text: {excerpt(chosen['content'])!r}"
            )
        raise RowProblem(
            "identical_after_trim",
            f"chosen and rejected differ only in white space at the ends: {excerpt(chosen['content'])!r}",
        )


def without_oldest_turns(pair: Pair) -> Pair | None:
    """The pair without its oldest exchange; system message and last question stay. None if nothing is left to drop."""
    start = 1 if pair.prompt[0]["role"] == "system" else 0
    users = [place for place, turn in enumerate(pair.prompt) if turn["role"] == "user" and place >= start]
    later = [place for place in users if place > start]
    return replace(pair, prompt=[*pair.prompt[:start], *pair.prompt[later[0] :]]) if later else None
