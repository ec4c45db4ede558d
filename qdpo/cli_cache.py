"""The verbs of the cache: ls, verify, clear. `cli` registers them."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="List, check or clear reference log-probs and converted models.")
CacheDir = Annotated[
    Path | None, typer.Option("--dir", help="The cache folder. Default: $QDPO_CACHE, else qdpo in the user's cache.")
]


@app.command()
def ls(folder: CacheDir = None) -> None:
    """List references with what they belong to, converted models, and files set aside as damaged."""
    from qdpo.report.caches import list_lines

    typer.echo("\n".join(list_lines(folder)))


@app.command()
def verify(folder: CacheDir = None) -> None:
    """Check every row of every reference."""
    from qdpo.report.caches import verify_lines

    for line in verify_lines(folder):
        typer.echo(line)


@app.command()
def clear(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME…]", help="References, or how they begin.")] = None,
    corrupt: Annotated[bool, typer.Option("--corrupt", help="Remove files that were set aside as damaged.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Remove all, converted models too.")] = False,
    folder: CacheDir = None,
) -> None:
    """Remove references, and say what was freed; the next run that needs one computes it anew."""
    from qdpo.report.caches import clear_lines

    for line in clear_lines(folder, names or [], corrupt=corrupt, everything=everything):
        typer.echo(line)
