"""The rows of the table of bad input that are fine after all, and those that need a test of their own."""

import csv
import gzip
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from qdpo.cli.data import model_side
from qdpo.data import prepare
from qdpo.data.check import check_data
from qdpo.data.tokens.store import load_pairs
from qdpo.errors import DataError
from qdpo.settings import layered
from tests.conftest import Quiet, save_tiny_base, tiny_rows, write_jsonl
from tests.data.prepared import (
    BYTE,
    CLEAN,
    MANY,
    ODD,
    Row,
    assistant,
    case,
    lines,
    prepare_file,
    rows_of,
    text_row,
    tokenizer_for,
    user,
    write,
)
from tests.data.template_tokenizers import tokenizer_of

ALIASES = [  # a row, the layout that the summary must name
    case("02 question and two models", {"question": "Q", "chatgpt": "Yes", "llama2-13b-chat": "No"}, "text"),
    case(
        "02 instruction and input", {"instruction": "Q", "input": "A text", "chosen": "Yes", "rejected": "No"}, "alpaca"
    ),
    case("02 chosen_response", {"prompt": "Q", "chosen_response": "Yes", "rejected_response": "No"}, "text"),
    case(
        "02 two answers and a winner", {"prompt": "Q", "response_a": "Yes", "response_b": "No", "winner": "a"}, "winner"
    ),
    case("02 a ranked list", {"prompt": "Q", "responses": ["Yes", "No"]}, "ranked"),
    case(
        "10 an HH text", {"chosen": "\n\nHuman: Q\n\nAssistant: Yes", "rejected": "\n\nHuman: Q\n\nAssistant: No"}, "hh"
    ),
    case(
        "12 UltraFeedback",
        {"prompt": "Q", "chosen": [user("Q"), assistant("Yes")], "rejected": [user("Q"), assistant("No")]},
        "ultrafeedback",
    ),
    case(
        "19 a column of system messages",
        {"system": "Be kind.", "question": "Q", "chosen": "Yes", "rejected": "No"},
        "orca",
    ),
]


@pytest.mark.parametrize(("row", "layout"), ALIASES)
def test_a_known_layout_is_found_and_named(tmp_path: Path, row: Row, layout: str) -> None:
    rows = [json.loads(json.dumps(row).replace("Q", f"Question {n}?")) for n in range(9)]
    outcome = prepare_file(write(tmp_path / "pairs.jsonl", rows), tokenizer_of("chatml"))
    assert f"\nlayout: {layout}: " in outcome.said and outcome.rows == list(range(1, 10)) and not outcome.report
    pair = min(outcome.found.train, key=lambda pair: pair.row)
    shown = [tokenizer_of("chatml").decode(ids) for ids in (pair.prompt, pair.chosen, pair.rejected)]
    asked = f"Question {pair.row - 1}?" + "\n\nA text" * (layout == "alpaca")
    system = "<|im_start|>system\nBe kind.<|im_end|>\n" * (layout == "orca")
    before = f"{system}<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    assert shown == [before, "Yes<|im_end|>", "No<|im_end|>"]


def csv_text(rows: list[Row]) -> str:
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue()


def in_cells(write_cell: Callable[[Any], str]) -> str:
    return csv_text([{side: write_cell(cell) for side, cell in row.items()} for row in rows_of("talk")])


ACCEPTED = [  # ending, content; the shape whose clean rows must come out of it
    case(
        "38 a byte order mark and CRLF",
        ".jsonl",
        b"\xef\xbb\xbf" + lines(rows_of("text")).replace("\n", "\r\n").encode(),
        "text",
    ),
    case("38 a byte order mark in CSV", ".csv", b"\xef\xbb\xbf" + csv_text(rows_of("text")).encode(), "text"),
    case("38 gzip without .gz", ".jsonl", gzip.compress(lines(rows_of("text")).encode(), mtime=0), "text"),
    case("39 an array in .jsonl", ".jsonl", json.dumps(rows_of("text")), "text"),
    case("40 messages as JSON in cells", ".csv", in_cells(json.dumps), "talk"),
    case("40 messages as Python writes them in cells", ".csv", in_cells(repr), "talk"),
]


@pytest.mark.parametrize(("ending", "content", "shape"), ACCEPTED)
def test_an_odd_file_gives_the_rows_of_a_clean_one(tmp_path: Path, ending: str, content: Any, shape: str) -> None:
    odd = prepare_file(write(tmp_path / f"odd{ending}", content), tokenizer_of("chatml")).found
    clean = prepare_file(write(tmp_path / "clean.jsonl", rows_of(shape)), tokenizer_of("chatml")).found
    assert [pair.digest for pair in odd.train] == [pair.digest for pair in clean.train] and not odd.notes
    assert len(odd.train) + len(odd.held_out) == CLEAN


def test_code_in_a_cell_is_text_and_never_run(tmp_path: Path) -> None:
    """Row 40: a cell that looks like Python is read as a literal or not at all."""
    trap = tmp_path / "trap"
    code = f"[{{'role': 'user', 'content': open({str(trap)!r}, 'w')}}]"
    path = write(tmp_path / "pairs.csv", csv_text(rows_of("text", {"chosen": code}, ODD)))
    outcome = prepare_file(path, tokenizer_of("chatml"))
    assert outcome.rows == list(MANY) and not trap.exists()


def test_bad_lines_are_left_out_on_demand(tmp_path: Path) -> None:
    """Row 39."""
    written = lines(rows_of("text")).splitlines(keepends=True)
    written[6], written[-1] = '{"prompt": "torn\n', written[-1][:-20]
    outcome = prepare_file(
        write(tmp_path / "pairs.jsonl", "".join(written)), tokenizer_of("chatml"), "data.skip_bad_lines=true"
    )
    assert outcome.noted() == [(7, "dropped", "unreadable_line"), (60, "dropped", "unreadable_line")]
    assert "is not JSON" in outcome.report[0]["detail"] and outcome.rows == [n for n in MANY if n not in (7, 60)]


@pytest.mark.parametrize("name", ["llama2", "llama3", "llama31", "mistral", "gemma", "phi3"])
def test_a_prompt_opens_with_one_bos(tmp_path: Path, name: str) -> None:
    """Row 22: these tokenizers put BOS before any text, and most of their templates write it too."""
    tokenizer = tokenizer_of(name)
    found = prepare_file(write(tmp_path / "pairs.jsonl", rows_of("text")), tokenizer).found
    written = tokenizer.bos_token in tokenizer.apply_chat_template([user("q")], tokenize=False)
    for pair in found.train:
        assert [ids.tolist().count(tokenizer.bos_token_id) for ids in (pair.prompt, pair.chosen, pair.rejected)] == [
            int(written),
            0,
            0,
        ]


def test_a_pad_token_that_ends_texts_changes_nothing(tmp_path: Path) -> None:
    """Row 23: neither tokenizer has BOS; no position is told by its id, so every answer keeps its end."""
    path = write(tmp_path / "pairs.jsonl", rows_of("text"))
    plain, padded = (prepare_file(path, tokenizer_for(name)).found for name in ("chatml", "padded"))
    assert [pair.digest for pair in plain.train] == [pair.digest for pair in padded.train]
    end = tokenizer_of("chatml").eos_token_id
    assert all(pair.chosen[-1] == pair.rejected[-1] == end for pair in padded.train)


def test_a_long_answer_loses_its_end_and_gets_no_other(tmp_path: Path) -> None:
    """Row 29."""
    path = write(tmp_path / "pairs.jsonl", rows_of("text", {"rejected": BYTE * 90}, ODD))
    outcome = prepare_file(path, tokenizer_of("chatml"), "data.max_tokens=80")
    assert outcome.noted() == [(number, "cut", "response_cut") for number in ODD]
    assert "60 usable, 0 dropped, 2 cut" in outcome.said and outcome.rows == list(MANY)
    assert all(re.fullmatch(r"rejected from 91 to 6\d tokens", note["detail"]) for note in outcome.report)
    for pair in (pair for pair in [*outcome.found.train, *outcome.found.held_out] if pair.row in ODD):
        assert len(pair.prompt) + len(pair.rejected) == 80
        assert pair.rejected[-1] != tokenizer_of("chatml").eos_token_id == pair.chosen[-1]


def test_the_longest_pair_is_named_with_its_row(tmp_path: Path) -> None:
    """Row 30: what will set the peak of memory, among the pairs that are used."""
    rows = rows_of("text", {"rejected": BYTE * 300}, ODD[:1])
    rows[40] |= {"rejected": BYTE * 9000}
    outcome = prepare_file(write(tmp_path / "pairs.jsonl", rows), tokenizer_of("chatml"))
    longest = max(pair.tokens for pair in [*outcome.found.train, *outcome.found.held_out])
    assert f"longest pair: {longest} tokens (row 7)" in outcome.said
    assert outcome.noted() == [(41, "dropped", "response_cut_too_much")]


def test_a_pair_and_its_opposite_both_go(tmp_path: Path) -> None:
    """Row 32."""
    rows = rows_of("text")
    rows[22] = {"prompt": rows[6]["prompt"], "chosen": rows[6]["rejected"], "rejected": rows[6]["chosen"]}
    outcome = prepare_file(write(tmp_path / "pairs.jsonl", rows), tokenizer_of("chatml"))
    assert outcome.noted() == [(number, "dropped", "contradiction") for number in ODD]
    assert [note["detail"] for note in outcome.report] == [
        f"row {number} holds the same two answers with the labels swapped" for number in reversed(ODD)
    ]
    assert "dropped: contradiction 2\n" in outcome.said


def test_a_prompt_with_many_pairs_stands_on_one_side(tmp_path: Path) -> None:
    """Row 33."""
    rows = [text_row(n) | {"prompt": f"Question {n % 12}?"} for n in range(CLEAN)]
    path = write(tmp_path / "pairs.jsonl", rows)
    found = prepare_file(path, tokenizer_of("chatml"), "data.eval_fraction=0.3").found
    assert len(found.train) + len(found.held_out) == CLEAN and len(found.held_out) == 15
    assert not {pair.prompt.tobytes() for pair in found.train} & {pair.prompt.tobytes() for pair in found.held_out}


def test_held_out_prompts_that_are_trained_on_are_counted(tmp_path: Path) -> None:
    """Row 34."""
    path = write(tmp_path / "pairs.jsonl", rows_of("text"))
    other = [{**text_row(n), "chosen": f"Of course, {n}."} for n in range(51, 71)]
    held_out = write(tmp_path / "held_out.jsonl", other)
    kept = prepare_file(path, tokenizer_of("chatml"), f"data.eval_path={held_out}")
    assert "warning: 10 held-out prompts are also trained on" in kept.said
    assert "data.drop_overlap=true leaves them out" in kept.said and len(kept.found.held_out) == 20
    path = write(tmp_path / "again.jsonl", rows_of("text"))
    without = prepare_file(path, tokenizer_of("chatml"), f"data.eval_path={held_out}", "data.drop_overlap=true")
    assert "10 held-out pairs left out: their prompts are trained on" in without.said
    assert [pair.row for pair in without.found.held_out] == list(range(11, 21))
    assert len(without.found.train) == CLEAN


def test_data_check_warns_as_a_run_does_and_the_date_is_kept(tmp_path: Path) -> None:
    """Row 20."""
    model = tmp_path / "model"
    tokenizer_of("llama31").save_pretrained(model)
    path = write(tmp_path / "pairs.jsonl", rows_of("text"))
    config = layered.resolve([f"model.path={model}", f"data.path={path}", f"cache.dir={tmp_path / 'cache'}"]).config
    checked = check_data(config, *model_side(config, print), Quiet(), tmp_path / "report.jsonl")
    own, date = checked.report.warnings[-2:]
    assert "puts text of its own before every conversation" in own and "writes a date into prompts" in date
    outcome = prepare_file(path, tokenizer_of("llama31"))
    assert f"warning: {own}\nwarning: {date}\n" in outcome.said
    kept = load_pairs(outcome.run.train_pairs)
    assert [pair.digest for pair in kept] == [pair.digest for pair in outcome.found.train]


def test_an_id_without_an_embedding_stops_a_run_before_it_trains(
    settings: dict[str, str], train: Callable[..., Any], tmp_path: Path
) -> None:
    """Row 45: a token was added to the tokenizer, and the model was left as it was."""
    base = save_tiny_base(tmp_path / "grown")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(base)
    rows = tiny_rows(40)
    rows[6]["chosen"] += " <new>"
    data = write_jsonl(tmp_path / "new.jsonl", rows)
    size = len(tokenizer) - 1
    with pytest.raises(
        DataError, match=rf"Row 7 has the token '<new>' with the id {size}, .* only for ids below {size}"
    ):
        train(model__path=str(base), data__path=str(data), output__name="grown")
    assert not (tmp_path / "runs" / "grown").exists()
    fitting = prepare_file(write_jsonl(tmp_path / "old.jsonl", tiny_rows(40)), tokenizer).found
    prepare.check_ids(fitting.train, size, tokenizer)
