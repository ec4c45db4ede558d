"""All text that a row puts before its answers is trained, asked about, or named: none is dropped without a word."""

import json
from pathlib import Path
from typing import Any

import pytest

from qdpo.errors import DataError
from tests.data.prepared import Row, assistant, case, prepare_file, user, write
from tests.data.template_tokenizers import tokenizer_of

ANSWERS = {"chosen": "It costs # euros.", "rejected": "I could not say #."}
PAIRS = [["How much is the lamp?", "The lamp costs 9 euros."]]
PASSAGE = "The price list says 2 euros for that item."


def rows_with(cells: Row, count: int = 20) -> list[Row]:
    return [json.loads(json.dumps(ANSWERS | cells).replace("#", str(n))) for n in range(count)]


def talk(*turns: str) -> str:
    roles = ("user", "assistant")
    written = "".join(f"<|im_start|>{roles[n % 2]}\n{text}<|im_end|>\n" for n, text in enumerate(turns))
    return f"{written}<|im_start|>assistant\n"


def first_prompt(path: Path, *settings: str) -> tuple[str, str]:
    """The prompt of row 1, and what a run says of the data."""
    outcome = prepare_file(path, tokenizer_of("chatml"), *settings)
    pair = min([*outcome.found.train, *outcome.found.held_out], key=lambda pair: pair.row)
    return tokenizer_of("chatml").decode(pair.prompt), outcome.said


EARLIER = talk("How much is the lamp?", "The lamp costs 9 euros.", "And item 0?")
JOINED = [  # cells, prompt, what the layout line says
    case(
        "earlier turns beside an instruction",
        {"instruction": "And item #?", "input": "", "history": PAIRS},
        EARLIER,
        "history holds the turns before the prompt",
    ),
    case("earlier turns beside a prompt", {"prompt": "And item #?", "history": PAIRS}, EARLIER, "history holds"),
    case(
        "earlier turns as text",
        {"instruction": "And item #?", "history": json.dumps(PAIRS)},
        EARLIER,
        "history holds the turns",
    ),
    case(
        "earlier turns as messages",
        {"question": "And item #?", "history": [user(PAIRS[0][0]), assistant(PAIRS[0][1])]},
        EARLIER,
        "history holds the turns",
    ),
    case("no earlier turns", {"instruction": "And item #?", "history": []}, talk("And item 0?"), "prompt=instruction"),
    case(
        "an instruction and its input",
        {"instruction": "Translate #.", "input": "Item #"},
        talk("Translate 0.\n\nItem 0"),
        "its input (put below it)",
    ),
    case(
        "a system message",
        {"system_message": "You sell.", "prompt": "Item #?"},
        "<|im_start|>system\nYou sell.<|im_end|>\n" + talk("Item 0?"),
        "system=system_message",
    ),
    case(
        "a system message beside messages",
        {"system_instruction": "You sell.", "prompt": [user("Item #?")]},
        "<|im_start|>system\nYou sell.<|im_end|>\n" + talk("Item 0?"),
        "system_instruction is the system message",
    ),
    case(
        "messages before messages",
        {"messages": [user("Item #?")], "chosen": assistant("2 euros."), "rejected": assistant("No.")},
        talk("Item 0?"),
        "prompt=messages",
    ),
    case("messages before text", {"messages": [user("Item #?")]}, talk("Item 0?"), "prompt=messages"),
    case("an empty prompt beside a question", {"prompt": None, "question": "Q#?"}, talk("Q0?"), "prompt=question"),
    case(
        "a copy of the whole conversation",
        {
            "prompt": "Item #?",
            "messages": [user("Item #?"), assistant("2 euros.")],
            "chosen": [user("Item #?"), assistant("2 euros.")],
            "rejected": [user("Item #?"), assistant("No.")],
        },
        talk("Item 0?"),
        "prompt=prompt",
    ),
    case(
        "the question inside its instruction",
        {"instruction": "Answer this: Item #?", "question": "Item #?"},
        talk("Item 0?"),
        "prompt=question",
        ("data.columns.ignore=instruction",),
    ),
]


@pytest.mark.parametrize(
    ("cells", "prompt", "said", "settings"), [pytest.param(*(*c.values, ())[:4], id=c.id) for c in JOINED]
)
def test_what_stands_before_the_answers_is_joined(
    tmp_path: Path, cells: Row, prompt: str, said: str, settings: tuple[str, ...]
) -> None:
    shown, text = first_prompt(write(tmp_path / "a.jsonl", rows_with(cells)), *settings)
    assert shown == prompt
    assert said in text.split("layout: ")[1].split("\n")[0] and "not used" not in text


UNCLEAR = [  # cells, the settings that the message offers, and the prompt with the first of them
    case(
        "a passage and a question",
        {"context": PASSAGE, "question": "Item #?"},
        ["data.columns.context=context", "data.columns.ignore=context"],
        talk(f"Item 0?\n\n{PASSAGE}"),
    ),
    case(
        "a passage and a query",
        {"context": PASSAGE, "query": "Item #?"},
        ["data.columns.context=context", "data.columns.ignore=context"],
        talk(f"Item 0?\n\n{PASSAGE}"),
    ),
    case(
        "an input beside a prompt",
        {"prompt": "Translate #.", "input": "Item #"},
        ["data.columns.context=input", "data.columns.ignore=input"],
        talk("Translate 0.\n\nItem 0"),
    ),
    case(
        "a number as input",
        {"prompt": "Double this, #.", "input": 4},
        ["data.columns.ignore=input"],
        talk("Double this, 0."),
    ),
    case(
        "an input that the answer repeats",
        {"prompt": "Repeat this, #.", "input": "It costs # euros."},
        ["data.columns.context=input", "data.columns.ignore=input"],
        talk("Repeat this, 0.\n\nIt costs 0 euros."),
    ),
    case(
        "three of them",
        {"prompt": "Item #?", "document": PASSAGE, "input": "Hurry"},
        ["data.columns.context=document+input", "data.columns.ignore=document+input"],
        talk(f"Item 0?\n\n{PASSAGE}\n\nHurry"),
    ),
    case(
        "earlier turns of another name",
        {"prompt": "And item #?", "chat_history": [*PAIRS, ["Is it in stock today?", "Yes, it is in stock."]]},
        ["data.columns.history=chat_history", "data.columns.ignore=chat_history"],
        talk(*PAIRS[0], "Is it in stock today?", "Yes, it is in stock.", "And item 0?"),
    ),
    case(
        "earlier turns in an unknown form",
        {"prompt": "And item #?", "history": ["How much is the lamp?"]},
        ["data.columns.ignore=history"],
        talk("And item 0?"),
    ),
    case(
        "other messages beside a prompt",
        {"prompt": "And item #?", "messages": [user("How much is the lamp?"), assistant("9 euros.")]},
        ["data.columns.history=messages", "data.columns.ignore=messages"],
        talk("How much is the lamp?", "9 euros.", "And item 0?"),
    ),
    case(
        "two system messages",
        {"prompt": "Item #?", "system": "You sell.", "system_prompt": "You are kind."},
        ["data.columns.system=system_prompt", "data.columns.ignore=system_prompt"],
        None,
    ),
]


@pytest.mark.parametrize(("cells", "ways", "prompt"), UNCLEAR)
def test_what_nothing_says_how_to_join_is_asked(tmp_path: Path, cells: Row, ways: list[str], prompt: Any) -> None:
    path = write(tmp_path / "a.jsonl", rows_with(cells))
    with pytest.raises(DataError, match="may belong before the answers") as error:
        prepare_file(path, tokenizer_of("chatml"))
    assert [way for way in ways if way + " " not in str(error.value)] == []
    for way in ways:
        if prompt is not None:
            shown, said = first_prompt(write(tmp_path / f"{way}.jsonl", rows_with(cells)), way)
            assert (shown == prompt) == (way == ways[0]) and "not used" not in said


def test_a_column_that_is_filled_in_one_row_of_many_is_seen(tmp_path: Path) -> None:
    rows = rows_with({"prompt": "Item #?"}, 3000)
    rows[1234]["context"] = PASSAGE
    with pytest.raises(DataError, match=r"context \(in 1 of \d+ rows, as 'The price list"):
        prepare_file(write(tmp_path / "a.jsonl", rows), tokenizer_of("chatml"))


OTHERS = [  # a column that nothing uses, and if it is listed
    case("notes", "A remark that somebody wrote about #.", True),
    case("notes in Chinese", "\u8fd9\u662f\u5173\u4e8e\u4ef7\u683c\u7684\u8bf4\u660e #", True),
    case("messages", [user("Where do you live then, number #?"), assistant("In the middle of the town.")], True),
    case("a constant remark", "You are a pirate who answers every question in rhymes.", True),
    case("the prompt again", "Item #?", False),
    case("the answers again", {"good": "It costs # euros.", "bad": "I could not say #."}, False),
    case("an id", "q-00000#", False),
    case("a number", 7, False),
    case("an address", "https://example.org/a page of some site/#", False),
    case("a date", "2024-05-0# 10:15:00", False),
    case("a topic", "arts and music of Spain", False),
    case("a model", "owner/model-7b-instruct", False),
]


@pytest.mark.parametrize(("cell", "listed"), OTHERS)
def test_other_text_that_is_not_used_is_listed(tmp_path: Path, cell: Any, listed: bool) -> None:
    rows = rows_with({"prompt": "Item #?", "extra": cell})
    _, said = first_prompt(write(tmp_path / "a.jsonl", rows))
    assert ("warning: columns with text that are not used: extra (in 20 of 20 rows, as " in said) == listed
    _, said = first_prompt(write(tmp_path / "b.jsonl", rows), "data.columns.ignore=extra")
    assert "not used" not in said


def test_a_row_whose_earlier_turns_cannot_be_read_is_dropped_by_name(tmp_path: Path) -> None:
    rows = rows_with({"prompt": "And item #?", "history": PAIRS}, 30)
    rows[3]["history"], rows[7]["history"], rows[9]["history"] = None, "once upon a time", [["a"], ["b", "c"]]
    with pytest.raises(DataError, match=r"data\.columns\.ignore=history"):
        prepare_file(write(tmp_path / "a.jsonl", rows), tokenizer_of("chatml"))
    outcome = prepare_file(write(tmp_path / "a.jsonl", rows), tokenizer_of("chatml"), "data.columns.history=history")
    assert outcome.noted() == [(8, "dropped", "bad_history"), (10, "dropped", "bad_history")]
