"""The verb that shows whether a run worked: report. `cli` registers it."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN…]", help="Run folders, finished or not.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The page. Default: RUN/report.html; for several runs ./report.html.")
    ] = None,
) -> None:
    """Write a page that says whether a run worked, with curves, samples and settings; several runs are compared.

    Example: qdpo report runs/demo-1a2b3c
    """
    from qdpo.report.page import write_report

    typer.echo(f"report: {write_report(runs, out).absolute()}")
