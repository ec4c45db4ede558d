"""The verb of the labelling page: label. `cli` registers it."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

Candidates = Annotated[list[Path], typer.Argument(metavar="CANDIDATES", help="Files of `qdpo sample`, or like them.")]


def label(
    candidates: Candidates,
    out: Annotated[Path, typer.Option(help="The pairs; the same command again goes on.")] = Path("pairs.jsonl"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of 127.0.0.1. Default: a free one.")] = 0,
    blind: Annotated[bool, typer.Option("--blind", help="Do not say which model gave an answer.")] = False,
    agreement: Annotated[bool, typer.Option("--agreement", help="Ask 5 % of the picks a second time.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Another number shows answers in another order.")] = 0,
    open_: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in the browser.")] = True,
) -> None:
    """Pick the best and the worst answer, or edit one into a better one, on a page that this machine serves to itself.

    Every decision is on disk before the page says so. Several files of candidates are put together by prompt. A prompt
    that a judge left open waits here too. Ctrl-C ends it.

    Example: qdpo label candidates.jsonl --out pairs.jsonl
    """
    from qdpo.collect.candidates import read_candidates
    from qdpo.collect.decisions import opened
    from qdpo.collect.labelling import Labelling
    from qdpo.collect.server import LabelServer
    from qdpo.errors import ConfigError

    if out.suffix != ".jsonl":
        raise ConfigError(f"--out={out}: pairs are JSON lines. Give a name that ends in .jsonl.")
    found = read_candidates(candidates)
    with opened(out, found.items) as decisions:
        labelling = Labelling(decisions, seed, blind, agreement)
        with LabelServer(labelling, port) as server:
            for note in found.notes:
                typer.echo(note)
            typer.echo(f"{len(found.items):,} prompts, decisions go to {decisions.journal}, pairs to {out}")
            typer.echo(f"page: {server.address}\nCtrl-C ends it; the same command goes on.")
            if open_:
                webbrowser.open(server.address)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                with server.lock:  # a decision that is being written is written to its end
                    for line in labelling.summary():
                        typer.echo(line)
