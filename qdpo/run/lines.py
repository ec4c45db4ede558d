"""The JSON Lines files of a run: read whole, or with their damaged lines set aside when a run is continued."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.errors import DiskError
from qdpo.run import disk
from qdpo.run.typed import fits

RunLine = dict[str, Any]
NUMBERS = dict[str, int | float | None]


@dataclass(frozen=True)
class Sound:
    """The lines of a file that can be used, and the numbers of those that cannot."""

    values: list[RunLine]
    damaged: list[int]


def read_lines(path: Path, is_sound: Callable[[RunLine], bool] = lambda line: True) -> list[RunLine]:
    """The values of a JSON Lines file, without a partial last line left by a crash; empty if there is no file.

    Raises: DiskError that names the first damaged line.
    """
    found = sound_lines(path, is_sound)
    if found.damaged:
        raise DiskError(
            f"{path} line {found.damaged[0]} is damaged: it is not a record that qdpo wrote. Put the file back from a "
            "copy, or remove the line."
        )
    return found.values


def mend_lines(
    path: Path, is_sound: Callable[[RunLine], bool], say: Callable[[str], None], *, due: bool = False
) -> list[RunLine]:
    """As read_lines, but sets a file with damaged lines aside, says so, and continues with its other lines.

    Also says that a file which is `due` is missing.
    """
    if due and not disk.is_there(path):
        say(f"warning: {path} is missing; it begins again here")
    found = sound_lines(path, is_sound)
    if found.damaged:
        aside = path.with_name(f"damaged-{path.name}")
        disk.write_bytes(aside, disk.read_bytes(path))
        disk.write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found.values))
        numbers = ", ".join(map(str, found.damaged[:5])) + (", …" if len(found.damaged) > 5 else "")
        say(f"warning: {path} line {numbers}: damaged, left out (the file as it was is kept as {aside.name})")
    return found.values


def sound_lines(path: Path, is_sound: Callable[[RunLine], bool]) -> Sound:
    """The file's lines. Raises: DiskError if the path is not a file or cannot be read."""
    if not disk.is_there(path):
        return Sound([], [])
    try:
        content = disk.read_bytes(path)
    except OSError as error:
        raise DiskError(f"Cannot read {path}: {error}. Put the file back from a copy, or remove it.") from error
    values, damaged = [], []
    for number, raw in enumerate(content.split(b"\n")[:-1], 1):
        try:
            value = disk.parse(raw.decode())
        except ValueError:
            value = None
        if isinstance(value, dict) and is_sound(value):
            values.append(value)
        else:
            damaged.append(number)
    return Sound(values, damaged)


def is_metric(line: RunLine) -> bool:
    """True for a record of metrics.jsonl."""
    return fits(line, NUMBERS) and is_step(line.get("step")) and ("loss" in line or "eval_loss" in line)


def is_scored(line: RunLine) -> bool:
    """True for a pair of eval_pairs.jsonl."""
    moments = [line[name] for name in ("before", "after") if name in line]
    return (
        is_step(line.get("pair"))
        and is_step(line.get("row"))
        and bool(moments)
        and all(
            fits(each, dict[str, int | float]) and is_step(each.get("step")) and MOMENT <= set(each) for each in moments
        )
    )


def is_sampled(line: RunLine) -> bool:
    """True for a prompt of samples.jsonl with its answers."""
    during = line.get("during", [])
    answers = [line[name] for name in ("before", "after") if name in line]
    return (
        (line.get("row") is None or is_step(line["row"]))
        and fits([line.get("prompt"), *answers], list[str])
        and isinstance(during, list)
        and all(_is_answer(each, "") and is_step(each.get("step")) and fits(each.get("answer"), str) for each in during)
        and ("before_cut" not in line or _is_answer(line, "before_"))
        and ("before" in line or not during)
        and (not during or ("after" in line and is_step(line.get("after_tokens"))))
    )


def is_row_note(line: RunLine) -> bool:
    """True for a row of data_report.jsonl."""
    return all(fits(line.get(name), str) for name in ("action", "reason"))


MOMENT = {"step", "logps/chosen", "logps/rejected", "margin"}


def _is_answer(line: Any, before: str) -> bool:
    if not isinstance(line, dict):
        return False
    tokens, cut, repetition = (line.get(f"{before}{name}") for name in ("tokens", "cut", "repetition"))
    return is_step(tokens) and isinstance(cut, bool) and fits(repetition, float)


def is_step(value: Any) -> bool:
    """True for a whole number from 0 that a counter can reach."""
    return fits(value, int) and 0 <= value < 2**53
