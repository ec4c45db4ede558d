"""Bad input, row by row: whether each kind is refused, dropped, mended or warned of, under which name and how often.

The rows are numbered as in the table of 45 that the data room was designed from. Each is written to a file and
prepared as a run prepares it.
"""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.data.prepared import (
    BYTE,
    CLEAN,
    ODD,
    asked,
    assistant,
    case,
    oddly,
    prepare_file,
    talk,
    text_row,
    tokenizer_for,
    user,
    with_rest,
    write,
)

TABLE = range(1, 46)
ELSEWHERE = {  # rows of the table that need a hub or a model, and the test that has them
    44: ("tests/data/test_hub.py", "test_what_can_go_wrong_is_explained"),
}


DROPPED = [  # shape, cells of the odd rows (or what makes them from the number), reason, detail, tokenizer, settings
    case("05 the same text", "text", {"chosen": "Maybe.", "rejected": "Maybe."}, "identical_responses", "'Maybe.'"),
    case(
        "05 the same after trimming",
        "text",
        {"chosen": "Maybe.", "rejected": " Maybe.\n"},
        "identical_after_trim",
        "white space at the ends",
    ),
    case(
        "05 the same after tokenising",
        "text",
        {"chosen": "caf\u00e9", "rejected": "cafe\u0301"},
        "identical_tokens",
        "the same 6 tokens",
        "qwen25",
    ),
    case(
        "05 the same after cutting",
        "text",
        {"chosen": BYTE * 80, "rejected": BYTE * 85},
        "identical_after_cut",
        r"the same 6\d tokens",
        "chatml",
        "data.max_tokens=80",
    ),
    case("06 an empty answer", "text", {"chosen": ""}, "empty_response", "chosen is empty$"),
    case(
        "06 a blank answer",
        "text",
        {"rejected": " \n\t\u3000"},
        "empty_response",
        r"rejected is empty \(data\.keep_empty_rejected=true",
    ),
    case("07 null", "text", {"chosen": None}, "null_field", r"chosen is empty \(null\)"),
    case("07 not a number", "text", {"rejected": float("nan")}, "null_field", r"rejected is empty \(null\)"),
    case("07 a number", "text", {"rejected": 17}, "not_text", "rejected holds int, not text: 17"),
    case("08 an empty list of messages", "talk", {"rejected": []}, "null_field", "rejected is empty"),
    case(
        "09 ends with a question",
        "talk",
        lambda n: {"chosen": asked(n)},
        "no_final_assistant",
        "chosen ends with a user turn",
    ),
    case(
        "10 other prompts in HH texts",
        "hh",
        {"rejected": "\n\nHuman: Other?\n\nAssistant: No."},
        "prompts_differ",
        r"differ from turn 1 on \(Question \d+\? / Other\?\)",
    ),
    case(
        "12 another prompt than the column's",
        "binarized",
        {"prompt": "Other?"},
        "prompt_column_differs",
        r"prompt is 'Other\?', but chosen begins with 'Question",
    ),
    case(
        "13 other prompts",
        "talk",
        {"rejected": [user("Other?"), assistant("No.")]},
        "prompts_differ",
        r"Question \d+\? / Other\?",
    ),
    case(
        "14 another earlier answer",
        "talk",
        lambda n: {"rejected": [user(f"Question {n}?"), assistant("Hm."), user("That one."), assistant("No.")]},
        "several_response_turns",
        r"differ from turn 2 on \(Which one\? / Hm\.\).*more than one decision",
    ),
    case(
        "15 several messages an answer",
        "talk",
        lambda n: {"chosen": asked(n, assistant("Wait."), user("Well?"), assistant("Yes."))},
        "several_response_turns",
        "more than one decision",
    ),
    case(
        "15 the answer ends with a question",
        "talk",
        lambda n: {"rejected": asked(n, assistant("No."), user("Why?"))},
        "no_final_assistant",
        "rejected ends with a user turn",
    ),
    case(
        "16 an unknown role",
        "talk",
        {"chosen": [user("q"), {"role": "critic", "content": "a"}]},
        "unknown_role",
        r"chosen\[1\] has the role 'critic'; known roles are system, user",
    ),
    case(
        "17 two questions in a row",
        "talk",
        lambda n: talk(user(f"Question {n}?"), user("Well?")),
        "template_refuses",
        r"roles must alternate.*turns: user, user; data\.merge_same_role=true joins",
        "mistral",
    ),
    case(
        "17 the assistant first",
        "talk",
        lambda n: talk(assistant("Hello."), user(f"Question {n}?")),
        "template_refuses",
        r"roles must alternate.*turns: assistant, user\)",
        "llama2",
    ),
    case(
        "25 a prompt written otherwise before an answer",
        "text",
        {"prompt": "A twist?"},
        "template_rerenders_prompt",
        r"the template changes the prompt if an answer follows: 'A twist\?.*' became 'B twist",
        "twisting",
    ),
    case(
        "28 a long prompt",
        "text",
        {"prompt": BYTE * 60},
        "prompt_too_long",
        "the prompt has 68 tokens, 40 are allowed",
        "chatml",
        "data.max_prompt_tokens=40",
    ),
    case(
        "29 one side far too long",
        "text",
        {"rejected": BYTE * 400},
        "response_cut_too_much",
        r"would cut rejected from 401 to \d+ tokens",
        "chatml",
        "data.max_tokens=100",
    ),
    case("31 the same pair again", "text", text_row(3), "duplicate", "the same pair as row 3"),
    case("35 equal scores", "binarized", {"score_chosen": 4.0}, "tie", "score_chosen and score_rejected are both 4"),
    case("35 said to be a tie", "orca", {"status": "tie"}, "tie", "status says 'tie'"),
    case(
        "38 half a character",
        "text",
        {"chosen": "half \ud83d"},
        "not_text",
        r"lone surrogate \(half a character\) at 5",
    ),
    case(
        "41 a picture among messages",
        "talk",
        {"chosen": [user([{"type": "image"}]), assistant("Yes.")]},
        "not_text",
        r"not text.*text only today; image pairs are planned",
    ),
]


@pytest.mark.parametrize(
    ("shape", "cells", "reason", "detail", "rest"),
    with_rest(DROPPED, 4),
)
def test_an_odd_row_is_dropped_and_named(
    tmp_path: Path, shape: str, cells: Any, reason: str, detail: str, rest: tuple[str, ...]
) -> None:
    path = write(tmp_path / "pairs.jsonl", oddly(shape, cells))
    family, *settings = rest or ("chatml",)
    outcome = prepare_file(path, tokenizer_for(family), *settings)
    dropped = [note for note in outcome.report if note["action"] == "dropped"]
    assert [(note["line"], note["row"], note["reason"], note["file"]) for note in dropped] == [
        (number, number, reason, str(path)) for number in ODD
    ]
    assert all(re.search(detail, note["detail"]) for note in dropped), dropped
    assert outcome.rows == [number for number in range(1, CLEAN + 1) if number not in ODD]
    assert "rows: 60 seen, 58 usable, 2 dropped, 0 cut" in outcome.said
    assert f"dropped: {reason} 2\n" in outcome.said


def test_every_row_of_the_table_is_tested() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_table*.py"))
    here = {int(number) for number in re.findall(r'(?:case\(\s*"|"""Row )(\d+)', source)}
    assert here | set(ELSEWHERE) == set(TABLE) and not here & set(ELSEWHERE)
    root = Path(__file__).parents[2]
    for file, test in ELSEWHERE.values():
        assert f"def {test}(" in (root / file).read_text(encoding="utf-8")
