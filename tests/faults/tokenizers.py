"""Damaged files of a tokenizer: cut, of other types, with ids beyond the vocabulary, keys missing, tokens twice."""

import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.base import DONE, NOT_FINITE, REFUSED, Case, Good

KIND = "tokenizers"
ANY = REFUSED | DONE | NOT_FINITE
FILES = ("tokenizer.json", "tokenizer_config.json")
ODD: list[Any] = [
    None, True, 0, -1, 2**31, 2**63, 10**30, 0.5, float("nan"), "", "x", "\ud800", "x" * 100_000, [], [1], [[1]],
    [None],
    {}, {"a": 1}, {"type": "x"}, {"type": 7}, {"content": 7}, {"type": "Split", "pattern": {"Regex": "("}},
]  # fmt: skip
IDS: list[Any] = [-1, 10**9, 2**32, 10**30, "1", None, 1.5, True, [1]]
CONFIG = (
    "eos_token", "pad_token", "unk_token", "bos_token", "model_max_length", "tokenizer_class", "added_tokens_decoder",
    "chat_template", "extra_special_tokens", "padding_side", "additional_special_tokens", "add_bos_token", "auto_map",
    "truncation_side", "clean_up_tokenization_spaces", "backend", "name_or_path", "is_local",
)  # fmt: skip


def cases(rng: random.Random, good: Good) -> Iterator[Case]:
    for file in FILES:
        for part in [rng.random() for _ in range(4)]:
            yield _case(good, f"{file} cut at {part:.4f}", _cut(file, part), REFUSED, near=file)
        for name, text in TEXTS.items():
            yield _case(good, f"{file} is {name}", _written(file, text), REFUSED, near=file)
    for value in IDS:
        yield _case(good, f"an added token's id is {value!r}", _added_id(value), REFUSED, near="tokenizer.json")
        yield _case(good, f"an id of the vocabulary is {value!r}", _vocabulary_id(rng.random(), value), REFUSED)
    content = json.loads((good.model / "tokenizer.json").read_text())
    paths = list(_paths(content))
    for _ in range(160):
        path, value = rng.choice(paths), rng.choice([*ODD, ...])
        shown = "gone" if value is ... else f"= {value!r:.40}" + f" of {len(str(value))}" * (len(str(value)) > 40)
        name = f"tokenizer.json: {'.'.join(map(str, path))} {shown}"
        yield _case(good, name, _changed("tokenizer.json", path, value), ANY)
    for _ in range(80):
        key, value = rng.choice(CONFIG), rng.choice(ODD)
        name = f"tokenizer_config.json: {key} = {value!r:.40}" + f" of {len(str(value))}" * (len(str(value)) > 40)
        yield _case(good, name, _changed("tokenizer_config.json", (key,), value), ANY)
    for file in ("special_tokens_map.json", "added_tokens.json"):
        for value in ODD:
            for key in ("eos_token", "<|im_end|>"):
                yield _case(good, f"{file}: {key} = {value!r:.40}", _written(file, json.dumps({key: value})), ANY)


TEXTS = {
    "empty": "", "a list": "[]", "null": "null", "a text": '"x"', "no JSON": "{'a': 1}", "deep": '{"a":' * 100_000,
    "deep and closed": '{"a":' * 100_000 + "1" + "}" * 100_000, "zeros": "\0" * 100,
}  # fmt: skip


def _case(
    good: Good, name: str, damage: Callable[[Path], object], right: frozenset[str], near: str | None = None
) -> Case:
    def make(folder: Path) -> list[str]:
        words = good.lay(folder)
        damage(folder / "base")
        return words

    return Case(KIND, ascii(name)[1:-1], make, right, near)


def _cut(file: str, part: float) -> Callable[[Path], object]:
    return lambda base: os.truncate(base / file, int((base / file).stat().st_size * part))


def _written(file: str, text: str) -> Callable[[Path], object]:
    return lambda base: (base / file).write_text(text)


def _edited(base: Path, file: str, edit: Callable[[Any], object]) -> None:
    content = json.loads((base / file).read_text())
    edit(content)
    (base / file).write_text(json.dumps(content))


def _added_id(value: Any) -> Callable[[Path], object]:
    return lambda base: _edited(base, "tokenizer.json", lambda content: content["added_tokens"][0].update(id=value))


def _vocabulary_id(place: float, value: Any) -> Callable[[Path], object]:
    def edit(content: Any) -> None:
        vocabulary = content["model"]["vocab"]
        vocabulary[sorted(vocabulary)[int(place * len(vocabulary))]] = value

    return lambda base: _edited(base, "tokenizer.json", edit)


def _changed(file: str, path: tuple[Any, ...], value: Any) -> Callable[[Path], object]:
    def edit(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        if value is ...:
            content.pop(path[-1], None)
        else:
            content[path[-1]] = value

    return lambda base: _edited(base, file, edit)


def _paths(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of keys of objects, two of each vocabulary."""
    if isinstance(content, dict):
        for key, value in list(content.items())[: 2 if at[-1:] == ("vocab",) else None]:
            yield (*at, key)
            yield from _paths(value, (*at, key))
    elif isinstance(content, list):
        for number, value in enumerate(content[:2]):
            yield from _paths(value, (*at, number))
