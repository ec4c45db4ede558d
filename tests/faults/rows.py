"""Faulty data files and rows: damaged, too large, too deep, of another kind, or with cells of another type."""

import csv
import gzip
import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.base import DONE, REFUSED, Case, Good

Row = dict[str, Any]
KIND = "rows"


def cases(draw: random.Random, good: Good) -> Iterator[Case]:
    """Files first, then single odd cells in sound rows."""
    rows = [json.loads(line) for line in good.data.read_text(encoding="utf-8").splitlines()]
    sound = good.data.read_bytes()
    for name, ending, content in _files(draw, rows, sound):
        yield Case(KIND, f"file: {name}", _writes(good, ending, content), REFUSED | DONE)
    for name, make in _special():
        yield Case(KIND, f"not a file: {name}", _lays(good, make), REFUSED)
    for name, cell in _cells(draw):
        at, column = draw.randrange(len(rows)), draw.choice(sorted(rows[0]))
        odd = [{**row, column: cell} if number == at else row for number, row in enumerate(rows)]
        text = "".join(json.dumps(row) + "\n" for row in odd).encode()
        yield Case(KIND, f"{column} of row {at + 1}: {name}", _writes(good, ".jsonl", text), REFUSED | DONE)
        beside = "".join(json.dumps({**row, draw.choice(BESIDE): cell}) + "\n" for row in rows).encode()
        yield Case(KIND, f"a column beside: {name}", _writes(good, ".jsonl", beside), REFUSED | DONE)


BESIDE = ("tools", "system", "history", "input", "context", "messages", "question", "winner", "extra", "status")


def _files(draw: random.Random, rows: list[Row], sound: bytes) -> Iterator[tuple[str, str, bytes]]:
    packed = gzip.compress(sound, mtime=0)
    for number in range(8):
        place = draw.randrange(len(sound))
        yield f"cut at byte {place}", ".jsonl", sound[:place]
        place = draw.randrange(len(packed))
        yield f"gzip with byte {place} changed ({number})", ".jsonl.gz", _changed(packed, place, draw)
        place = draw.randrange(len(sound))
        yield f"byte {place} changed ({number})", ".jsonl", _changed(sound, place, draw)
        table = _table(rows)
        place = draw.randrange(len(table))
        yield f"parquet with byte {place} changed ({number})", ".parquet", _changed(table, place, draw)
        yield f"parquet cut at byte {place} ({number})", ".parquet", table[:place]
        text = _csv(rows)
        place = draw.randrange(len(text))
        yield f"a quote at byte {place} of CSV ({number})", ".csv", text[:place] + b'"' + text[place:]
    size = draw.randrange(5, 40) * 2**20
    line = b'{"prompt": "' + b"x" * size + b'"}\n'
    yield f"a line of {size} bytes", ".jsonl", sound + line
    yield "a line of 512 MiB in gzip", ".jsonl.gz", packed + gzip.compress(b"x" * 2**26, 1) * 8
    yield "blank lines in gzip", ".jsonl.gz", gzip.compress(b"\n" * 2**24) + packed
    yield "NUL bytes", ".jsonl", sound + bytes(draw.randrange(1, 5000))
    yield "UTF-16", ".jsonl", sound.decode().encode("utf-16")
    yield "Latin-1", ".jsonl", sound + '{"prompt": "caf\u00e9"}\n'.encode("latin-1")
    yield "a zip archive", ".jsonl", b"PK\x03\x04" + sound
    yield "empty", ".jsonl", b""
    yield "one object with all rows", ".json", json.dumps({"data": rows}).encode()
    yield "columns", ".json", json.dumps({name: [row[name] for row in rows] for name in rows[0]}).encode()
    yield "an array that is not closed", ".json", json.dumps(rows).encode()[:-1]
    yield "a deep array", ".json", b"[" * draw.randrange(200, 200_000)
    yield "a list among the rows", ".jsonl", sound + b"[1, 2]\n"


def _special() -> Iterator[tuple[str, Callable[[Path], None]]]:
    yield "a pipe", lambda path: os.mkfifo(path)
    yield "a folder", lambda path: path.mkdir()
    for target in ("/dev/zero", "/dev/null", "/nowhere/at/all", "pairs.jsonl"):
        yield f"a link to {target}", lambda path, target=target: path.symlink_to(target)  # type: ignore[misc]


def _cells(draw: random.Random) -> Iterator[tuple[str, Any]]:
    deep: Any = "x"
    for _ in range(draw.randrange(101, 400)):
        deep = [deep] if draw.random() < 0.5 else {"a": deep}
    yield "null", None
    yield "a number", draw.randrange(10**6)
    yield "a huge number", draw.choice((1e308, float("inf"), float("nan"), -(10**4000)))
    yield "true", True
    yield "a lone surrogate", "half \ud83d"
    yield "deep lists", deep
    yield "deep lists as text", json.dumps(deep)
    yield "very deep text", "[" * 100_000 + "]" * 100_000
    yield "an object", {"from": "Paris", "to": "Rome"}
    yield "messages of an unknown role", [{"role": "critic", "content": "a"}]
    yield "messages without content", [{"role": "user"}, {"role": "assistant"}]
    yield "a list of numbers", [1, 2, draw.random()]
    yield "an empty text", ""
    yield "control codes", "\x1b[2J\x07\x9b31m"
    yield "a long word", "x" * draw.randrange(10**5, 10**6)


def _writes(good: Good, ending: str, content: bytes) -> Callable[[Path], list[str]]:
    return _lays(good, lambda path: path.write_bytes(content) and None, ending)


def _lays(good: Good, make: Callable[[Path], None], ending: str = ".jsonl") -> Callable[[Path], list[str]]:
    def lay(folder: Path) -> list[str]:
        words = good.lay(folder, data__path=f"pairs{ending}")
        (folder / "pairs.jsonl").unlink()
        make(folder / f"pairs{ending}")
        return words

    return lay


def _changed(data: bytes, place: int, draw: random.Random) -> bytes:
    return data[:place] + bytes([data[place] ^ draw.randrange(1, 256)]) + data[place + 1 :]


def _table(rows: list[Row]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


def _csv(rows: list[Row]) -> bytes:
    written = io.StringIO(newline="")
    writer = csv.DictWriter(written, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return written.getvalue().encode()
