"""The verbs that make preference pairs: label. `cli` registers them."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

Files = Annotated[list[Path], typer.Argument(metavar="CANDIDATES…", help="Prompts with answers, one a line (.jsonl).")]


def label(
    candidates: Files,
    out: Annotated[Path, typer.Option(help="The pairs; beside them lies the journal of decisions.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: the system chooses a free one.")] = 0,
    blind: Annotated[bool, typer.Option("--blind", help="Hide which model wrote an answer.")] = False,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="Ask 5 % of the picks again, and report how often you agree.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the order in which answers are shown.")] = 0,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = False,
) -> None:
    """Choose between answers on a page of this machine, by keyboard; the same command again goes on where it stopped.

    Every decision is on disk before the page says so. Ctrl-C ends it. Candidates of several files are put together.

    Example: qdpo label candidates.jsonl --out pairs.jsonl
    """
    from qdpo.collect.candidates import read_candidates
    from qdpo.collect.decisions import opened
    from qdpo.collect.labelling import Labelling, Options
    from qdpo.collect.server import LabelServer

    found = read_candidates(candidates)
    with opened(out, found.items) as decisions:
        labelling = Labelling(decisions, Options(blind, agreement, seed))
        with LabelServer(labelling, port) as server:
            for note in found.notes:
                typer.echo(note)
            typer.echo(f"{len(found.items):,} prompts. The page, until Ctrl-C: {server.address}")
            if open_ and not webbrowser.open(server.address):
                typer.echo("No browser could be opened; open the address yourself.")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                typer.echo()
        for line in labelling.summary():
            typer.echo(line)
