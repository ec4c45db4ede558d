"""Parts of a conversation that stand beside its texts: functions, calls and thoughts under other names, columns."""

import json
from pathlib import Path
from typing import Any

import pytest

from qdpo.collect.candidates import Answer, Candidates, read_lines
from qdpo.data.layouts.pair import Pair, Rejection, detect_layout, to_pair
from qdpo.data.tokens.prompts_only import encode_prompts, read_prompts
from qdpo.errors import DataError
from qdpo.settings.schema import DataConfig
from tests.data.prepared import assistant, case, user, write
from tests.templates.judged import TOOLS
from tests.templates.tokenizers import KEPT, tokenizer_of_file

QUESTION = user("Weather in Oslo?")
SYSTEM = {"role": "system", "content": "Be brief."}
YES, NO = assistant("It rains."), assistant("It snows.")
EARLIER = [["Hello?", "Hello."]]
QWEN = KEPT / "published" / "Qwen-Qwen2.5-7B-Instruct.jinja"


def read(row: dict[str, Any], **columns: str) -> Pair | Rejection:
    return to_pair(row, 1, detect_layout([row], columns, "the row"))


WITH_TOOLS = [
    case(
        "OpenAI's files",
        {
            "input": {"messages": [QUESTION], "tools": TOOLS, "parallel_tool_calls": True},
            "preferred_output": [YES],
            "non_preferred_output": [NO],
        },
    ),
    case(
        "beside the answers",
        {
            side: {"messages": [QUESTION, answer], "tools": TOOLS}
            for side, answer in [("chosen", YES), ("rejected", NO)]
        },
    ),
    case("in the system message", {"prompt": [SYSTEM | {"tools": TOOLS}, QUESTION], "chosen": [YES], "rejected": [NO]}),
    case(
        "as text in the system message",
        {"prompt": [SYSTEM | {"tools": json.dumps(TOOLS)}, QUESTION], "chosen": [YES], "rejected": [NO]},
    ),
]


@pytest.mark.parametrize("row", WITH_TOOLS)
def test_functions_are_found_where_they_stand(row: dict[str, Any]) -> None:
    found = read(row)
    assert isinstance(found, Pair) and found.tools == TOOLS


def test_the_older_form_of_a_call_and_thoughts_in_parts_are_kept() -> None:
    call = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    asked = [
        QUESTION,
        {**assistant(None), "function_call": call},
        {"role": "function", "name": "weather", "content": "4"},
    ]
    parts = [{"type": "reasoning.text", "text": "Look up."}, {"type": "reasoning.summary", "summary": "Rain."}]
    found = read({"prompt": asked, "chosen": [YES | {"reasoning_details": parts}], "rejected": [NO]})
    assert isinstance(found, Pair) and found.turns is not None
    assert found.prompt[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert found.prompt[2]["role"] == "tool"
    assert found.turns[0]["reasoning_content"] == "Look up.\n\nRain."


def test_a_system_column_beside_another_system_message_is_named() -> None:
    row = {"system": "Be long.", "prompt": [SYSTEM, QUESTION], "chosen": [YES], "rejected": [NO]}
    found = read(row)
    assert isinstance(found, Pair) and found.prompt == [SYSTEM, QUESTION]
    assert [reason for reason, _detail in found.mended] == ["system_column_left_out"]
    assert read(row | {"system": "Be brief."}) == read({**row, "system": None})


def test_a_system_message_goes_before_earlier_turns() -> None:
    found = read({"history": EARLIER, "prompt": [SYSTEM, QUESTION], "chosen": "It rains.", "rejected": "It snows."})
    assert isinstance(found, Pair)
    assert found.prompt == [SYSTEM, user("Hello?"), assistant("Hello."), QUESTION]


@pytest.mark.parametrize("prompt", [None, "Weather in Oslo?"])
def test_columns_that_the_user_names_stand_before_answers_that_hold_the_question(prompt: str | None) -> None:
    sides = {"chosen": [QUESTION, YES], "rejected": [QUESTION, NO]}
    row = {"passage": "Clouds over Oslo.", "earlier": EARLIER, **({"prompt": prompt} if prompt else {}), **sides}
    found = read(row, context="passage", history="earlier")
    assert isinstance(found, Pair)
    assert found.prompt == [user("Hello?"), assistant("Hello."), user("Weather in Oslo?\n\nClouds over Oslo.")]


def test_context_that_has_no_question_above_it_drops_the_row() -> None:
    turns = [QUESTION, assistant("Wait."), {"role": "tool", "content": "4 degrees"}]
    found = read(
        {"passage": "Clouds.", "prompt": turns, "chosen": "It rains.", "rejected": "It snows."}, context="passage"
    )
    assert isinstance(found, Rejection) and found.reason == "context_without_question"


def test_prompts_alone_keep_functions_and_earlier_turns(tmp_path: Path) -> None:
    rows = [{"prompt": "Weather in Oslo?", "tools": TOOLS}, {"prompt": {"messages": [QUESTION], "tools": TOOLS}}]
    first, second = read_prompts(write(tmp_path / "a.jsonl", rows))
    tokenizer = tokenizer_of_file(QWEN)
    wanted = tokenizer.apply_chat_template([QUESTION], tools=TOOLS, add_generation_prompt=True, tokenize=False)
    for ids in encode_prompts([first, second], tokenizer, DataConfig(path="none")):
        assert tokenizer.decode(ids) == wanted
    (found,) = read_prompts(write(tmp_path / "b.jsonl", [{"prompt": [SYSTEM, QUESTION], "history": EARLIER}]))
    assert found.turns == [SYSTEM, user("Hello?"), assistant("Hello."), QUESTION]


LOST = [
    case("a passage", {"prompt": "Weather?", "passage": "It is raining all over the town."}, "passage"),
    case(
        "two system messages", {"prompt": "Weather?", "system": "Be brief.", "system_prompt": "Rhyme."}, "system_prompt"
    ),
    case("a system message of its own", {"prompt": [SYSTEM, QUESTION], "system": "Be long."}, "two different system"),
]


@pytest.mark.parametrize(("row", "named"), LOST)
def test_prompts_alone_are_refused_where_text_would_be_lost(tmp_path: Path, row: dict[str, Any], named: str) -> None:
    with pytest.raises(DataError, match=named):
        read_prompts(write(tmp_path / "a.jsonl", [row]))


def test_candidates_keep_the_functions_of_their_prompt(tmp_path: Path) -> None:
    told = Candidates("Weather?", (Answer("Rain."),), "line 1", tools=TOOLS)
    path = write(tmp_path / "c.jsonl", [told.to_json()])
    assert [line.tools for line in read_lines(path)] == [TOOLS]
    assert told.id == read_lines(path)[0].id != Candidates("Weather?", (), "line 2").id
