"""Damaged headers of safetensors files: lengths, offsets, shapes, types, JSON that is none, and cut or empty files."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.base import REFUSED, Case, Good

KIND = "headers"
FILE = "model.safetensors"
Header = dict[str, Any]


def cases(rng: random.Random, good: Good) -> Iterator[Case]:
    for name, damage in [*_bytes(rng), *[_named(rng) for _ in range(150)]]:
        yield Case(KIND, name, _maker(good, damage), REFUSED, near=FILE)


def _maker(good: Good, damage: Callable[[bytes], bytes]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        words = good.lay(folder)
        weights = folder / "base" / FILE
        weights.write_bytes(damage(weights.read_bytes()))
        return words

    return make


def split(content: bytes) -> tuple[Header, bytes]:
    """Header and data of a file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: bytes | Header, data: bytes) -> bytes:
    """A file of a header, also of bytes that are none, and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _bytes(rng: random.Random) -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    yield "empty file", lambda content: b""
    for length in (0, 1, 2**31, 2**40, 2**63, 2**64 - 1):
        yield f"header of {length} bytes", lambda content, n=length: n.to_bytes(8, "little") + content[8:]
    for _ in range(8):
        part = rng.random()
        yield f"cut at {part:.4f}", lambda content, p=part: content[: int(len(content) * p)]
    yield "4 more bytes", lambda content: content + b"\0\0\0\0"
    texts = {
        "deep lists": b"[" * 100_000, "deep objects": b'{"a":' * 100_000, "a list": b"[]", "a number": b"7",
        "nothing": b"", "zeros": b"\0" * 64, "no UTF-8": b'{"\xff": 1}', "no tensors": b"{}", "null": b"null",
        "a huge number": b'{"a": ' + b"9" * 100_000 + b"}", "many small lists": b"[" + b"[]," * 10**6 + b"[]]",
    }  # fmt: skip
    for name, text in texts.items():
        yield f"the header is {name}", lambda content, text=text: joined(text, split(content)[1])
    yield "a name twice", lambda content: joined(_twice(split(content)[0]), split(content)[1])


def _twice(header: Header) -> bytes:
    text = json.dumps(header)
    name = next(key for key in header if key != "__metadata__")
    return f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}".encode()


def _named(rng: random.Random) -> tuple[str, Callable[[bytes], bytes]]:
    """One value of one tensor's entry, by chance."""
    place, name, odd = rng.random(), *rng.choice(ODD)

    def damage(content: bytes) -> bytes:
        header, data = split(content)
        names = sorted(key for key in header if key != "__metadata__")
        key = names[int(place * len(names))]
        odd(header, key)
        return joined(header, data)

    return f"{name} of the tensor at {place:.3f}", damage


def _set(key: str, value: Any) -> Callable[[Header, str], None]:
    return lambda header, name: header[name].__setitem__(key, value)


def _overlap(header: Header, name: str) -> None:
    begin, end = header[name]["data_offsets"]
    header[name]["data_offsets"] = [begin + 4, end + 4]


def _rename(header: Header, name: str) -> None:
    header[f"{name}.x"] = header.pop(name)


ODD: list[tuple[str, Callable[[Header, str], None]]] = [
    *((f"dtype {value!r}", _set("dtype", value)) for value in ("F128", "f32", "", 7, None, ["F32"], "F16", "I64")),
    *((f"shape {value!r:.30}", _set("shape", value)) for value in
      ([-1], [2**62, 2**62], [1.5], "64", None, [], [[64]], [0], [10**30], [True], {"a": 1}, [1] * 5000)),
    *((f"offsets {value!r:.30}", _set("data_offsets", value)) for value in
      ([0], [4, 0], [-4, 0], [0, 2**63], "0", None, [0, 0, 0], [0.0, 4.0], [10**30, 10**30], {}, [None, 1])),
    ("offsets moved by 4", _overlap),
    ("another key", _set("more", 1)),
    ("no shape", lambda header, name: header[name].pop("shape")),
    ("no entry", lambda header, name: header.pop(name)),
    ("a list as entry", lambda header, name: header.__setitem__(name, [1, 2])),
    ("metadata of numbers", lambda header, name: header.__setitem__("__metadata__", {"a": 1})),
    ("metadata a list", lambda header, name: header.__setitem__("__metadata__", [1])),
]  # fmt: skip
