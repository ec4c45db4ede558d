"""The verbs that look at what training did: compare, chat, sweep. `cli` registers them."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from qdpo.cli_measure import Settings, quiet_libraries
from qdpo.errors import ConfigError

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]
Places = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value …]", help="model.device, memory.* and cache.dir may differ from the run's."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Seed = Annotated[int, typer.Option(min=0, help="Draws the answers where the temperature is above 0.")]


def compare(
    run: Run,
    settings: Places = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text with a prompt a line, or .jsonl with `prompt` as text or messages."),
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="Most prompts used.")] = 20,
    max_new_tokens: MaxNewTokens = 160,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy. 1: as the models are.")] = 0.0,
    seed: Seed = 0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Base against tuned on the same prompts: both answers, their length, repetition and log-probs, and the KL.

    The default prompts are the run's held-out ones. The base is the bare one, also where the run continued an adapter.

    Example: qdpo compare runs/demo --prompts questions.txt
    """
    quiet_libraries()
    from qdpo.report.compare import print_comparison
    from qdpo.report.terminal import Terminal
    from qdpo.train.compare import Drawing, compare_run

    terminal = Terminal(stderr=json_)
    drawing = Drawing(max_new_tokens, temperature, seed)
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
    settings: Places = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Draw from the most likely tokens of this sum.")
    ] = 0.95,
    seed: Seed = 0,
) -> None:
    """Talk to the base and to the tuned model at once; both draw with the same random numbers.

    Each keeps its own conversation. Also reads from a pipe: one line, one message.

    Example: qdpo chat runs/demo
    """
    quiet_libraries()
    from qdpo.report.chat import Chat, talk
    from qdpo.report.terminal import Terminal
    from qdpo.train.reopen import reopen, tuned

    terminal = Terminal(stderr=not sys.stdout.isatty())
    try:
        opened = reopen(run, settings or [], terminal)
        policy, tokenizer = tuned(opened, terminal)
    finally:
        terminal.finish()
    drawing = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    talk(Chat(policy, tokenizer, opened.config.data, drawing, seed), sys.stdin, sys.stdout)


def sweep(settings: Settings = None) -> None:
    """Train once for each combination of the values that commas part, one run after the other, and compare them.

    Each is an ordinary run in output.dir; the same command continues where it was stopped, and shows what is finished.

    Example: qdpo sweep preset=7b-24gb loss.beta=0.05,0.1,0.3 train.learning_rate=5e-6,1e-5
    """
    from qdpo.report.sweep import print_sweep, write_sweep
    from qdpo.train.sweep import plan_sweep, run_sweep

    planned = plan_sweep(settings or [])
    ended, exit_code = run_sweep(planned, typer.echo)
    print_sweep(ended, write_sweep(planned.folder, ended))
    done = [one.planned.run.path for one in ended if one.exit_code == 0]
    if len(done) > 1:
        typer.echo(_overlaid(done, planned.folder / "sweep.html"))
    if exit_code:
        raise typer.Exit(exit_code)


def _overlaid(runs: list[Path], out: Path) -> str:
    """Writes the page that compares the runs; a line for the user."""
    from qdpo.report.page import write_report

    try:
        return f"report: {write_report(runs, out)}"
    except ConfigError as error:  # the curves' library is an extra, and the runs are done without it
        return f"no report: {error}"
