"""Shows rows, writes them as plain pairs, or splits them by prompt; as text, without a tokenizer."""

import json
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import IO

from qdpo.data.layouts import pair
from qdpo.data.layouts.pair import Pair, Rejection
from qdpo.data.prepare import open_sources
from qdpo.data.read.progress import BadLine
from qdpo.data.split import chosen_prompts
from qdpo.errors import ConfigError, DataError
from qdpo.run import disk
from qdpo.run.watcher import Watcher
from qdpo.settings.schema import RunConfig


def pairs_of_rows(config: RunConfig, wanted: set[int], watcher: Watcher) -> list[tuple[int, list[Pair | Rejection]]]:
    """The pairs of the rows with these numbers."""
    found = []
    for number, pairs in _rows(config, watcher):
        if number in wanted:
            found.append((number, pairs))
        if number >= max(wanted, default=0):
            break
    return found


def convert_data(config: RunConfig, out: Path, watcher: Watcher, *, force: bool) -> str:
    """Write every usable pair as messages, row by row; return a line of counts. Raises: DataError if there is none."""
    _refuse_existing([out], force)
    dropped: Counter[str] = Counter()
    kept = 0

    def fill(file: IO[bytes]) -> None:
        nonlocal kept
        for found in _pairs(config, dropped, watcher):
            file.write(_line(found))
            kept += 1
        if not kept:
            raise DataError(f"No usable pair in {config.data.path}: {_counted(dropped)}.")

    disk.write_stream(out, fill)
    return f"{out}: {kept:,} pairs; left out: {_counted(dropped)}"


def split_data(config: RunConfig, folder: Path, watcher: Watcher, *, fraction: float, seed: int, force: bool) -> str:
    """Write train.jsonl and held_out.jsonl; no prompt is in both. Raises: DataError if one would be empty."""
    files = {name: folder / f"{name}.jsonl" for name in ("train", "held_out")}
    _refuse_existing(list(files.values()), force)
    dropped: Counter[str] = Counter()
    keys = [_key(found, seed) for found in _pairs(config, dropped, watcher)]
    held = chosen_prompts(keys, fraction, None) if len(keys) > 1 else set()
    if not held:
        raise DataError(
            f"{config.data.path} has {len(keys)} usable pairs with {len(set(keys))} different prompts, which cannot be "
            "split: all pairs of a prompt stay on one side."
        )
    for name, path in files.items():

        def fill(file: IO[bytes], is_held: bool = name == "held_out") -> None:
            for found in _pairs(config, Counter(), watcher):
                if (_key(found, seed) in held) == is_held:
                    file.write(_line(found))

        disk.write_stream(path, fill)
    count = sum(key in held for key in keys)
    return (
        f"{files['train']}: {len(keys) - count:,} pairs · {files['held_out']}: {count:,} pairs; left out: "
        f"{_counted(dropped)}"
    )


def _rows(config: RunConfig, watcher: Watcher) -> Iterator[tuple[int, list[Pair | Rejection]]]:
    number = 0
    for source, layout, _count in open_sources(config.data, str(config.data.path), config.data.split, watcher):
        for _place, row in source.rows.located():
            number += 1
            if isinstance(row, BadLine):
                yield number, [Rejection(number, row.reason, row.detail)]
            else:
                yield number, pair.to_pairs(row, number, layout, keep_empty_rejected=config.data.keep_empty_rejected)


def _pairs(config: RunConfig, dropped: Counter[str], watcher: Watcher) -> Iterator[Pair]:
    kept = 0
    for _number, pairs in _rows(config, watcher):
        for found in pairs:
            if isinstance(found, Rejection):
                dropped[found.reason] += 1
            else:
                yield found
                kept += 1
                if kept == config.data.limit:
                    return


def _line(found: Pair) -> bytes:
    chosen, rejected = found.answers()
    row = {"prompt": found.prompt, "chosen": [chosen], "rejected": [rejected]}
    if found.tools:
        row["tools"] = found.tools
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


def _key(found: Pair, seed: int) -> bytes:
    return sha256(f"{seed}:{json.dumps(found.prompt, sort_keys=True)}".encode()).digest()


def _counted(dropped: Counter[str]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in dropped.most_common()) or "none"


def _refuse_existing(paths: list[Path], force: bool) -> None:
    for path in paths:
        if path.exists() and not force:
            raise ConfigError(f"{path} exists. Choose another name, or replace it with --force.")
