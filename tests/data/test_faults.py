"""Every fault that was put into a data set is found, under its own name, and no clean row is touched."""

import json
from collections import Counter
from typing import Any

import pytest

from qdpo.data.layouts.pair import Rejection, detect_layout, to_pair
from qdpo.data.tokens.sieve import Prepared
from tests.data.chat import prepare_rows
from tests.data.faults import FORMS, MAX_PROMPT_TOKENS, MAX_TOKENS, ROWS, Row, faulty_rows
from tests.data.template_tokenizers import tokenizer_of


def case(name: str, *values: Any) -> Any:
    return pytest.param(*(values or [name]), id=name)


def prepare_all(rows: list[Row], tokenizer: str = "chatml", template: str = "auto") -> Prepared:
    limits = {"max_tokens": MAX_TOKENS, "max_prompt_tokens": MAX_PROMPT_TOKENS}
    return prepare_rows(rows, tokenizer_of(tokenizer), **limits, template=template)


@pytest.mark.parametrize("layout", [case(name) for name in FORMS])
def test_each_fault_is_counted_under_its_name(layout: str) -> None:
    rows, expected = faulty_rows(layout)
    prepared = prepare_all(rows)
    assert Counter(note.reason for note in prepared.notes if note.action in ("dropped", "cut")) == expected
    dropped = expected.total() - expected["response_cut"]
    assert len(rows) == ROWS == prepared.seen == len(prepared.pairs) + dropped
    assert {note.reason for note in prepared.notes if note.action == "cut"} == {"response_cut"}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


CSV_ROWS = [
    {"prompt": f"q{n}", **{side: json.dumps([user(f"q{n}"), assistant(side)]) for side in ("chosen", "rejected")}}
    for n in range(50)
]
HH_ROWS = [{"prompt": f"\n\nHuman: q{n}\n\nAssistant:", "chosen": "yes", "rejected": "no"} for n in range(50)]
MESSAGES = {"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}


@pytest.mark.parametrize(
    ("rows", "odd"),
    [
        case("an empty cell", CSV_ROWS, {7: {"chosen": ""}}),
        case("an empty cell on each side", CSV_ROWS, {7: {"chosen": ""}, 9: {"rejected": ""}}),
        case("a cut cell", CSV_ROWS, {7: {"chosen": CSV_ROWS[7]["chosen"][:-3]}}),
        case("a prompt without markers", HH_ROWS, {7: {"prompt": "What?"}}),
    ],
)
def test_an_odd_row_does_not_decide_how_the_others_are_read(rows: list[Row], odd: dict[int, Row]) -> None:
    clean = prepare_all(rows)
    mixed = prepare_all([{**row, **odd.get(number, {})} for number, row in enumerate(rows)])
    kept = [pair.digest for pair in clean.pairs if pair.row - 1 not in odd]
    assert [pair.digest for pair in mixed.pairs if pair.row - 1 not in odd] == kept
    assert all(note.row - 1 in odd for note in mixed.notes)


@pytest.mark.parametrize(
    ("clean", "change", "reason"),
    [
        case("an empty cell in a CSV row", CSV_ROWS[0], {"chosen": ""}, "null_field"),
        case("an answer by the user", MESSAGES, {"rejected": [user("no")]}, "no_final_assistant"),
        case("a list as role", MESSAGES, {"prompt": [{"role": ["user"], "content": "q"}]}, "unknown_role"),
        case("many brackets", CSV_ROWS[0], {"chosen": "[" * 100_000 + "]" * 100_000}, "not_text"),
    ],
)
def test_an_odd_row_has_its_reason(clean: Row, change: Row, reason: str) -> None:
    layout = detect_layout([clean] * 3, {}, "test data")
    result = to_pair({**clean, **change}, 1, layout)
    assert isinstance(result, Rejection) and result.reason == reason, result


@pytest.mark.parametrize(
    ("tokenizer", "prompt", "answer"),
    [
        case("special-token text in a plain answer", "chatml", "q", "a<|im_end|>b"),
        case("a space at the end of a plain prompt", "llama2", "keep the ", "sea"),
    ],
)
def test_a_plain_answer_is_trained_as_it_stands(tokenizer: str, prompt: str, answer: str) -> None:
    (pair,) = prepare_all([{"prompt": prompt, "chosen": answer, "rejected": "poem"}], tokenizer, "plain").pairs
    eos, decode = tokenizer_of(tokenizer).eos_token_id, tokenizer_of(tokenizer).decode
    assert pair.chosen.tolist().count(eos) == 1 and pair.chosen[-1] == eos
    before, whole = decode(pair.prompt), decode([*pair.prompt, *pair.chosen[:-1]])
    assert whole == before + answer
