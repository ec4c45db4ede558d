import csv
import gzip
import hashlib
import json

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from qdpo.data.read import filetext
from qdpo.data.read.source import HUB_NAME, open_source
from qdpo.errors import ConfigError, DataError

ROWS = [{"prompt": f"q{n}", "chosen": f"yes {n}\u2028or so", "rejected": "NA"} for n in range(7)]


def jsonl(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path, rows=ROWS):
    name = path.name
    if name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(jsonl(rows).encode()))
    elif name.endswith(".json.gz"):
        path.write_bytes(gzip.compress(json.dumps(rows).encode()))
    elif name.endswith(".jsonl"):
        path.write_text(jsonl(rows), encoding="utf-8")
    elif name.endswith(".json"):
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("ending", ["json", "jsonl", "jsonl.gz", "json.gz", "parquet", "csv", "tsv"])
def test_every_kind_of_file_gives_the_rows_that_were_written(tmp_path, ending):
    path = write(tmp_path / f"prefs.{ending}")
    source = open_source(str(path), shipped=tmp_path)
    assert list(source.rows) == ROWS
    assert source.rows.read_sample().columns == ["prompt", "chosen", "rejected"]
    assert source.files == {str(path): hashlib.sha256(path.read_bytes()).hexdigest()}
    assert (source.revision, source.license) == (None, None)
    assert list(open_source(str(path), shipped=tmp_path, limit=3).rows) == ROWS[:3]


def test_a_folder_is_its_files_by_name(tmp_path):
    folder = tmp_path / "prefs"
    folder.mkdir()
    for name, rows in (("b.jsonl", ROWS[4:]), ("a.jsonl", ROWS[:4])):
        write(folder / name, rows)
    (folder / "README.md").write_text("not data")
    assert list(open_source(str(folder), shipped=tmp_path).rows) == ROWS
    assert list(open_source(str(folder), shipped=tmp_path, limit=5).rows) == ROWS[:5]
    write(folder / "c.csv")
    with pytest.raises(DataError, match=r"mixes kinds of files: \w\.jsonl and c\.csv"):
        open_source(str(folder), shipped=tmp_path)


def test_fingerprint_follows_contents_not_names(tmp_path):
    one, copy = write(tmp_path / "one.jsonl"), write(tmp_path / "copy.jsonl")
    other = write(tmp_path / "other.jsonl", ROWS[1:])
    prints = [open_source(str(path), shipped=tmp_path).fingerprint for path in (one, copy, other)]
    assert prints[0] == prints[1] != prints[2]


def test_bundled_data_come_from_the_shipped_folder(tmp_path):
    write(tmp_path / "demo.jsonl")
    source = open_source("bundled:demo.jsonl", shipped=tmp_path)
    assert source.name == "bundled:demo.jsonl" and len(list(source.rows)) == 7
    with pytest.raises(DataError, match=r"no file .*dema\.jsonl \(from data\.path=bundled:dema\.jsonl\).*demo\.jsonl"):
        open_source("bundled:dema.jsonl", shipped=tmp_path)


def test_rows_whose_cells_differ_in_type_stay_as_written(tmp_path):
    rows = [{"chosen": "a", "x": 1}, {"chosen": [{"role": "user"}], "x": None}, {"chosen": 3.5, "y": {"z": []}}]
    path = write(tmp_path / "mixed.jsonl", rows)
    assert list(open_source(str(path), shipped=tmp_path).rows) == rows


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + jsonl().encode(),
        jsonl().replace("\n", "\r\n").encode(),
        jsonl().replace("\n", "\n\n").encode(),
        ("\n" + json.dumps(ROWS)).encode(),
        gzip.compress(jsonl().encode(), mtime=0),
    ],
    ids=["byte order mark", "crlf", "blank lines", "array", "gzip without .gz"],
)
def test_harmless_oddities_of_a_jsonl_file_are_accepted(tmp_path, content):
    path = tmp_path / "odd.jsonl"
    path.write_bytes(content)
    assert list(open_source(str(path), shipped=tmp_path).rows) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n\n", "has no rows"),
        ("prefs.txt", b"hello", r"an unknown file type.*\.jsonl"),
        ("line.jsonl", jsonl(ROWS[:2]).encode() + b'{"prompt": "half', r"line 3 is not JSON.*'{\"prompt\": \"half'"),
        ("comma.json", b'[\n{"a": 1},\n]', r"line [23] is not JSON"),
        ("array.json", b'\n\n[\n{"a": 1}\n{"a": 2}]', "line 5 is not JSON"),
        ("number.jsonl", b'{"a": 1}\n17\n', "line 2: int instead of an object"),
        ("item.json", b'[{"a": 1}, "b"]', "item 2 of the array is str"),
        ("latin.jsonl", b'{"a": "x"}\n{"a": "\xe9t\xe9"}\n', r"line 2: byte 8 .* is not UTF-8 \(0xe9\)"),
        ("wide.jsonl", '{"a": 1}'.encode("utf-16"), "UTF-16"),
        ("pointer.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("torn.jsonl.gz", gzip.compress(jsonl().encode(), mtime=0)[:-20], "damaged gzip"),
        ("torn.parquet", b"PAR1 and then nothing", "not a complete Parquet file"),
        ("cells.csv", b"prompt,chosen\na,b\nc,d,e\n", r"line 3: .*the row and the header \(2 cells\) differ in length"),
        ("quotes.csv", b'prompt,chosen\na,"b"c\n', "line 2 is not CSV"),
    ],
)
def test_a_bad_file_is_refused_with_its_place_and_a_way_out(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        open_source(str(path), shipped=tmp_path).rows.read_sample()
    assert name in str(error.value)


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "preferences.jsonl")
    with pytest.raises(
        DataError, match=r"There is no file .*prefrences\.jsonl .*Similar names in .*: preferences\.jsonl"
    ):
        open_source(str(tmp_path / "prefrences.jsonl"), shipped=tmp_path)
    with pytest.raises(DataError, match="does not exist either"):
        open_source(str(tmp_path / "nowhere" / "a.jsonl"), shipped=tmp_path)
    with pytest.raises(DataError, match="There is no file"):
        open_source("prefs/train.jsonl", shipped=tmp_path)  # an ending of ours: never asked of the Hub


@pytest.mark.parametrize("setting", [{"split": "test"}, {"revision": "main"}])
def test_hub_settings_on_local_data_are_refused(tmp_path, setting):
    with pytest.raises(ConfigError, match="has no effect on the local data"):
        open_source(str(write(tmp_path / "a.jsonl")), shipped=tmp_path, **setting)


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("acme/prefs", ("acme/prefs", None, None, None)),
        ("acme/prefs-v1.0:big@abc/test", ("acme/prefs-v1.0", "big", "abc", "test")),
        ("acme/prefs@refs/convert/parquet/train", ("acme/prefs", None, "refs/convert/parquet", "train")),
        ("acme/prefs/train_prefs", ("acme/prefs", None, None, "train_prefs")),
    ],
)
def test_hub_names_are_taken_apart(path, parts):
    match = HUB_NAME.fullmatch(path)
    assert (match["repo"], match["config"], match["revision"], match["split"]) == parts


def test_settings_that_contradict_the_path_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.split=test, but data\.path=acme/prefs/train names 'train'"):
        open_source("acme/prefs/train", split="test", shipped=tmp_path)


def test_arrow_files_and_folders_saved_by_datasets_are_read(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    with (
        pyarrow.OSFile(str(tmp_path / "stream.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table)
    pyarrow.feather.write_feather(table, tmp_path / "f.feather")
    for name in ("stream.arrow", "f.feather"):
        assert list(open_source(str(tmp_path / name), shipped=tmp_path).rows) == ROWS
    import datasets

    parts = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    )
    parts.save_to_disk(tmp_path / "saved")
    assert list(open_source(str(tmp_path / "saved"), shipped=tmp_path).rows) == ROWS
    assert list(open_source(str(tmp_path / "saved"), split="test", shipped=tmp_path).rows) == ROWS[:2]
    with pytest.raises(ConfigError, match="has the splits test, train"):
        open_source(str(tmp_path / "saved"), split="dev", shipped=tmp_path)


def test_an_array_is_read_item_by_item_over_any_border(tmp_path, monkeypatch):
    rows = [{"prompt": "é😀" * n, "n": {"deep": [n, "] , {"]}} for n in range(50)]
    for chunk in (1, 2, 7, 64, 10_000):
        monkeypatch.setattr(filetext, "CHUNK_BYTES", chunk)
        for number, text in enumerate((json.dumps(rows), json.dumps(rows, indent=2, ensure_ascii=False))):
            path = tmp_path / f"{chunk}-{number}.json"
            path.write_text("\ufeff\n " + text + "\n", encoding="utf-8")
            assert list(open_source(str(path), shipped=tmp_path).rows) == rows


def test_each_row_has_its_line_and_the_sample_is_spread(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n" + "".join(json.dumps({"n": n}) + "\n\n" for n in range(5000)))
    rows = open_source(str(path), shipped=tmp_path).rows
    places = [(place.line, row["n"]) for place, row in rows.located()]
    assert places[:3] == [(3, 0), (5, 1), (7, 2)] and len(places) == 5000
    sample = rows.read_sample()
    assert sample.count == 5000 and 200 <= len(sample.rows) <= 400
    numbers = list(sample.rows)
    assert all(row["n"] == number - 1 for number, row in sample.rows.items())
    assert max(b - a for a, b in zip(numbers, numbers[1:], strict=False)) <= 32 and numbers[-1] > 4950
    read = []
    assert len(list(rows.located(read.append))) == 5000 and sum(read) == path.stat().st_size
