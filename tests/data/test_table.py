"""Bad input, row by row: whether each kind is refused, dropped, mended or warned of, under which name and how often.

The rows are numbered as in the table of 45 that the data room was designed from. Each is written to a file and
prepared as a run prepares it.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdpo.errors import DataError
from tests.data.prepared import (
    BYTE,
    CLEAN,
    MANY,
    ODD,
    Row,
    asked,
    assistant,
    case,
    lines,
    prepare_file,
    rows_of,
    talk,
    text_row,
    tokenizer_for,
    user,
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
        r"part at turn 1 \(Question \d+\? / Other\?\)",
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
        r"part at turn 2 \(Which one\? / Hm\.\).*more than one decision",
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
        r"another prompt: 'A twist\?.*' became 'B twist",
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
    case("38 half a character", "text", {"chosen": "half \ud83d"}, "not_text", r"lone surrogate\) at 5"),
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
    [pytest.param(*param.values[:4], param.values[4:], id=param.id) for param in DROPPED],
)
def test_an_odd_row_is_dropped_and_named(
    tmp_path: Path, shape: str, cells: Any, reason: str, detail: str, rest: tuple[str, ...]
) -> None:
    rows = rows_of(shape)
    for number in ODD:
        rows[number - 1] |= cells(number) if callable(cells) else cells
    path = write(tmp_path / "pairs.jsonl", rows)
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


def column(name: str, of: Callable[[int], Row] = text_row, **more: Any) -> list[Row]:
    """Clean rows whose column `chosen` is called otherwise."""
    return [{(name if key == "chosen" else key): cell for key, cell in of(n).items()} | more for n in range(20)]


REFUSED = [  # ending, content, message, settings
    case(
        "01 a column of another name",
        ".jsonl",
        column("chosn"),
        r"no column 'chosen'; it has: prompt, chosn, rejected\. Did you mean 'chosn'\? Map "
        r".*data\.columns\.chosen=NAME",
    ),
    case(
        "01 a mapping to nothing",
        ".jsonl",
        column("good"),
        r"data\.columns\.chosen=god names a column that .* does not have\. Did you mean 'good'\? It has: "
        "prompt, good, rejected",
        "data.columns.chosen=god",
    ),
    case(
        "03 two formats in one set",
        ".jsonl",
        column("chosen", response_a="x", response_b="y", winner="a"),
        r"several ways: winner \(.*\); pairs \(.*\)\. Say which is meant with data\.format=",
    ),
    case(
        "04 rows of two formats",
        ".jsonl",
        [*rows_of("binarized"), *rows_of("text")],
        r"rows differ in format\. Column 'chosen' holds messages in row 1 and text in row 61\.",
    ),
    case(
        "07 more than a tenth",
        ".jsonl",
        rows_of("text", {"chosen": None}, range(1, 8)),
        r"12% of the pairs cannot be used \(null_field 7\), more than data\.max_drop_fraction=0\.1 allows\. "
        r".*pairs\.jsonl, line 1, for one: chosen is empty \(null\)\. `qdpo data check`.*set "
        r"data\.max_drop_fraction",
    ),
    case(
        "07 most rows",
        ".jsonl",
        rows_of("text", {"chosen": 3}, range(1, 50)),
        r"49 of 60 rows looked at cannot be used \(not_text\)\. Row 1: chosen holds int.*name other columns "
        r"with data\.columns",
    ),
    case(
        "08 nothing but empty lists",
        ".jsonl",
        rows_of("talk", {"rejected": []}, MANY),
        r"column 'rejected' holds neither text nor messages in any of 60 rows looked at \(row 1: '\[\]'\)",
    ),
    case("08 no rows", ".jsonl", "\n\n", r"holds no rows\. Was it written to the end\?"),
    case("08 no bytes", ".csv", "", r"is empty \(0 bytes\)"),
    case(
        "08 nothing left",
        ".jsonl",
        rows_of("text", {"chosen": "x", "rejected": "x"}, MANY),
        r"None of the 60 rows can be used \(identical_responses 60\)\. Row 1: chosen and rejected are the "
        r"same text: 'x'\. Check data\.path",
    ),
    case(
        "09 no answers at the end",
        ".jsonl",
        rows_of("talk", {"chosen": [user("q")]}, MANY),
        r"60 of 60 rows looked at cannot be used \(no_final_assistant\)\. Row 1: chosen ends with a user "
        r"turn\. .*must end with the assistant's answer",
    ),
    case(
        "11 plain texts without a prompt",
        ".jsonl",
        [{"chosen": f"{n}. Yes.", "rejected": f"{n}. No."} for n in range(9)],
        "no prompt column and no .*Cutting both texts where their letters begin to differ would cut into the "
        r"answers\. Name the prompt with data\.columns\.prompt=NAME",
    ),
    case(
        "15 several messages everywhere",
        ".jsonl",
        [
            {
                "chosen": asked(n, assistant("Wait."), user("Well?"), assistant("Yes.")),
                "rejected": asked(n, assistant("No.")),
            }
            for n in MANY
        ],
        r"60 of 60 rows looked at cannot be used \(several_response_turns\)\. Row 1: "
        r".*data\.last_answer_only=true keeps",
    ),
    case(
        "16 unknown roles everywhere",
        ".jsonl",
        rows_of("talk", {"chosen": [user("q"), {"role": "critic", "content": "a"}]}, range(5, 61)),
        r"56 of 60 rows looked at cannot be used \(unknown_role\)\. Row 5: chosen\[1\] has the role 'critic'; "
        r"known roles are .*\. Rename the roles\.",
    ),
    case(
        "18 a system message, asked to stop",
        ".jsonl",
        rows_of("orca"),
        r"does not take a system message \(System role not supported.*data\.refused_system=error\. Use "
        r"data\.refused_system=fold",
        "data.refused_system=error",
        "gemma",
    ),
    case(
        "21 conversations for a base model",
        ".jsonl",
        rows_of("talk"),
        r"no chat template: it belongs to a base model\. Use the instruct version.*data\.template=chatml",
        "base",
    ),
    case(
        "23 no end of text",
        ".jsonl",
        rows_of("text"),
        r"no end-of-text token, so answers could not be taught to end\. Set eos_token in its tokenizer_config\.json",
        "data.template=plain",
        "endless",
    ),
    case(
        "38 not UTF-8",
        ".jsonl",
        lines(rows_of("text")).encode() + b'{"prompt": "caf\xe9"}\n',
        r"line 61: byte 16 of the line is not UTF-8 \(0xe9\)\. Save the file as UTF-8",
    ),
    case("38 not UTF-8 in an array", ".json", b'[{"prompt": "caf\xe9"}]', r"byte 17 of the file is not UTF-8 \(0xe9\)"),
    case(
        "38 a surrogate as bytes",
        ".jsonl",
        b'{"prompt": "\xed\xa0\xbd"}\n',
        r"line 1: byte 13 of the line is not UTF-8 \(0xed\)",
    ),
    case(
        "38 UTF-16",
        ".csv",
        "prompt,chosen,rejected\n".encode("utf-16"),
        r"is UTF-16\. Save it as UTF-8 \(`iconv -f UTF-16 -t UTF-8`\)",
    ),
    case(
        "38 a NUL far down",
        ".jsonl",
        b'{"a": "b"}\n' * 100 + b'{"a": "\0"}\n',
        r"holds a NUL byte \(byte 1108 of the file\)",
    ),
    case(
        "38 a NUL far down an array",
        ".json",
        b'[{"a": "' + b"b" * 2**21 + b'"},\n{"a": "\0"}]',
        r"holds a NUL byte \(byte 2097172 of the file\)",
    ),
    case("38 a zip archive", ".jsonl", b"PK\x03\x04\x14\0", r"is a zip archive\. Unpack it"),
    case(
        "39 a comma at the end of an array",
        ".jsonl",
        json.dumps(rows_of("text"), indent=0)[:-2] + ",\n]",
        r"""line 302 is not JSON \(.*\): '.*all 60\."\\n},\\n]'\. Mend it there""",
    ),
    case(
        "39 a bad line",
        ".jsonl",
        lines([text_row(1)]) + "{'prompt': 'q'}\n" + lines([text_row(2)]),
        r"""line 2 is not JSON \(.*\): "{'prompt': 'q'}"\. Mend or remove the line \(data\.skip_bad_lines=true""",
    ),
    case(
        "39 a torn last line",
        ".jsonl",
        lines(rows_of("text"))[:-30],
        r"""line 60 is not JSON \(Unterminated string.*\): '{"prompt": "Question 60\?".*data\.skip_bad_lines""",
    ),
    case(
        "41 a column of pictures",
        ".jsonl",
        column("chosen", images=[], audio=None),
        r"columns 'audio', 'images': pairs with pictures or sound\. qdpo trains on text only today \(image "
        r"pairs are planned\)",
    ),
    case(
        "41 pictures in all messages",
        ".jsonl",
        rows_of("talk", {"chosen": [user([{"type": "image"}]), assistant("Yes.")]}, MANY),
        r"60 of 60 rows .*text only today; image pairs are planned",
    ),
    case(
        "42 answers with a label",
        ".jsonl",
        [{"prompt": "q", "completion": f"a{n}", "label": True} for n in range(9)],
        r"single answers with a label \(columns prompt, completion, label\), not pairs.*TRL's KTOTrainer",
    ),
    case(
        "42 one answer a row",
        ".jsonl",
        [{"messages": [user("q"), assistant(f"a{n}")]} for n in range(9)],
        r"one answer a row \(columns messages\): data for supervised fine-tuning \(TRL's SFTTrainer\)",
    ),
    case(
        "43 a pointer of Git LFS",
        ".parquet",
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        r"is a Git LFS pointer, not the data\. Run `git lfs pull`",
    ),
]


@pytest.mark.parametrize(
    ("ending", "content", "message", "rest"),
    [pytest.param(*param.values[:3], param.values[3:], id=param.id) for param in REFUSED],
)
def test_a_data_set_is_refused_with_a_way_out(
    tmp_path: Path, ending: str, content: Any, message: str, rest: tuple[str, ...]
) -> None:
    settings = [word for word in rest if "=" in word]
    (family,) = [word for word in rest if "=" not in word] or ["chatml"]
    with pytest.raises(DataError, match=message) as error:
        prepare_file(write(tmp_path / f"pairs{ending}", content), tokenizer_for(family), *settings)
    assert error.value.exit_code == 3


def test_every_row_of_the_table_is_tested() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_table*.py"))
    here = {int(number) for number in re.findall(r'(?:case\(\s*"|"""Row )(\d+)', source)}
    assert here | set(ELSEWHERE) == set(TABLE) and not here & set(ELSEWHERE)
    root = Path(__file__).parents[2]
    for file, test in ELSEWHERE.values():
        assert f"def {test}(" in (root / file).read_text(encoding="utf-8")
