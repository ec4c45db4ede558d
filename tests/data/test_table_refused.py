"""The rows of the table of bad input that keep a whole data set from being used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qdpo.errors import DataError
from tests.data.prepared import (
    MANY,
    Row,
    asked,
    assistant,
    case,
    lines,
    prepare_file,
    rows_of,
    text_row,
    tokenizer_for,
    user,
    with_rest,
    write,
)


def column(name: str, of: Callable[[int], Row] = text_row, **more: Any) -> list[Row]:
    """Clean rows whose column `chosen` is called otherwise."""
    return [{(name if key == "chosen" else key): cell for key, cell in of(n).items()} | more for n in range(20)]


REFUSED = [  # ending, content, message, settings
    case(
        "01 a column of another name",
        ".jsonl",
        column("chosn"),
        r"no column 'chosen'; its columns are: prompt, chosn, rejected\. Did you mean 'chosn'\? Name "
        r".*data\.columns\.chosen=NAME",
    ),
    case(
        "01 a mapping to nothing",
        ".jsonl",
        column("good"),
        r"data\.columns\.chosen=god names a column that .* does not have\. Did you mean 'good'\? Its columns are: "
        "prompt, good, rejected",
        "data.columns.chosen=god",
    ),
    case(
        "03 two formats in one set",
        ".jsonl",
        column("chosen", response_a="x", response_b="y", winner="a"),
        r"several ways: winner \(.*\); pairs \(.*\)\. Choose one with data\.format=",
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
        r"For example .*pairs\.jsonl, line 1: chosen is empty \(null\)\. `qdpo data check`.*raise "
        r"data\.max_drop_fraction",
    ),
    case(
        "07 most rows",
        ".jsonl",
        rows_of("text", {"chosen": 3}, range(1, 50)),
        r"49 of 60 sampled rows cannot be used \(not_text\)\. Row 1: chosen holds int.*name other columns "
        r"with data\.columns",
    ),
    case(
        "08 nothing but empty lists",
        ".jsonl",
        rows_of("talk", {"rejected": []}, MANY),
        r"column 'rejected' holds neither text nor messages in any of 60 rows looked at \(row 1: '\[\]'\)",
    ),
    case("08 no rows", ".jsonl", "\n\n", r"has no rows\. Check that it was written to the end\."),
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
        r"60 of 60 sampled rows cannot be used \(no_final_assistant\)\. Row 1: chosen ends with a user "
        r"turn\. .*must end with the assistant's answer",
    ),
    case(
        "11 plain texts without a prompt",
        ".jsonl",
        [{"chosen": f"{n}. Yes.", "rejected": f"{n}. No."} for n in range(9)],
        "no prompt column and no .*Splitting both texts where their letters begin to differ would cut into the "
        r"answers\. Name the prompt column with data\.columns\.prompt=NAME",
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
        r"60 of 60 sampled rows cannot be used \(several_response_turns\)\. Row 1: "
        r".*data\.last_answer_only=true keeps",
    ),
    case(
        "16 unknown roles everywhere",
        ".jsonl",
        rows_of("talk", {"chosen": [user("q"), {"role": "critic", "content": "a"}]}, range(5, 61)),
        r"56 of 60 sampled rows cannot be used \(unknown_role\)\. Row 5: chosen\[1\] has the role 'critic'; "
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
        r"no chat template \(it belongs to a base model\)\. Use the instruct version.*data\.template=chatml",
        "base",
    ),
    case(
        "23 no end of text",
        ".jsonl",
        rows_of("text"),
        r"no end-of-text token, so the model could not learn to end an answer\. Set eos_token in its tokenizer_config",
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
        r"has a NUL byte \(byte 1108 of the file\)",
    ),
    case(
        "38 a NUL far down an array",
        ".json",
        b'[{"a": "' + b"b" * 2**21 + b'"},\n{"a": "\0"}]',
        r"has a NUL byte \(byte 2097172 of the file\)",
    ),
    case("38 a zip archive", ".jsonl", b"PK\x03\x04\x14\0", r"is a zip archive\. Unpack it"),
    case(
        "39 a comma at the end of an array",
        ".jsonl",
        json.dumps(rows_of("text"), indent=0)[:-2] + ",\n]",
        r"""line 302 is not JSON \(.*\): '.*all 60\."\\n},\\n]'\. Fix it there""",
    ),
    case(
        "39 a bad line",
        ".jsonl",
        lines([text_row(1)]) + "{'prompt': 'q'}\n" + lines([text_row(2)]),
        r"""line 2 is not JSON \(.*\): "{'prompt': 'q'}"\. The file must be .* Fix or .*data\.skip_bad_lines=true""",
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
        r"60 of 60 sampled rows .*text only today; image pairs are planned",
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
    with_rest(REFUSED, 3),
)
def test_a_data_set_is_refused_with_a_way_out(
    tmp_path: Path, ending: str, content: Any, message: str, rest: tuple[str, ...]
) -> None:
    settings = [word for word in rest if "=" in word]
    (family,) = [word for word in rest if "=" not in word] or ["chatml"]
    with pytest.raises(DataError, match=message) as error:
        prepare_file(write(tmp_path / f"pairs{ending}", content), tokenizer_for(family), *settings)
    assert error.value.exit_code == 3
