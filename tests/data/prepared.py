"""A data set written to a file and prepared as a run prepares it, for tests that look at what became of each row."""

import copy
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qdpo.data import prepare, stored
from qdpo.data.prepare import PreparedData
from qdpo.run.folder import RunDir
from qdpo.settings import layered
from tests.conftest import Quiet
from tests.data.template_tokenizers import FAMILIES, tokenizer_of

Row = dict[str, Any]
CLEAN = 60
"""Rows of a clean set: enough that two odd ones stay below data.max_drop_fraction."""
MANY = range(1, CLEAN + 1)
"""Their numbers."""
ODD = (7, 23)
"""Numbers of the rows that are made odd, of 60."""
BYTE = "\x01"
"""One token each in byte-level tokenizers: no training text holds it."""


@dataclass(frozen=True)
class Outcome:
    """What a run would train on, what it said, and the lines of its data_report.jsonl."""

    found: PreparedData
    said: str
    report: list[dict[str, Any]]
    run: RunDir

    @property
    def rows(self) -> list[int]:
        """Numbers of the rows that are used, in order."""
        return sorted(pair.row for pair in [*self.found.train, *self.found.held_out])

    def noted(self) -> list[tuple[int, str, str]]:
        """Line, action and reason of each line of the report."""
        return [(note["line"], note["action"], note["reason"]) for note in self.report]


def write(path: Path, content: Sequence[Row] | str | bytes) -> Path:
    """The file with these rows as JSON lines, or with this text as it is."""
    if not isinstance(content, str | bytes):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def prepare_file(path: Path, tokenizer: Any, *settings: str) -> Outcome:
    """Prepares the file with these settings. Raises what a run would raise."""
    config = layered.resolve(["model.path=none-needed", f"data.path={path}", *settings]).config
    watcher, run = Quiet(), RunDir(Path(tempfile.mkdtemp(dir=path.parent)))
    found = prepare.prepare_data(config.data, tokenizer, seed=0, watcher=watcher)
    stored.store(run, found)
    lines = run.data_report.read_text(encoding="utf-8").splitlines()
    return Outcome(found, watcher.text, [json.loads(line) for line in lines], run)


def user(text: Any) -> Row:
    return {"role": "user", "content": text}


def assistant(text: Any) -> Row:
    return {"role": "assistant", "content": text}


def text_row(number: int) -> Row:
    return {"prompt": f"Question {number}?", "chosen": f"Yes, {number}.", "rejected": f"No, not at all {number}."}


def talk_row(number: int) -> Row:
    """Two exchanges as messages, the prompt inside the answers."""
    shared = [user(f"Question {number}?"), assistant("Which one?"), user("That one.")]
    return {"chosen": [*shared, assistant("Yes.")], "rejected": [*shared, assistant("No, never.")]}


def hh_row(number: int) -> Row:
    shared = f"\n\nHuman: Question {number}?\n\nAssistant:"
    return {"chosen": f"{shared} Yes.", "rejected": f"{shared} No, never."}


def binarized_row(number: int) -> Row:
    """UltraFeedback: the prompt as text, and again at the front of both answers; scores."""
    question = f"Question {number}?"
    row = {side: [user(question), assistant(text)] for side, text in (("chosen", "Yes."), ("rejected", "No, never."))}
    return {"prompt": question, **row, "score_chosen": 8.0, "score_rejected": 4.0}


def orca_row(number: int) -> Row:
    return {"system": "Be kind.", "question": f"Question {number}?", "chosen": "Yes.", "rejected": "No, never."}


SHAPES = {"text": text_row, "talk": talk_row, "hh": hh_row, "binarized": binarized_row, "orca": orca_row}


def rows_of(shape: str, odd: Row | None = None, at: Sequence[int] = ()) -> list[Row]:
    """A clean set of this shape, with the cells of `odd` in the rows with these numbers (counted from 1)."""
    rows = [SHAPES[shape](number) for number in range(1, CLEAN + 1)]
    for number in at:
        rows[number - 1] |= odd or {}
    return rows


def oddly(shape: str, cells: Any) -> list[Row]:
    """A clean set of this shape whose odd rows have these cells, or those that `cells` makes of the row's number."""
    rows = rows_of(shape)
    for number in ODD:
        rows[number - 1] |= cells(number) if callable(cells) else cells
    return rows


def with_rest(cases: Sequence[Any], named: int) -> list[Any]:
    """Cases of which the first values have names of their own, and all that follow are one more, `rest`."""
    return [pytest.param(*each.values[:named], each.values[named:], id=each.id) for each in cases]


def lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def case(name: str, *values: Any) -> Any:
    """A row of the table: its number, and a word to tell it from others of that number."""
    return pytest.param(*values, id=f"row {name}")


def talk(*turns: Row) -> Row:
    """Both answers behind the same turns."""
    return {"chosen": [*turns, assistant("Yes.")], "rejected": [*turns, assistant("No, never.")]}


def asked(number: int, *last: Row) -> list[Row]:
    """The prompt of the talk row with this number, and what follows it."""
    return [user(f"Question {number}?"), assistant("Which one?"), user("That one."), *last]


TWISTING = (
    "{% for m in messages %}{{ m.content.replace('A', 'A' if add_generation_prompt else 'B') }}\n{% endfor %}"
    "{% if not add_generation_prompt %}<|im_end|>{% endif %}"
)


def tokenizer_for(name: str) -> Any:
    """A family's tokenizer, or that of ChatML without template or end token, with a pad token, or an odd template."""
    if name in FAMILIES:
        return tokenizer_of(name)
    tokenizer = copy.deepcopy(tokenizer_of("chatml"))
    if name == "endless":
        tokenizer.eos_token = None
    elif name == "padded":
        tokenizer.pad_token = tokenizer.eos_token
    else:
        tokenizer.chat_template = {"base": None, "twisting": TWISTING}[name]
    return tokenizer
