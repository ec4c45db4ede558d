"""Odd values of qdpo's own settings, on the command line and in a TOML file, and odd TOML files."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from qdpo.settings.layered import setting_names
from tests.faults.base import DONE, NOT_FINITE, REFUSED, Case, Good

KIND = "settings_values"
# As a user types them; the last ones are bytes that are no text in UTF-8, and names longer than a file's may be.
TYPED = [
    "", "none", "nan", "inf", "-inf", "-1", "0", "1e400", "1e308", "1e-320", "0x10", "1_0", "٣", "2.5", "true",
    "[]", "{}",
    "+", "a+b", "++", "..", "/", "~", "~nobody/x", ".", "/dev/null", "/dev/full", "/proc/self/mem", "base",
    "pairs.jsonl",
    "-" * 3, "\t", " ", "\x01\x1b[31m", "\u202e", "é", "\udcff", "$(x)", "x" * 300, "y/" * 3000, "9" * 400,
    str(2**31), str(2**63), str(2**64), str(10**30), "pairs.jsonl+pairs.jsonl", "../../x", "file:///x", "bundled:x",
    "hf://x", "pypi:x==1", "a/b", "a/b/c", "@",
]  # fmt: skip
WRITTEN = [
    "nan", "inf", "-inf", "true", "[]", "[[]]", '[1, "a"]', "{a = 1}", "1979-05-27", "07:32:00", '"\\u0000"',
    '"a\\u0000b"',
    '"\\u0000/x"', '""', '"\\n"', "-9223372036854775808", "9" * 400, "1e400", "0.0", "-0.0", "1", "0", "-1", "2", "0.5",
    '["x", "x"]', '[""]', '["\\u0000"]', "[nan]", "[inf]", "[-1]", "[1e308, 1e308]", '"\\U0010ffff"', '"\\ue000"',
    "9223372036854775807",
    '"' + "z" * 5000 + '"', "[true]", "[{}]", '"none"', '"auto"',
]  # fmt: skip
# Long runs and long texts are what these ask for: a large value of them is no fault.
UNBOUNDED = {
    "train.steps", "train.epochs", "train.hours", "samples.max_new_tokens", "samples.count",
    "train.pairs_per_step", "memory.tokens_per_row",
}  # fmt: skip


def cases(rng: random.Random, good: Good) -> Iterator[Case]:
    yield from _files(rng, good)
    names = sorted(setting_names())
    texts = [
        name for name in names if "str" in str(setting_names()[name].model_fields[name.rpartition(".")[2]].annotation)
    ]
    for number in range(240):
        name = rng.choice(texts if number % 2 else names)
        build, value = rng.choice([*((_typed, value) for value in TYPED), *((_written, value) for value in WRITTEN)])
        if not (name in UNBOUNDED and _is_large(value)):
            yield build(good, name, value)


def _is_large(text: str) -> bool:
    try:
        return float(text) > 8
    except ValueError:
        return False


def _case(
    name: str, make: Callable[[Path], list[str]], right: frozenset[str] = REFUSED, near: str | None = None
) -> Case:
    return Case(KIND, name, make, right, near)


def _typed(good: Good, name: str, value: str) -> Case:
    def make(folder: Path) -> list[str]:
        return [*_without(good.lay(folder), name), f"{name}={value}"]

    shown = value if len(value) < 40 else f"{value[:8]}… of {len(value)}"
    return _case(f"{name}={ascii(shown)[1:-1]} on the command line", make, REFUSED | DONE | NOT_FINITE)


def _written(good: Good, name: str, value: str) -> Case:
    def make(folder: Path) -> list[str]:
        (folder / "odd.toml").write_text(f"{name} = {value}\n", encoding="utf-8")
        return [*_without(good.lay(folder), name), "odd.toml"]

    shown = value if len(value) < 40 else f"{value[:8]}… of {len(value)}"
    return _case(f"{name} = {shown} in a file", make, REFUSED | DONE | NOT_FINITE)


def _without(words: list[str], name: str) -> list[str]:
    return [word for word in words if not word.startswith(f"{name}=")]


def _files(rng: random.Random, good: Good) -> Iterator[Case]:
    """TOML files that are odd as a whole."""
    sound = '[train]\nlearning_rate = 1e-3\nsteps = 2\n[data]\nmax_tokens = 200\n[loss]\nname = ["sigmoid"]\n'

    def text(name: str, content: bytes | str, right: frozenset[str] = REFUSED) -> Case:
        def make(folder: Path) -> list[str]:
            words = good.lay(folder)
            (folder / "odd.toml").write_bytes(content.encode() if isinstance(content, str) else content)
            return [*_without(words, "train.steps"), "odd.toml"]

        return _case(f"a TOML file {name}", make, right, "odd.toml")

    yield text("of nested arrays", "x = " + "[" * 100_000 + "]" * 100_000)
    yield text("of nested tables", "x = " + "{a=" * 5000 + "1" + "}" * 5000)
    yield text("with a key of 5,000 parts", ".".join("a" * 5000) + " = 1")
    yield text("with a table where a value stands", "model = 1")
    yield text("with a value where a table stands", '[model.path]\nx = "base"')
    yield text("with an array of tables", "[[model]]\npath = 1")
    yield text("with a key twice", "[train]\nsteps = 1\nsteps = 2")
    yield text("with an empty key", '"" = 1')
    yield text("with control codes in a key", '"\\u001b[31mtrain.steps" = 1')
    yield text("with a number of 5,000 digits", f"[train]\nseed = {'9' * 5000}")
    yield text("of NUL bytes", b"\0" * 4096)
    yield text("in UTF-16", sound.encode("utf-16"))
    yield text("with a byte-order mark", "\ufeff" + sound, REFUSED | DONE)
    yield text("that is empty", "", DONE)
    for _ in range(12):
        content = bytearray(sound.encode())
        place = rng.randrange(len(content))
        content[place] = rng.randrange(256)
        yield text(f"with byte {place} made {content[place]}", bytes(content), REFUSED | DONE | NOT_FINITE)
    for _ in range(4):
        place = rng.randrange(len(sound))
        yield text(f"cut after {place} bytes", sound[:place], REFUSED | DONE)
    for what, build in PLACES.items():
        yield _case(f"{what} as a TOML file", lambda folder, build=build: _placed(good, folder, build), near="odd.toml")


def _placed(good: Good, folder: Path, build: Callable[[Path], object]) -> list[str]:
    words = good.lay(folder)
    build(folder / "odd.toml")
    return [*words, "odd.toml"]


PLACES: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a named pipe": lambda path: os.mkfifo(path),
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "a sparse file of 4 GiB": lambda path: os.truncate(_touched(path), 4 << 30),
}


def _touched(path: Path) -> Path:
    path.touch()
    return path
