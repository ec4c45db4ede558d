"""Data sets of every known layout with a known number of each fault, and the name under which each must be found.

Every set is 1,000 rows, drawn from a seed. A fault is made in a clean conversation, which is then written as a row,
or in a cell of the row. FORMS says which faults a layout can have, and the reason that `prepare` must give.
"""

import json
import random
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
Turn = dict[str, Any]

ROWS = 1000
NOUNS = "river stone cloud garden letter window market engine forest candle bridge teacher".split()
MAX_PROMPT_TOKENS, MAX_TOKENS = 600, 1200
LONG = "\x01"
"""A byte that no training text holds: one token each in byte-level tokenizers."""


@dataclass
class Talk:
    """Both sides of a row as whole conversations; a clean one differs in the last answer only."""

    system: str | None
    chosen: list[Turn]
    rejected: list[Turn]
    scores: tuple[float, float] = (8.0, 4.0)
    status: str = "chosen"

    @property
    def question(self) -> str:
        return next(turn["content"] for turn in self.chosen if turn["role"] == "user")


def clean_talk(draw: random.Random, number: int, exchanges: int) -> Talk:
    def words(low: int, high: int) -> str:
        return " ".join(draw.choice(NOUNS) for _ in range(draw.randint(low, high)))

    shared = []
    for exchange in range(exchanges):
        shared += [_turn("user", f"Question {number}.{exchange}: {words(2, 8)}?"), _turn("assistant", words(2, 12))]
    shared.pop()
    good, bad = (_turn("assistant", f"{side} {words(2, 12)}.") for side in ("Good:", "Bad:"))
    return Talk("Be brief.", [*shared, good], [*deepcopy(shared), bad])


def _turn(role: str, content: Any) -> Turn:
    return {"role": role, "content": content}


def _answer(talk: Talk, content: Any, side: str = "chosen") -> None:
    getattr(talk, side)[-1]["content"] = content


def _same(talk: Talk, around: str = "") -> None:
    _answer(talk, talk.chosen[-1]["content"] + around, "rejected")


def _long_question(talk: Talk) -> None:
    for side in (talk.chosen, talk.rejected):
        side[-2]["content"] += LONG * MAX_PROMPT_TOKENS


def _blank_question(talk: Talk) -> None:
    for side in (talk.chosen, talk.rejected):
        side[-2]["content"] = " \n"


def _other_question(talk: Talk) -> None:
    talk.rejected[0]["content"] = "Another question altogether?"


def _other_earlier_answer(talk: Talk) -> None:
    talk.rejected[1]["content"] = "An answer that the other side never gave."


def _end_with_user(talk: Talk) -> None:
    talk.chosen.append(_turn("user", "And then?"))


def _unknown_role(talk: Talk) -> None:
    talk.rejected[-1]["role"] = "critic"


def _tie(talk: Talk) -> None:
    talk.scores, talk.status = (5.0, 5.0), "tie"


def _swap(talk: Talk) -> None:
    talk.chosen, talk.rejected = talk.rejected, talk.chosen


TALK_FAULTS: dict[str, Callable[[Talk], None]] = {
    "empty": lambda talk: _answer(talk, ""),
    "blank": lambda talk: _answer(talk, " \n\t\u3000", "rejected"),
    "null": lambda talk: _answer(talk, None),
    "number": lambda talk: _answer(talk, 17, "rejected"),
    "same": _same,
    "same but for white space": lambda talk: _same(talk, " \n"),
    "blank prompt": _blank_question,
    "long prompt": _long_question,
    "cut": lambda talk: _answer(talk, "Good: " + LONG * (MAX_TOKENS + 100)),
    "cut too much": lambda talk: _answer(talk, "Bad: " + LONG * (4 * MAX_TOKENS), "rejected"),
    "other question": _other_question,
    "other earlier answer": _other_earlier_answer,
    "ends with user": _end_with_user,
    "unknown role": _unknown_role,
    "tie": _tie,
}
CELL_FAULTS: dict[str, tuple[str, Any]] = {  # role of the column, and what stands in it
    "null chosen": ("chosen", None),
    "null rejected": ("rejected", None),
    "nan": ("chosen", float("nan")),
    "number in a cell": ("rejected", 17),
    "no text in a cell": ("chosen", {"score": 3}),
    "null prompt": ("prompt", None),
    "number as prompt": ("prompt", 3.5),
}
EVERYWHERE = {
    "empty": "empty_response",
    "blank": "empty_response",
    "null": "null_field",
    "null chosen": "null_field",
    "null rejected": "null_field",
    "nan": "null_field",
    "number": "not_text",
    "number in a cell": "not_text",
    "no text in a cell": "not_text",
    "same": "identical_responses",
    "same but for white space": "identical_after_trim",
    "blank prompt": "empty_prompt",
    "long prompt": "prompt_too_long",
    "cut": "response_cut",
    "cut too much": "response_cut_too_much",
    "duplicate": "duplicate",
    "contradiction": "contradiction",
}
WITH_PROMPT = EVERYWHERE | {"null prompt": "null_field", "number as prompt": "not_text"}
WITH_CONTEXT = {fault: reason for fault, reason in WITH_PROMPT.items() if fault != "blank prompt"}
IN_TURNS = {"unknown role": "unknown_role"}
IN_CONVERSATIONS = IN_TURNS | {"ends with user": "no_final_assistant"}
TIES = {"tie": "tie"}


@dataclass(frozen=True)
class Form:
    """One layout: how a row is written, what can be wrong with it, and the reasons for which it should be dropped."""

    write: Callable[[Talk], Row]
    faults: dict[str, str]
    """Fault → the reason that `prepare` must give."""
    exchanges: int = 1
    columns: tuple[str, str, str] = ("prompt", "chosen", "rejected")


def _text(prompt: str, chosen: str, rejected: str, **more: Any) -> Callable[[Talk], Row]:
    def write(talk: Talk) -> Row:
        last = {chosen: talk.chosen[-1]["content"], rejected: talk.rejected[-1]["content"]}
        return {prompt: talk.question, **last, **more}

    return write


def _orca(talk: Talk) -> Row:
    row = _text("question", "chosen", "rejected")(talk)
    return {"system": talk.system, **row, "status": talk.status}


def _alpaca_list(talk: Talk) -> Row:
    answers = [talk.chosen[-1]["content"], talk.rejected[-1]["content"]]
    return {"instruction": talk.question, "input": "", "output": answers}


def _messages(talk: Talk) -> Row:
    prompt = [_turn("system", talk.system), *talk.chosen[:-1]]
    return {"prompt": prompt, "chosen": talk.chosen[-1:], "rejected": talk.rejected[-1:]}


def _implicit(talk: Talk) -> Row:
    return {"chosen": talk.chosen, "rejected": talk.rejected}


def _hh(talk: Talk) -> Row:
    def text(turns: list[Turn]) -> Any:
        last = turns[-1]["content"]
        if not isinstance(last, str):
            return last
        names = {"user": "Human", "assistant": "Assistant"}
        return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)

    return {"chosen": text(talk.chosen), "rejected": text(talk.rejected)}


def _ultrafeedback(talk: Talk) -> Row:
    scores = {"score_chosen": talk.scores[0], "score_rejected": talk.scores[1]}
    return {"prompt": talk.question, **_implicit(talk), "messages": talk.chosen, **scores}


def _sharegpt(talk: Talk) -> Row:
    names = {"user": "human", "assistant": "gpt"}

    def turn(turn: Turn) -> Turn:
        return {"from": names.get(turn["role"], turn["role"]), "value": turn["content"]}

    conversation = [{"from": "system", "value": talk.system}, *map(turn, talk.chosen[:-1])]
    return {"conversations": conversation, "chosen": turn(talk.chosen[-1]), "rejected": turn(talk.rejected[-1])}


def _csv(talk: Talk) -> Row:
    return {"prompt": talk.question, "chosen": json.dumps(talk.chosen), "rejected": json.dumps(talk.rejected)}


FORMS = {
    "text": Form(_text("prompt", "chosen", "rejected"), WITH_PROMPT),
    "messages": Form(_messages, WITH_PROMPT | IN_TURNS, exchanges=2),
    "implicit messages": Form(
        _implicit,
        EVERYWHERE
        | IN_CONVERSATIONS
        | {"other question": "prompts_differ", "other earlier answer": "several_response_turns"},
        exchanges=2,
    ),
    "hh": Form(
        _hh,
        EVERYWHERE
        | {"ends with user": "no_final_assistant"}
        | {"other question": "prompts_differ", "other earlier answer": "prompts_differ"}
        | {"same but for white space": "identical_responses"},  # no white space around a turn is its content
        exchanges=2,
    ),
    "ultrafeedback": Form(
        _ultrafeedback, WITH_PROMPT | IN_CONVERSATIONS | TIES | {"other question": "prompt_column_differs"}
    ),
    "orca": Form(_orca, WITH_PROMPT | TIES, columns=("question", "chosen", "rejected")),
    "question": Form(
        _text("question", "response_j", "response_k", qid=1),
        WITH_PROMPT,
        columns=("question", "response_j", "response_k"),
    ),
    "alpaca": Form(
        _text("instruction", "chosen", "rejected", input="A context."),
        WITH_CONTEXT,
        columns=("instruction", "chosen", "rejected"),
    ),
    "alpaca with a list": Form(_alpaca_list, WITH_PROMPT, columns=("instruction", "output", "output")),
    "preferred": Form(
        _text("prompt", "preferred", "dispreferred"), WITH_PROMPT, columns=("prompt", "preferred", "dispreferred")
    ),
    "sharegpt": Form(_sharegpt, WITH_PROMPT | IN_TURNS, exchanges=2, columns=("conversations", "chosen", "rejected")),
    "csv": Form(
        _csv,
        WITH_PROMPT
        | IN_CONVERSATIONS
        | {"other question": "prompt_column_differs", "other earlier answer": "several_response_turns"},
        exchanges=2,
    ),
}


def faulty_rows(layout: str, seed: int = 0) -> tuple[list[Row], Counter[str]]:
    """1,000 rows of a layout, most of them clean, and how many of them are to be dropped or cut for each reason."""
    form, draw = FORMS[layout], random.Random(f"{layout} {seed}")
    talks = [clean_talk(draw, number, form.exchanges) for number in range(ROWS)]
    free = draw.sample(range(ROWS), ROWS)
    cells: dict[int, tuple[str, Any]] = {}
    expected = Counter[str]()
    for fault, reason in form.faults.items():
        count = draw.randint(3, 12)
        expected[reason] += 2 * count if fault == "contradiction" else count
        for _ in range(count):
            at = free.pop()
            if fault in CELL_FAULTS:
                role, value = CELL_FAULTS[fault]
                cells[at] = form.columns[("prompt", "chosen", "rejected").index(role)], value
            elif fault in TALK_FAULTS:
                TALK_FAULTS[fault](talks[at])
            else:  # a copy of a row that stays clean
                talks[at] = deepcopy(talks[free.pop()])
                if fault == "contradiction":
                    _swap(talks[at])
    rows = [form.write(talk) for talk in talks]
    for at, (column, value) in cells.items():
        rows[at][column] = value
    return rows, expected
