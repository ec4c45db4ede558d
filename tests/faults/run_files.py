"""Small files of a run, damaged at a random place, and every verb that reads a run."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.base import DONE, REFUSED, SAME, Case, Good

Damage = Callable[[Path], None]
RUN = Path("runs/run")
# A change of these must never pass: they steer the run.
STEERING = ("run.json", "prepared/train.safetensors", "prepared/held_out.safetensors")
RECORDS = ("run.json", "environment.json", "result.json")
LINES = ("metrics.jsonl", "samples.jsonl", "eval_pairs.jsonl", "data_report.jsonl")
STATE = tuple(f"checkpoints/step-000001/{name}" for name in ("MANIFEST.json", "state.json", "adapter.safetensors"))
FILES = (*STEERING, *RECORDS[1:], *LINES, "config.toml", *STATE)
ODD = (None, 0, -1, 10**30, 1e400, float("nan"), "", "x", [], {}, [[]], True, "\ud800"[:0] + "é" * 9)
READERS = {
    "report": ["report", "runs/run"],
    "runs": ["runs", "runs"],
    "eval": ["eval", "runs/run"],
    "compare": ["compare", "runs/run", "--n", "1", "--max-new-tokens", "4"],
    "chat": ["chat", "runs/run", "--max-new-tokens", "4"],
    "merge": ["merge", "runs/run"],
    "export": ["export", "runs/run", "--to", "peft"],
}


def cases(rng: random.Random, good: Good) -> Iterator[Case]:
    """Endless: a file of the stopped or the finished run, a damage, and a verb."""
    number = 0
    while True:
        number += 1
        file = rng.choice(FILES)
        what, damage = rng.choice(damages(rng, file, good))
        verb = rng.choice(("run", "run", "run", *READERS))
        source = good.stopped if verb == "run" and rng.random() < 0.7 else good.run
        state = "stopped" if source is good.stopped else "finished"
        yield case(good, f"{number}: {file} {what}, {state}, {verb}", source, file, damage, verb)


def case(good: Good, name: str, source: Path, file: str, damage: Damage, verb: str) -> Case:
    """Damages `file` of a copy of the run `source`, and gives it to the verb."""

    def make(folder: Path) -> list[str]:
        words = good.lay_run(folder, source)
        damage(folder / RUN / file)
        return words if verb == "run" else READERS[verb]

    right = REFUSED | (SAME if verb == "run" else DONE)
    near = None if file.startswith("checkpoints") else Path(file).name
    return Case("run_files", name, make, right, near, typed="hello\n")


def damages(rng: random.Random, file: str, good: Good) -> list[tuple[str, Damage]]:
    """Damages of this file, each at a random place."""
    share, bit, odd = rng.random(), rng.randrange(8), rng.choice(ODD)
    found: list[tuple[str, Damage]] = [
        (f"cut at {share:.3f}", lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])),
        ("empty", lambda path: path.write_bytes(b"")),
        (f"bit {bit} at {share:.3f}", lambda path: flip(path, share, bit)),
        (f"not UTF-8 at {share:.3f}", lambda path: insert(path, share, b"\xff\xfe")),
        (f"NUL line at {share:.3f}", lambda path: insert(path, share, b"\n\0\0\0\n")),
        ("missing", lambda path: path.unlink()),
        ("a list", lambda path: path.write_text("[]\n")),
        ("deep", lambda path: path.write_text("[" * 100_000 + "\n")),
    ]
    if file.endswith((".json", ".jsonl")):
        found += [(f"a value {odd!r:.20} at {share:.3f}", lambda path: change(path, share, odd))] * 3
        found += [(f"without the key at {share:.3f}", lambda path: change(path, share, change))] * 2
    if file.startswith("prepared"):
        found += [
            (f"one id at {share:.3f}", lambda path: edit(path, "ids", share, rng.choice([-5, 3, 10**6]))),
            ("two lengths swapped", lambda path: swap_lengths(path)),
            (f"one row at {share:.3f}", lambda path: edit(path, "rows", share, 10**6)),
            ("exchanged with the other", exchange),
        ]
    return found


def flip(path: Path, share: float, bit: int) -> None:
    """Turns one bit over."""
    content = bytearray(path.read_bytes())
    if content:
        content[int(share * (len(content) - 1))] ^= 1 << bit
        path.write_bytes(content)


def insert(path: Path, share: float, what: bytes) -> None:
    """Puts bytes in."""
    content = path.read_bytes()
    place = int(share * len(content))
    path.write_bytes(content[:place] + what + content[place:])


def change(path: Path, share: float, odd: Any) -> None:
    """Replaces one value of a JSON file, or of a line, at any depth; `change` itself removes the key."""
    lines = path.read_text().split("\n") if path.suffix == ".jsonl" else [path.read_text()]
    at = int(share * max(1, len(lines) - 1)) % len(lines)
    if not lines[at]:
        return
    value = json.loads(lines[at])
    places = list(leaves(value))
    holder, key = places[int(share * 7919) % len(places)]
    if odd is change:
        del holder[key]
    else:
        holder[key] = odd
    lines[at] = json.dumps(value)
    path.write_text("\n".join(lines))


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a JSON value, as its holder and key."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from leaves(value[key])


def edit(path: Path, name: str, share: float, number: int) -> None:
    """One number of a tensor, in place."""
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    about = json.loads(content[8 : 8 + size])[name]
    kind = np.dtype("<i4" if about["dtype"] == "I32" else "<i8")
    start, end = (8 + size + place for place in about["data_offsets"])
    values = np.frombuffer(bytes(content[start:end]), kind).copy()
    values[int(share * (len(values) - 1))] = number
    content[start:end] = values.tobytes()
    path.write_bytes(content)


def swap_lengths(path: Path) -> None:
    """The lengths of the first pair's prompt and chosen answer, exchanged."""
    content = bytearray(path.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start = 8 + size + json.loads(content[8 : 8 + size])["lengths"]["data_offsets"][0]
    content[start : start + 8] = content[start + 4 : start + 8] + content[start : start + 4]
    path.write_bytes(content)


def exchange(path: Path) -> None:
    """Training and held-out pairs, exchanged."""
    train, held_out = path.with_name("train.safetensors"), path.with_name("held_out.safetensors")
    one, other = train.read_bytes(), held_out.read_bytes()
    train.write_bytes(other)
    held_out.write_bytes(one)
