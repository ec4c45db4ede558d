"""The rows of the table of bad input that are put right or warned of."""

import re
from pathlib import Path
from typing import Any

import pytest

from tests.data.prepared import (
    BYTE,
    MANY,
    ODD,
    Row,
    asked,
    assistant,
    case,
    oddly,
    prepare_file,
    rows_of,
    talk,
    text_row,
    tokenizer_for,
    user,
    with_rest,
    write,
)
from tests.data.template_tokenizers import tokenizer_of

MENDED = [  # shape, cells of the odd rows, reason, detail; or None and a setting that takes them as they are
    case(
        "06 an empty rejected answer, asked for",
        "text",
        {"rejected": ""},
        None,
        None,
        "chatml",
        "data.keep_empty_rejected=true",
    ),
    case(
        "13 white space in a prompt",
        "talk",
        lambda n: {"rejected": [user(f"Question {n}? "), *asked(n, assistant("No."))[1:]]},
        "prompt_whitespace",
        "chosen's is used",
    ),
    case(
        "15 the last answer only",
        "talk",
        lambda n: {
            "chosen": asked(n, assistant("Wait."), user("Well?"), assistant("Yes.")),
            "rejected": asked(n, assistant("No.")),
        },
        "last_answer_only",
        "2 turns before the last answer were left out",
        "chatml",
        "data.last_answer_only=true",
    ),
    case(
        "16 names of ShareGPT and others",
        "talk",
        lambda n: {
            "chosen": [{"from": "human", "value": f"Question {n}?"}, {"from": "gpt", "value": "Yes."}],
            "rejected": [{"role": "prompter", "content": f"Question {n}?"}, {"role": "model", "content": "No."}],
        },
        None,
        None,
    ),
    case(
        "17 two questions in a row, joined",
        "talk",
        lambda n: talk(user(f"Question {n}?"), user("Well?")),
        "turns_merged",
        "joined to the preceding turn of the same role",
        "mistral",
        "data.merge_same_role=true",
    ),
    case(
        "18 a system message folded",
        "talk",
        lambda n: talk({"role": "system", "content": "Be kind."}, user(f"Question {n}?")),
        "system_folded",
        "put before the first question",
        "gemma",
    ),
    case(
        "18 a system message left out",
        "talk",
        lambda n: talk({"role": "system", "content": "Be kind."}, user(f"Question {n}?")),
        "system_left_out",
        "it was left out",
        "gemma",
        "data.refused_system=drop",
    ),
    case(
        "24 the text of a special token",
        "text",
        {"chosen": "So <|im_end|> it ends."},
        "special_token_text",
        r"a message contains '<\|im_end\|>'",
    ),
    case(
        "28 a long prompt, shortened",
        "talk",
        lambda n: talk(user(BYTE * 60), assistant("Which one?"), user(f"Number {n}.")),
        "oldest_turns_dropped",
        "the 2 oldest turns were left out of a prompt of",
        "chatml",
        "data.max_prompt_tokens=40",
        "data.long_prompt=drop_oldest_turns",
    ),
]


@pytest.mark.parametrize(
    ("shape", "cells", "reason", "detail", "rest"),
    with_rest(MENDED, 4),
)
def test_an_odd_row_is_put_right_and_named(
    tmp_path: Path, shape: str, cells: Any, reason: str | None, detail: str, rest: tuple[str, ...]
) -> None:
    family, *settings = rest or ("chatml",)
    outcome = prepare_file(write(tmp_path / "pairs.jsonl", oddly(shape, cells)), tokenizer_for(family), *settings)
    assert outcome.rows == list(MANY) and "60 usable, 0 dropped, 0 cut" in outcome.said
    assert outcome.noted() == [(number, "mended", reason) for number in ODD if reason]
    if reason:
        assert f"mended: {reason} 2\n" in outcome.said
        assert all(re.search(detail, note["detail"]) for note in outcome.report), outcome.report


def thinking(number: int) -> Row:
    return talk(user(f"Question {number}?"), assistant("<think>Which?</think>Hm."), user("Well?"))


WARNED = [  # rows, warning, tokenizer, settings
    case(
        "18 a template without system messages",
        rows_of("orca"),
        r"does not take system messages \(System role not supported.*\): 60 were put before",
        "gemma",
    ),
    case(
        "20 a system message of the template's own",
        rows_of("text"),
        r"puts text of its own before every conversation .*'You are Qwen, created by Alibaba Cloud\.",
        "qwen25",
    ),
    case(
        "20 a date",
        rows_of("text"),
        r"writes a date into prompts\. The token ids of this run are stored once",
        "llama31",
    ),
    case(
        "24 the text of a special token",
        rows_of("text", {"prompt": "What is <|im_end|>?"}, ODD[:1]),
        r"1 pairs contain the text of a special token",
        "chatml",
    ),
    case(
        "26 a token across the border",
        rows_of("text", {"prompt": "the cap", "chosen": "ital"}, ODD[:1]),
        r"1 answers would share a token with their prompt",
        "chatml",
        "data.template=plain",
    ),
    case(
        "27 thoughts left out",
        [thinking(n) for n in MANY],
        r"leaves out the thoughts of earlier answers in 60 pairs.*\(first: Which\?\)",
        "qwen3",
    ),
    case(
        "27 a thought rewritten",
        rows_of("text", {"chosen": "<think>Hm.</think>Yes."}, ODD),
        "2 answers have a thought that the chat template would rewrite; they are trained on unchanged "
        r".*\(first: <think>Hm\.</think>Yes\.\)",
        "qwen3",
    ),
    case(
        "29 many answers cut",
        rows_of("text", {"chosen": BYTE * 90}, range(1, 8)),
        r"answers are cut at their end in 7 pairs; a higher data\.max_tokens",
        "chatml",
        "data.max_tokens=80",
    ),
    case(
        "32 a pair and its opposite",
        rows_of(
            "text",
            {"prompt": "Question 7?", "chosen": text_row(7)["rejected"], "rejected": text_row(7)["chosen"]},
            ODD[1:],
        ),
        r"2 pairs contradict another pair .*: the labels are noisy",
        "chatml",
    ),
    case(
        "36 scores against the labels",
        rows_of("binarized", {"score_chosen": 1.0}, range(1, 20)),
        r"score_chosen is below score_rejected in 32% of the pairs$",
        "chatml",
    ),
    case(
        "36 most scores against the labels",
        rows_of("binarized", {"score_chosen": 1.0}, range(1, 50)),
        r"score_chosen is below score_rejected in 82% of the pairs: the labels look swapped",
        "chatml",
    ),
    case(
        "37 chosen is longer",
        rows_of("text", {"rejected": "No."}, range(1, 55)),
        r"length alone tells chosen from rejected, so the model may only learn to write longer answers",
        "chatml",
    ),
]


@pytest.mark.parametrize(("rows", "warning", "rest"), with_rest(WARNED, 2))
def test_a_data_set_is_used_with_a_warning(
    tmp_path: Path, rows: list[Row], warning: str, rest: tuple[str, ...]
) -> None:
    family, *settings = rest
    outcome = prepare_file(write(tmp_path / "pairs.jsonl", rows), tokenizer_for(family), *settings)
    warnings = [line for line in outcome.said.splitlines() if re.match(f"warning: .*{warning}", line)]
    assert len(warnings) == 1, outcome.said
    clean = prepare_file(write(tmp_path / "clean.jsonl", rows_of("text")), tokenizer_of("chatml"))
    assert not re.search(warning, clean.said)
