"""The verbs that make pairs by hand: sample, label. `cli` registers them."""

import shlex
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from qdpo.cli_measure import Settings, quiet_libraries
from qdpo.errors import ConfigError

Candidates = Annotated[list[Path], typer.Argument(metavar="CANDIDATES", help="Files of `qdpo sample`, or like them.")]


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
