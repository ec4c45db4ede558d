"""Model folders with wrong files: links, pipes, folders, pickle, indices, tensors missing, of another shape, or NaN."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.faults.base import DONE, REFUSED, SAME, Case, Good

KIND = "folders"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], object]


def cases(rng: random.Random, good: Good) -> Iterator[Case]:
    def case(name: str, damage: Damage, near: str | None, right: frozenset[str] = REFUSED) -> Case:
        def make(folder: Path) -> list[str]:
            words = good.lay(folder)
            damage(folder / "base")
            return words

        return Case(KIND, name, make, right, near)

    for file in FILES:
        for name, place in PLACES.items():
            right = DONE if (file, name) == ("tokenizer_config.json", "gone") else REFUSED
            yield case(
                f"{file} is {name}", lambda base, f=file, p=place: p(base / f), None if right == DONE else file, right
            )
        for part in (0.0, rng.random(), rng.random()):
            yield case(f"{file} cut at {part:.4f}", lambda base, f=file, p=part: _cut(base / f, p), file)
    for name, content in INDICES.items():
        yield case(f"index: {name}", lambda base, c=content: _index(base, c), INDEX)
    yield case("index of one shard", lambda base: _index(base, None), None, SAME)
    for name in (
        "pytorch_model.bin",
        "/etc/passwd",
        "../x.safetensors",
        "x.bin",
        7,
        ["model.safetensors"],
        "none.safetensors",
    ):
        yield case(
            f"transformers_weights={name!r}",
            lambda base, n=name: _configure(base, transformers_weights=n),
            "config.json",
        )
    yield case("two files with one tensor", _two_shards, "model-2.safetensors")
    for _ in range(60):
        place, odd = rng.random(), rng.choice(list(TENSORS))
        yield case(f"tensor at {place:.3f}: {odd}", lambda base, p=place, o=odd: _tensor(base, p, TENSORS[o]), "base")
    for file in ("pytorch_model.bin", "model.pt", "modeling_x.py", "original/x.bin"):
        yield case(f"{file} lies beside", lambda base, f=file: _beside(base / f), None, SAME)
    yield case(
        "adapter_config.json lies beside", lambda base: (base / "adapter_config.json").write_text("{}"), "adapter"
    )
    yield case(
        "generation_config.json a list",
        lambda base: (base / "generation_config.json").write_text("[]"),
        None,
        REFUSED | DONE,
    )


def _touched(path: Path) -> Path:
    path.unlink()
    path.touch()
    return path


def _linked(target: str) -> Callable[[Path], object]:
    def link(path: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return link


def _moved_out(path: Path) -> None:
    path.rename(path.parent.parent / f"{path.name}.elsewhere")
    path.symlink_to(Path("..") / f"{path.name}.elsewhere")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


PLACES: dict[str, Callable[[Path], object]] = {
    "gone": lambda path: path.unlink(),
    "empty": _touched,
    "a folder": _folder,
    "a pipe": _pipe,
    "a link to nothing": _linked("nowhere"),
    "a link to /dev/zero": _linked("/dev/zero"),
    "a link to itself": lambda path: _linked(path.name)(path),
    "a link to /etc/passwd": _linked("/etc/passwd"),
    "a link to another file": _linked("README.none"),
    "a sound file out of the folder": _moved_out,
    "a sparse file of 4 GiB": lambda path: os.truncate(_touched(path), 4 << 30),
    "random bytes": lambda path: path.write_bytes(random.Random(path.name).randbytes(5000)),
    "zeros": lambda path: path.write_bytes(bytes(5000)),
}


def _cut(path: Path, part: float) -> None:
    os.truncate(path, int(path.stat().st_size * part))


def _configure(base: Path, **values: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _index(base: Path, content: Any) -> None:
    (base / "model.safetensors").rename(base / "model-1.safetensors")
    if content is None:
        content = {"weight_map": {"lm_head.weight": "model-1.safetensors"}}
    (base / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))


INDICES: dict[str, Any] = {
    "pickle": {"weight_map": {"a": "pytorch_model.bin"}},
    "pickle among others": {"weight_map": {"a": "model-1.safetensors", "b": "pytorch_model.bin"}},
    "a missing shard": {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}},
    "a list": {"weight_map": ["model-1.safetensors"]}, "a list as index": [1], "null": {"weight_map": None},
    "numbers": {"weight_map": {"a": 1}}, "lists": {"weight_map": {"a": ["model-1.safetensors"]}}, "no map": {},
    "empty": {"weight_map": {}}, "outside": {"weight_map": {"a": "../model-1.safetensors"}},
    "absolute": {"weight_map": {"a": "/etc/passwd"}}, "deep": '{"weight_map":' * 100_000, "no JSON": "weight_map",
    "no UTF-8 escape": {"weight_map": {"a": "\ud800.safetensors"}}, "a text": {"weight_map": "model-1.safetensors"},
    "nul": {"weight_map": {"a": "\0.safetensors"}},
}  # fmt: skip


def _two_shards(base: Path) -> None:
    shutil.copy(base / "model.safetensors", base / "model-2.safetensors")
    _index(base, {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})


def _beside(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"\x80\x04N.")


def _tensor(base: Path, place: float, odd: Callable[[dict[str, Any], str], None]) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    odd(weights, sorted(weights)[int(place * len(weights))])
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def _value(value: float, everywhere: bool = False) -> Callable[[dict[str, Any], str], None]:
    def change(weights: dict[str, Any], name: str) -> None:
        weights[name].reshape(-1)[None if everywhere else 3] = value

    return change


def _wider(weights: dict[str, Any], name: str) -> None:
    import torch

    weights[name] = torch.cat([weights[name], weights[name]])


TENSORS: dict[str, Callable[[dict[str, Any], str], None]] = {
    "missing": lambda weights, name: weights.__delitem__(name),
    "renamed": lambda weights, name: weights.update({f"x.{name}": weights.pop(name)}),
    "NaN": _value(float("nan")), "infinite": _value(float("inf")), "-inf": _value(float("-inf")),
    "twice as tall": _wider,
    "cut": lambda weights, name: weights.update({name: weights[name][:-1].clone()}),
    "flat": lambda weights, name: weights.update({name: weights[name].reshape(1, -1).clone()}),
    "empty": lambda weights, name: weights.update({name: weights[name][:0].clone()}),
    "one number": lambda weights, name: weights.update({name: weights[name].reshape(-1)[0].clone()}),
}  # fmt: skip
