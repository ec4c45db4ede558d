"""The verbs that review training: report, runs, eval, compare, chat, metrics."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from qdpo.cli.common import MaxNewTokens, PlaceArguments, Run, Seed, finite, quiet_libraries, warmth


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN…]", help="Run folders, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The page to write. Default: RUN/report.html; for several runs ./report.html."),
    ] = None,
) -> None:
    """Write a page that says whether a run worked, with curves, samples and settings; several runs are compared.

    Example: qdpo report runs/demo-1a2b3c
    """
    from qdpo.report.page.page import write_report

    typer.echo(f"report: {write_report(runs, out).absolute()}")


def runs(folder: Annotated[Path, typer.Argument(help="Folder that holds the run folders.")] = Path("runs")) -> None:
    """List runs with their state and result."""
    from qdpo.report.screen.runs import run_lines

    for line in run_lines(folder):
        typer.echo(line)


def eval_(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[data.path=…] [key=value …]")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Score a trained run again, on its own held-out pairs or on others."""
    quiet_libraries()
    from qdpo.report.screen.live import Terminal, print_evaluation
    from qdpo.review.score import rescore

    terminal = Terminal(stderr=json_)
    try:
        scored = rescore(run_folder, settings or [], terminal)
    finally:
        terminal.finish()
    print_evaluation(scored, as_json=json_)


def compare(
    run: Run,
    settings: PlaceArguments = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text file with a prompt a line, or .jsonl with `prompt` as text or messages."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Maximum number of prompts.")] = 20,
    max_new_tokens: MaxNewTokens = 160,
    temperature: Annotated[
        float, typer.Option(callback=warmth, help="0: greedy. 1: the models' own probabilities.")
    ] = 0.0,
    seed: Seed = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Compare base and tuned model on the same prompts: answers, lengths, repetition, log-probs, and the KL.

    The default prompts are the run's held-out ones. The base is the bare model, even if the run continued an adapter.

    Example: qdpo compare runs/demo --prompts questions.txt
    """
    quiet_libraries()
    from qdpo.report.screen.comparison import print_comparison
    from qdpo.report.screen.live import Terminal
    from qdpo.review.compare import CompletionParameters, compare_run

    terminal = Terminal(stderr=json_)
    drawing = CompletionParameters(max_new_tokens, temperature, seed)
    try:
        found = compare_run(run, settings or [], terminal, prompts=prompts, count=n, drawing=drawing)
    finally:
        terminal.finish()
    if json_:
        typer.echo(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        print_comparison(found, terminal.console)


def chat(
    run: Run,
    settings: PlaceArguments = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Annotated[float, typer.Option(callback=warmth, help="0: greedy.")] = 0.7,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.01, max=1.0, callback=finite, help="Draw from the most likely tokens up to this total probability."
        ),
    ] = 0.95,
    seed: Seed = 0,
) -> None:
    """Chat with the base and the tuned model at once; both sample with the same random numbers.

    Each keeps its own conversation. Also reads from a pipe, one message a line.

    Example: qdpo chat runs/demo
    """
    quiet_libraries()
    from qdpo.report.screen.live import Terminal
    from qdpo.review.chat import Chat, talk
    from qdpo.review.open import reopen, tuned

    terminal = Terminal(stderr=not sys.stdout.isatty())
    try:
        opened = reopen(run, settings or [], terminal)
        policy, tokenizer = tuned(opened, terminal)
    finally:
        terminal.finish()
    chat = Chat(
        policy=policy, tokenizer=tokenizer, data=opened.config.data, max_new_tokens=max_new_tokens,
        temperature=temperature, top_p=top_p, seed=seed,
    )  # fmt: skip
    talk(chat, sys.stdin, sys.stdout)


def metrics(
    name: Annotated[str | None, typer.Argument(help="A metric, a loss or a modifier. Default: the whole page.")] = None,
) -> None:
    """Explain the metrics, beta, the losses and their modifiers.

    Example: qdpo metrics rewards/margins
    """
    from rich.markdown import Markdown

    from qdpo.report.screen.console import Screen
    from qdpo.report.screen.explain import explain

    text, console = explain(name), Screen()
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        typer.echo(text)
