"""Whatever stands in a file, its rows come out, or a DataError: never another error, nor a warning."""

import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from qdpo.data.read.progress import BadLine
from qdpo.data.read.source import open_source
from qdpo.errors import DataError
from tests.data.prepared import Row, rows_of

ENDINGS = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".csv", ".tsv", ".tsv.gz", ".parquet", ".arrow", ".feather")
TRIES = 40
"""Files of each kind of damage and each ending."""


def texts() -> list[Row]:
    return [{side: str(cell) for side, cell in row.items()} for row in rows_of("text")]


def whole(ending: str) -> bytes:
    """A sound file with this ending."""
    rows, out = texts(), io.BytesIO()
    if ending.endswith(".gz"):
        return gzip.compress(whole(ending.removesuffix(".gz")), mtime=0)
    if ending == ".json":
        return json.dumps(rows).encode()
    if ending == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if ending in (".csv", ".tsv"):
        written = io.StringIO(newline="")
        writer = csv.DictWriter(written, list(rows[0]), delimiter="\t" if ending == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        return written.getvalue().encode()
    table = pyarrow.Table.from_pylist(rows)
    if ending == ".parquet":
        pyarrow.parquet.write_table(table, out)
    elif ending == ".feather":
        pyarrow.feather.write_feather(table, out)
    else:
        with pyarrow.ipc.new_stream(out, table.schema) as stream:
            stream.write_table(table)
    return out.getvalue()


def noise(draw: random.Random, sound: bytes) -> bytes:
    """Random bytes, now and then with a beginning that promises more."""
    starts = (b"", b"{", b"[", b"[{", b"\x1f\x8b\x08", b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff", b"\xef\xbb\xbf")
    return draw.choice(starts) + draw.randbytes(draw.choice((1, 7, 100, 5000)))


def printable(draw: random.Random, sound: bytes) -> bytes:
    """Random letters of the alphabets of JSON and CSV."""
    return "".join(draw.choices('{}[]",:\\\n\r\t 0123456789eE+-.truefalsnNI\u00e9', k=draw.randint(1, 400))).encode()


def torn(draw: random.Random, sound: bytes) -> bytes:
    return sound[: draw.randrange(len(sound))]


def flipped(draw: random.Random, sound: bytes) -> bytes:
    """One to a hundred bits are wrong."""
    damaged = bytearray(sound)
    for _ in range(draw.choice((1, 1, 2, 10, 100))):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


def doubled(draw: random.Random, sound: bytes) -> bytes:
    """A stretch of the file stands in another place, as after a bad download."""
    start, end = sorted(draw.randrange(len(sound)) for _ in range(2))
    place = draw.randrange(len(sound))
    return sound[:place] + sound[start:end] + sound[place:]


def read(path: Path) -> Iterator[object]:
    """Both ways of reading, as a run goes them; with lines left out on demand, too."""
    for skip_bad in (False, True):
        try:
            rows = open_source(str(path), shipped=path.parent, skip_bad=skip_bad).rows
            sample = rows.read_sample()
            found = [row for _place, row in rows.located()]
            assert sample.count == len(found) and all(isinstance(row, dict | BadLine) for row in found)
            yield sample
        except DataError as error:
            assert str(path) in str(error)
            yield error


@pytest.mark.parametrize("damage", [noise, printable, torn, flipped, doubled], ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("ending", ENDINGS)
def test_damage_gives_rows_or_a_data_error(
    tmp_path: Path, ending: str, damage: Callable[[random.Random, bytes], bytes]
) -> None:
    draw, sound = random.Random(f"{ending} {damage.__name__}"), whole(ending)
    path = tmp_path / f"pairs{ending}"
    path.write_bytes(sound)
    assert not any(isinstance(result, DataError) for result in read(path))
    results = []
    for _ in range(TRIES):
        path.write_bytes(damage(draw, sound))
        results += list(read(path))
    assert any(isinstance(result, DataError) for result in results)


DEEP = 100_000
ODD = {
    "many brackets": "[" * DEEP,
    "closed brackets": "[" * DEEP + "]" * DEEP,
    "many braces": '{"a":' * DEEP + "1" + "}" * DEEP,
    "brackets in a cell": '{"a": ' + "[" * DEEP + "]" * DEEP + "}",
    "a huge number": '{"a": ' + "9" * DEEP + "}",
    "a huge number in an array": '[{"a": ' + "9" * DEEP + "}]",
    "a huge exponent": '{"a": 1e' + "9" * 30 + "}",
    "not a number": '{"a": [NaN, Infinity, -Infinity]}',
    "a long line": '{"a": "' + "x" * 4_000_000 + '"}',
    "a long item": '[{"a": "' + "x" * 4_000_000 + '"}]',
    "a long line without an end": '{"a": "' + "x" * 4_000_000,
    "a long item without an end": '[{"a": "' + "x" * 4_000_000,
    "white space": " \n" * 20_000,
    "quotes": '"' * DEEP,
    "one quote": 'a,b\n"' + "x,\n" * 10_000,
    "commas": "," * DEEP + "\n" + "," * DEEP,
    "carriage returns": "a,b\r" * DEEP,
    "equal names": "a,a,a\n1,2,3\n",
    "no names": ",,\n1,2,3\n",
    "equal keys": '{"a": 1, "a": 2}',
    "null": "null",
    "half a character": '{"\\ud83d": "\\udc00"}',
}


@pytest.mark.parametrize("ending", [".json", ".jsonl.gz", ".csv", ".tsv", ".parquet", ".arrow"])
@pytest.mark.parametrize("name", ODD)
def test_odd_contents_give_rows_or_a_data_error(tmp_path: Path, name: str, ending: str) -> None:
    content = ODD[name].encode()
    path = tmp_path / f"pairs{ending}"
    path.write_bytes(gzip.compress(content, 1) if ending.endswith(".gz") else content)
    assert len(list(read(path))) == 2
