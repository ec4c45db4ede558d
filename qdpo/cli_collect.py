"""The verbs that make pairs by hand: sample, label. `cli` registers them."""

import shlex
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from qdpo.cli_measure import Settings, quiet_libraries
from qdpo.errors import ConfigError

Files = Annotated[list[Path], typer.Argument(metavar="CANDIDATES…", help="Prompts with answers, one a line (.jsonl).")]


def sample(
    prompts: Annotated[
        str,
        typer.Argument(metavar="PROMPTS", help="A text with a prompt a line, or data: a file, a folder, a hub id."),
    ],
    settings: Settings = None,
    out: Annotated[Path, typer.Option(help="The file of candidates; the same command again goes on with it.")] = Path(
        "candidates.jsonl"
    ),
    adapter: Annotated[
        Path | None, typer.Option(metavar="RUN", help="A finished run: its trained model answers, not the base.")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=2, max=9, help="Different answers to each prompt.")] = 4,
    temperature: Annotated[float, typer.Option(min=0.05, max=5.0, help="1: as the model is. Higher: bolder.")] = 0.8,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Draw from the most likely tokens of this sum.")
    ] = 0.95,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(min=0, help="Another number draws other answers.")] = 0,
    limit: Annotated[int | None, typer.Option(min=1, help="Most prompts used, from the front.")] = None,
    column: Annotated[str | None, typer.Option(help="The column with the prompts. Default: by its name.")] = None,
) -> None:
    """Draw several answers to each prompt from your own model, for `qdpo label` or `qdpo judge` to choose between.

    Every finished prompt is on disk at once. Each answer has a random stream of its own, so it does not depend on what
    else is in the batch.

    Example: qdpo sample prompts.txt preset=7b-24gb --out candidates.jsonl
    """
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out={out}: candidates are JSON lines. Give a name that ends in .jsonl.")
    quiet_libraries()
    from qdpo.collect.sample import Drawing, Sampled, read_prompts
    from qdpo.collect.sample import sample as sample_prompts
    from qdpo.collect.sampler import base_sampler, run_sampler
    from qdpo.report.terminal import Terminal

    terminal = Terminal()
    found: Sampled
    try:
        read = read_prompts(prompts, column, limit, terminal)
        sampler = run_sampler(adapter, settings or [], terminal) if adapter else base_sampler(settings or [], terminal)
        drawing = Drawing(n, temperature, top_p, max_new_tokens, seed)
        found = sample_prompts(sampler, read, out, drawing, terminal)
    finally:
        terminal.finish()
    for line in found.lines():
        typer.echo(line)
    typer.echo(f"{out}: {found.prompts:,} prompts. Next: qdpo label {shlex.quote(str(out))} --out pairs.jsonl")


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
