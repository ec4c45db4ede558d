"""The verbs about this machine: doctor, and cache with ls, verify, clear."""

from pathlib import Path
from typing import Annotated

import typer

from qdpo.cli.common import quiet_libraries
from qdpo.errors import ConfigError, VerificationError
from qdpo.settings import layered

cache = typer.Typer(no_args_is_help=True, help="List, check or clear reference log-probs and converted models.")
CacheDir = Annotated[
    Path | None, typer.Option("--dir", help="The cache folder. Default: $QDPO_CACHE, else qdpo in the user's cache.")
]


def doctor() -> None:
    """Check this machine: versions, card, 4-bit layers, memory, disk, hub; and list which presets fit.

    Exits with code 7 if something prevents runs. Requests one page from the hub, unless HF_HUB_OFFLINE is set.
    """
    quiet_libraries()
    from qdpo.machine.doctor import run_checks

    checks, machine = run_checks()
    for check in checks:
        typer.echo(check.line)
    for name in layered.preset_names():
        typer.echo(f"{'':4}  {name:<10}  {_preset_here(name, machine.device, machine.free_gib)}")
    bad = sum(check.mark == "bad" for check in checks)
    if bad:
        typer.echo(f"{bad} of {len(checks)} checks failed. Each line says what to do.")
        raise typer.Exit(VerificationError.exit_code)


def _preset_here(name: str, device: str, free_gib: float) -> str:
    """Line on whether the preset fits in the memory that is free now."""
    from qdpo.forecast.memory import GIB
    from qdpo.forecast.plan import make_plan

    resolved = layered.resolve([f"preset={name}"])
    if device == "cpu" and resolved.config.model.device != "cpu":
        return "needs a CUDA card"
    try:
        plan = make_plan(resolved, gpu_gib=free_gib, others_gib=0.0, read_data=False)
    except ConfigError:
        return f"does not fit: {free_gib:.1f} GiB are free, less than its weights need"
    peak, longest = plan.chosen.peak / GIB, plan.known.lengths.longest
    if not plan.fits:
        return f"does not fit: forecast {peak:.1f} GiB with pairs of {longest:,} tokens, {free_gib:.1f} are free"
    return f"fits: forecast {peak:.1f} GiB with pairs of {longest:,} tokens, {free_gib:.1f} are free"


@cache.command()
def ls(folder: CacheDir = None) -> None:
    """List references with the data and model they belong to, converted models, damaged files, and traced layers."""
    from qdpo.machine.caches import list_lines

    typer.echo("\n".join(list_lines(folder)))


@cache.command()
def verify(folder: CacheDir = None) -> None:
    """Check every row of every reference."""
    from qdpo.machine.caches import verify_lines

    for line in verify_lines(folder):
        typer.echo(line)


@cache.command()
def clear(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME…]", help="References, by name or its beginning.")
    ] = None,
    corrupt: Annotated[bool, typer.Option("--corrupt", help="Remove files that were set aside as damaged.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Remove everything, converted models and traced layers too.")
    ] = False,
    folder: CacheDir = None,
) -> None:
    """Remove references and report the space freed; the next run that needs a reference computes it again."""
    from qdpo.machine.caches import clear_lines

    for line in clear_lines(folder, names or [], corrupt=corrupt, everything=everything):
        typer.echo(line)
