"""Stage 5: stage 2's figures into the presets' [measured] tables, and the README's table of presets.

It needs no GPU, only results that a GPU gave: figures of a CPU, of a tiny shape, or of a preset that did not run are
never written.
"""

import tomllib
from pathlib import Path

from benchmarks.proof.items import OK, Options, Result
from benchmarks.proof.records import Records
from qdpo.errors import ConfigError
from qdpo.forecast.preset_table import preset_table
from qdpo.measure.bench import Measured, write_measured

BEFORE_NAME = "preset "
FENCE = "```"


def run(options: Options, records: Records) -> int:
    """Writes what there is; returns 0, or 3 if a preset has no figures of a GPU yet."""
    written, lacking = [], []
    for path in sorted(options.presets.glob("*.toml")):
        if not tomllib.loads(path.read_text(encoding="utf-8"))["card"].partition(" ")[0].isdigit():
            continue  # made for no card
        result = newest(records, path.stem)
        if result is None:
            lacking.append(path.stem)
            continue
        measured = Measured(**result.values)
        write_measured(path.stem, measured, options.presets, commit=result.commit, date=result.date)
        written.append(path.stem)
    if written:
        replace_table(options.readme, preset_table(options.presets))
        print(f"written into {options.presets.name}/: {', '.join(written)}; {options.readme.name} shows them")
    if lacking:
        print(f"not measured on a GPU, and left as they are: {', '.join(lacking)}")
    return 3 if lacking and (options.cuda and not options.tiny) else 0


def newest(records: Records, preset: str) -> Result | None:
    """The last good result of the preset on a GPU at its true size."""
    found = [one for one in records.of_stage(2) if one.item == BEFORE_NAME + preset]
    good = [one for one in found if one.cuda and not one.tiny and one.status == OK]
    return good[-1] if good else None


def replace_table(readme: Path, lines: list[str]) -> None:
    """Puts the table in the place of the old one: the fenced block that begins with its first column."""
    text = readme.read_text(encoding="utf-8")
    head, found, rest = text.partition(f"{FENCE}\npreset ")
    body, end, tail = rest.partition(f"\n{FENCE}")
    if not found or not end:
        raise ConfigError(f"{readme} has no table of presets between two lines of {FENCE}. Put one there by hand.")
    readme.write_text(f"{head}{FENCE}\n" + "\n".join(lines) + f"\n{FENCE}{tail}", encoding="utf-8")
