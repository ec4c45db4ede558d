"""A file of any size, shape or kind is read in bounded pieces: rows that are too large are dropped by name."""

import csv
import gzip
import io
import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from qdpo.data.read import filetext
from qdpo.data.read.progress import BadLine, Gauge, Reading
from qdpo.data.read.readers import READERS
from qdpo.data.read.source import open_source
from qdpo.errors import DataError
from tests.data.prepared import MANY, Row, case, prepare_file, rows_of, write
from tests.data.template_tokenizers import tokenizer_of

LARGE = 'x", } ] \\ \n' * 1000
"""About 10 kB of text that looks like the end of a cell."""
BOUND = "data.max_row_mib=0.005"


def as_csv(rows: list[Row], delimiter: str) -> bytes:
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue().encode()


def save(path: Path, rows: list[Row]) -> Path:
    ending = path.suffix
    if ending == ".jsonl":
        return write(path, rows)
    if ending == ".json":
        return write(path, json.dumps(rows))
    if ending in (".csv", ".tsv"):
        return write(path, as_csv(rows, "," if ending == ".csv" else "\t"))
    table = pyarrow.Table.from_pylist(rows)
    if ending == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        pyarrow.feather.write_feather(table, path)
    return path


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"])
@pytest.mark.parametrize("at", [(7, 23), (1, 60)], ids=["inside", "at the ends"])
def test_a_row_that_is_too_large_is_dropped_by_name(tmp_path: Path, ending: str, at: tuple[int, int]) -> None:
    path = save(tmp_path / f"a{ending}", rows_of("text", {"chosen": LARGE}, at))
    outcome = prepare_file(path, tokenizer_of("chatml"), BOUND)
    assert [(note["row"], note["action"], note["reason"]) for note in outcome.report] == [
        (number, "dropped", "row_too_large") for number in at
    ]
    assert "more than 0.005 MiB (data.max_row_mib)" in outcome.report[0]["detail"]
    assert outcome.rows == [number for number in MANY if number not in at]


@pytest.mark.parametrize("chunk", [1, 3, 64, 5000])
def test_a_large_item_is_skipped_over_any_border(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filetext, "CHUNK_BYTES", chunk)
    odd = {"a": [{"b": '\\"]}' * 300}, "\u00e9\\"], "c": {}}
    path = write(tmp_path / "a.json", json.dumps([{"n": 1}, odd, {"n": 2}, odd], indent=1))
    reading = Reading(path, Gauge(), max_bytes=500)
    found = [row.reason if isinstance(row, BadLine) else row for _line, row in READERS[".json"](reading)]
    assert found == [{"n": 1}, "row_too_large", {"n": 2}, "row_too_large"]


def test_a_line_of_any_length_takes_little_memory(tmp_path: Path) -> None:
    row = json.dumps({"prompt": "q", "chosen": "yes", "rejected": "no"}).encode() + b"\n"
    for ending, start, end in (
        (".jsonl.gz", b"", b"\n"),
        (".json.gz", b"[", b"]"),
        (".csv.gz", b"prompt,chosen\n", b"\n"),
    ):
        path = tmp_path / f"a{ending}"
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(start + (b"" if "csv" in ending else b'{"prompt": "'))
            for _ in range(96):
                file.write(b"x" * 2**20)
            file.write((b",b\na,b" if "csv" in ending else b'"}' + (b"," if start else b"\n") + row.strip()) + end)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert [type(row) for _place, row in open_source(str(path), shipped=tmp_path).rows.located()] == [BadLine, dict]
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # kB; the line has 96 MiB


@pytest.mark.parametrize(
    ("ending", "parts"),
    [
        (".json", ('[{"a": [', "[],", "1]},", "]")),
        (".json", ('[{"a": [', '"",', '""]},', "]")),
        (".json", ('[{"a": "', '\\"', '"},', "]")),
        (".json", ('[{"a": "', "\\\\", '"},', "]")),
        (".csv", ("a,b\n", ",", "\n", "")),
        (".csv", ("a,b\n", '"a""b",', "\n", "")),
        (".csv", ('a,b\n"', '""', '",c\n', "")),
        (".csv", ('a,b\n"', 'line, "" one\n', '",c\n', "")),
    ],
    ids=["lists", "texts", "escaped quotes", "backslashes", "commas", "quoted cells", "doubled quotes", "lines"],
)
def test_what_fills_a_row_that_is_too_large_does_not_matter(
    tmp_path: Path, ending: str, parts: tuple[str, ...]
) -> None:
    """The rest of such a row was read mark by mark, and all its lines were counted anew at each line."""
    start, fill, end, close = parts
    row = '{"a": "c"}' if ending == ".json" else "c,d\n"
    path = write(tmp_path / f"a{ending}", start + fill * (2**23 // len(fill)) + end + row + close)
    before = time.process_time()
    _big, (_line, small) = READERS[ending](Reading(path, Gauge(), max_bytes=2**18))
    assert small == ({"a": "c"} if ending == ".json" else {"a": "c", "b": "d"})
    assert time.process_time() - before < 3


DEEP = "[" * 500 + "]" * 500
REFUSED = [  # name, content, message
    case("blank lines", "a.jsonl.gz", gzip.compress(b"\n" * 110_000), "more than 100,000 empty lines"),
    case("blank lines in CSV", "a.csv.gz", gzip.compress(b"a,b\n" + b"\n" * 110_000), "more than 100,000 empty"),
    case("deep", "a.jsonl", f'{{"a": {DEEP}}}\n', "line 1: the row nests more than 100"),
    case("too deep to parse", "a.jsonl", '{"a": ' + "[" * 99999, r"line 1 is not JSON"),
    case("deep in an array", "a.json", f'[{{"a": {DEEP}}}]', "line 1 is not JSON .the item nests more than 100"),
    case("a number of 5,000 digits", "a.jsonl", '{"a": ' + "9" * 5000 + "}\n", "line 1 is not JSON .Exceeds the limit"),
    case("an open quote", "a.csv", 'a,b\n"c,d\n' + "e,f\n" * 9, r"line 11 \(its row begins at line 2\) is not CSV"),
    case("a long open quote", "a.csv", 'a,b\n"c,d\n' + "e" * 5_000_000, "opened in the row at line 2 is not closed"),
    case("a quote forgotten", "a.csv", 'a,b\n"c,d\n' + "e,fgh\n" * 1_700_000, "not closed in the 1,000,000 lines"),
    case("a column twice", "a.csv", "prompt,chosen,chosen\na,b,c\n", r"same name in its header \('chosen'\)"),
    case("semicolons", "a.csv", "prompt;chosen;rejected\na;b;c\n", "look separated by ';'. Save it with commas"),
    case("tabs", "a.csv", "prompt\tchosen\trejected\na\tb\tc\n", "separated by tabs. Rename the file to .tsv"),
    case("a long header", "a.csv", "a" * 5_000_000 + "\nb\n", "the header, is not CSV .more than 4 MiB"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED)
def test_an_odd_file_is_refused_with_its_place(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as error:
        open_source(str(path), shipped=tmp_path).rows.read_sample()
    assert name in str(error.value) and len(str(error.value)) < 1000


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    for name in ("pipe.jsonl", "zero.jsonl", "gone.jsonl"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (tmp_path / name).rename(folder / name)
        for path in (folder / name, folder):
            with pytest.raises(DataError, match=f"{name} is not a regular file"):
                open_source(str(path), shipped=tmp_path)
    for path in ("/dev/zero", "/dev/null", "/dev/stdin"):
        with pytest.raises(DataError):
            open_source(path, shipped=tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    for path, message in (
        (tmp_path / "folder.jsonl", "has no data files"),
        ("x" * 5000 + ".jsonl", "There is no file"),
        ("~nobody-of-that-name/a.jsonl", "There is no file"),
    ):
        with pytest.raises(DataError, match=message):
            open_source(str(path), shipped=tmp_path)


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["chosen", "chosen"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="several columns with the name 'chosen'"):
        open_source(str(tmp_path / "a.parquet"), shipped=tmp_path).rows.read_sample()


@pytest.mark.parametrize("is_array", [False, True], ids=["lines", "array"])
def test_a_key_that_stands_twice_is_dropped_by_name(tmp_path: Path, is_array: bool) -> None:
    rows = [json.dumps(row) for row in rows_of("text")]
    rows[6] = rows[6][:-1] + ', "chosen": "Something else."}'
    rows[8] = rows[8][:-1] + ', "chosen": "Yes, 9."}'
    text = "[" + ",\n".join(rows) + "]" if is_array else "\n".join(rows)
    outcome = prepare_file(write(tmp_path / "a.json", text), tokenizer_of("chatml"))
    assert outcome.noted() == [(7, "dropped", "repeated_key")]
    assert "line 7: the key 'chosen' occurs twice" in outcome.report[0]["detail"]
    assert outcome.rows == [number for number in MANY if number != 7]
