"""The verb that merges. `cli` registers it."""

import dataclasses
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qdpo.cli_measure import quiet_libraries


class Base(StrEnum):
    dequantized = "dequantized"
    original = "original"


class Dtype(StrEnum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


def merge(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="A new folder. Default: RUN/merged.")] = None,
    base: Annotated[
        Base, typer.Option(help="The 4-bit weights that were trained on, dequantised; or those in the base's files.")
    ] = Base.dequantized,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: as the base's files if these have 16 bits, else what the run used.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Compare the files, reloaded, with the trained model.")] = True,
    compare: Annotated[bool, typer.Option("--compare", help="Compare a merge into the other base, too.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Merge nothing: compare OUT, which exists, again.")] = False,
    data: Annotated[
        str | None, typer.Option(help="Pairs to compare on, as data.path. Default: the run's held-out pairs.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Compare on this many pairs at most.")] = 32,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Merge a run's adapter into its base, and prove that the merged files are the model that was trained.

    Example: qdpo merge runs/7b-24gb-1a2b3c
    """
    quiet_libraries()
    from qdpo.errors import ConfigError
    from qdpo.export.prove import Options, check_again, merge_proved, table
    from qdpo.report.terminal import Terminal
    from qdpo.run.folder import RunDir

    if not verify and (compare or check):
        raise ConfigError("--no-verify leaves nothing for --compare or --check to do. Leave one of them out.")
    run, terminal = RunDir(run_folder), Terminal(stderr=json_)
    folder = out or run.merged
    options = Options(base.value, dtype.value if dtype else None, verify, compare, data, pairs)
    try:
        if check:
            report, found = None, check_again(run, folder, options, terminal)
        else:
            report, found = merge_proved(run, folder, options, terminal)
    finally:
        terminal.finish()
    if json_:
        typer.echo(
            json.dumps(
                {
                    "merged": dataclasses.asdict(report) if report else None,
                    "verification": [one.to_json(run) for one in found],
                }
            )
        )
        return
    for line in table(found) if found else ["not compared with the trained model (--no-verify)"]:
        typer.echo(line)
    if report:
        typer.echo(f"merged model: {report.folder}  ({report.bytes / 2**30:.2f} GiB in {report.seconds:.0f} s)")
