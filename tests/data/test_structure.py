"""Text that looks like structure stays text; structure that a table adds of its own is taken away again."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from qdpo.data.layouts.turns import kind_of
from tests.data.prepared import Row, case, prepare_file, user, write
from tests.data.template_tokenizers import tokenizer_of
from tests.templates.tokenizers import KEPT, tokenizer_of_file

ANSWERS = [  # what makes the answers of row n
    case("a trip", lambda n: [{"from": "Paris", "to": f"Rome {n}"}, {"from": "Rome", "to": f"Paris {n}"}]),
    case("a person", lambda n: [{"role": "doctor", "name": f"Ann {n}"}, {"role": "nurse", "name": f"Ann {n}"}]),
    case("a list of people", lambda n: [[{"role": "admin", "id": n}], [{"role": "guest", "id": n}]]),
    case("a known role", lambda n: [{"role": "user", "rights": n}, {"role": "system", "rights": n}]),
    case("a known sender", lambda n: [{"from": "human", "to": f"gpt {n}"}, {"from": "gpt", "to": f"human {n}"}]),
    case("a mail", lambda n: [{"from": "Ann", "content": f"Hello {n}"}, {"from": "Bob", "content": f"Bye {n}"}]),
    case("messages on one side", lambda n: [[{"role": "user", "content": f"Hi {n}"}], f"I cannot {n}"]),
]

QWEN = KEPT / "published" / "Qwen-Qwen2.5-7B-Instruct.jinja"


def texts(path: Path, *settings: str) -> list[tuple[str, str, str]]:
    """Prompt, chosen and rejected of each pair, as the model reads them."""
    tokenizer = tokenizer_of("chatml")
    found = prepare_file(path, tokenizer, *settings).found
    pairs = sorted([*found.train, *found.held_out], key=lambda pair: pair.row)
    return [tuple(map(tokenizer.decode, (pair.prompt, pair.chosen, pair.rejected))) for pair in pairs]


@pytest.mark.parametrize("write_cell", [json.dumps, repr], ids=["json", "python"])
@pytest.mark.parametrize("answers_of", ANSWERS)
def test_an_answer_in_json_is_text(tmp_path: Path, answers_of: Any, write_cell: Any) -> None:
    rows = []
    for n in range(12):
        sides = [side if isinstance(side, str) else write_cell(side) for side in answers_of(n)]
        rows.append({"prompt": f"Question {n}?", "chosen": sides[0], "rejected": sides[1]})
    written = io.StringIO(newline="")
    table = csv.DictWriter(written, list(rows[0]))
    table.writeheader()
    table.writerows(rows)
    for path in (write(tmp_path / "a.jsonl", rows), write(tmp_path / "a.csv", written.getvalue())):
        found = texts(path)
        assert [(chosen, rejected) for _prompt, chosen, rejected in found] == [
            (f"{row['chosen']}<|im_end|>", f"{row['rejected']}<|im_end|>") for row in rows
        ]


def test_messages_that_are_spelt_out_are_still_messages() -> None:
    spelt = [
        [user("q"), {"role": "assistant", "content": "a"}],
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}],
        [{"role": "bot", "content": "an unknown role, to be refused by its name"}],
        {"role": "assistant", "content": "a"},
    ]
    assert [kind_of(json.dumps(cell)) for cell in spelt] == ["encoded"] * len(spelt)


def tool(name: str, **properties: Row) -> Row:
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


def called(name: str, **arguments: Any) -> list[Row]:
    return [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}]


def tool_rows() -> list[Row]:
    text = {"type": "string"}
    return [
        {
            "prompt": [user(f"Question {n}?")],
            "chosen": called("weather", city="Paris") if n % 2 else called("stock", ticker="IBM", days=n),
            "rejected": [{"role": "assistant", "content": f"No idea {n}."}],
            "tools": [tool("weather", city=text), tool("time")] if n % 2 else [tool("stock", ticker=text, days=text)],
        }
        for n in range(8)
    ]


@pytest.mark.parametrize("ending", [".parquet", ".arrow"])
def test_a_table_gives_the_tools_and_calls_of_its_json_lines(tmp_path: Path, ending: str) -> None:
    tokenizer = tokenizer_of_file(QWEN)
    rows, table = tool_rows(), pyarrow.Table.from_pylist(tool_rows())
    path = tmp_path / f"tools{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        pyarrow.feather.write_feather(table, path)
    lines = prepare_file(write(tmp_path / "tools.jsonl", rows), tokenizer).found
    stored = prepare_file(path, tokenizer).found
    assert [pair.digest for pair in stored.train] == [pair.digest for pair in lines.train]
    assert "null" not in tokenizer.decode(stored.train[0].prompt) + tokenizer.decode(stored.train[0].chosen)


def test_a_null_that_the_author_wrote_stays(tmp_path: Path) -> None:
    rows = tool_rows()
    for row in rows:
        row["tools"] = [tool("weather", city={"type": "string", "default": None})]
    found = prepare_file(write(tmp_path / "tools.jsonl", rows), tokenizer_of_file(QWEN)).found
    assert '"default": null' in tokenizer_of_file(QWEN).decode(found.train[0].prompt)
