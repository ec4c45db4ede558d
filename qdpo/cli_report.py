"""The verbs that show whether a run worked, and whether this machine can run one: report, doctor. `cli` has them."""

from pathlib import Path
from typing import Annotated

import typer

from qdpo.cli_measure import quiet_libraries
from qdpo.errors import ConfigError
from qdpo.settings import layered


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


def doctor() -> None:
    """Say what this machine has and lacks: versions, card, 4-bit layers, memory, disk, hub; and which presets fit.

    Exit code 1 if something keeps runs from working. The hub is asked for one page, unless HF_HUB_OFFLINE is set.
    """
    quiet_libraries()
    from qdpo.report.doctor import examine

    checks, machine = examine()
    for check in checks:
        typer.echo(check.line)
    for name in layered.preset_names():
        typer.echo(f"{'':4}  {name:<10}  {_preset_here(name, machine.device, machine.free_gib)}")
    bad = sum(check.mark == "bad" for check in checks)
    if bad:
        typer.echo(f"{bad} of {len(checks)} checks failed; each says what to do.")
        raise typer.Exit(1)


def _preset_here(name: str, device: str, free_gib: float) -> str:
    """What the preset can do with the memory that is free now."""
    from qdpo.forecast.memory import GIB
    from qdpo.forecast.plan import make_plan

    resolved = layered.resolve([f"preset={name}"])
    if device == "cpu" and resolved.config.model.device != "cpu":
        return "needs a CUDA card"
    try:
        plan = make_plan(resolved, gpu_gib=free_gib, others_gib=0.0, read_data=False)
    except ConfigError:
        return f"does not fit: {free_gib:.1f} GiB are free, less than its weights take"
    peak, longest = plan.chosen.peak / GIB, plan.known.lengths.longest
    if not plan.fits:
        return f"does not fit: forecast {peak:.1f} GiB with pairs of {longest:,} tokens, {free_gib:.1f} are free"
    return f"fits: forecast {peak:.1f} GiB with pairs of {longest:,} tokens, {free_gib:.1f} are free"
