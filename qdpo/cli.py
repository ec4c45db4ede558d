"""The verbs: parse, call one function, turn a QdpoError into one message and an exit code."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from qdpo import (
    __version__,
    cli_cache,
    cli_collect,
    cli_data,
    cli_export,
    cli_judge,
    cli_look,
    cli_measure,
    cli_report,
    cli_ship,
)
from qdpo.cli_measure import Settings, quiet_libraries
from qdpo.errors import QdpoError
from qdpo.settings import layered

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Preference-tune a 7B-13B language model on one consumer GPU: DPO with a LoRA adapter over a 4-bit base.",
)
app.add_typer(cli_cache.app, name="cache")
app.add_typer(cli_data.app, name="data")
# The folder of the run that this process works on, once it is known: its debug.log takes tracebacks.
_run_folder: list[Path] = []


@app.command(context_settings={"ignore_unknown_options": True})
def run(
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved settings with their origins, and stop.")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew; an earlier run of the same settings is kept aside.")
    ] = False,
) -> None:
    """Train a LoRA adapter on preference pairs; the same command again continues or shows the result.

    Example: qdpo run preset=7b-24gb data.path=pairs.jsonl

    Every setting and its default: qdpo run preset=demo --dry-run
    """
    resolved = layered.resolve(settings or [])
    for note in resolved.notes:
        typer.echo(note, err=dry_run)
    from qdpo.run import lock, record

    if dry_run:
        typer.echo(record.config_toml(resolved, {}))
        return
    folder = record.run_folder(resolved)
    _run_folder.append(folder.path)
    if fresh and folder.path.exists():
        typer.echo(f"the earlier run is kept as {lock.move_aside(folder)}")
    from qdpo.report.terminal import Terminal, print_result
    from qdpo.run.disk import read_json

    terminal = Terminal()
    if folder.result.exists():
        record.check_unchanged(folder, resolved)
        terminal.say(f"{folder.path} is finished; --fresh would start anew")
        result = read_json(folder.result)
    else:
        result = _train(resolved, terminal)
    if folder.adapter.is_dir() and not (folder.adapter / "README.md").exists():  # a kill may come before the card
        from qdpo.report.card import write_card

        with lock.alone(folder):
            lock.clear_leftovers(folder)
            write_card(folder, resolved)
    print_result(folder, result, terminal.console)


def _train(resolved: layered.Resolved, terminal: Any) -> dict[str, Any]:
    quiet_libraries()
    if resolved.preset is not None:
        for name, what in (("model.path", "model"), ("data.path", "preference pairs")):
            if resolved.origins[name] == f"preset {resolved.preset}":
                value = layered.flat(resolved.config)[name]
                terminal.say(f"{what}: {value}, the preset's own; {name}=… replaces it")
    from qdpo.train.loop import run_training

    try:
        with _left_at_once():
            return run_training(resolved, terminal)
    finally:
        terminal.finish()


@contextlib.contextmanager
def _left_at_once() -> Iterator[None]:
    """A second Ctrl-C: typer would exit without a word."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("qdpo: left at once. What was saved before is intact; the same command continues.", err=True)
        raise typer.Exit(130) from None


SETTINGS = {"ignore_unknown_options": True}
app.command(context_settings=SETTINGS)(cli_measure.plan)
app.command()(cli_measure.fit)
app.command(context_settings=SETTINGS)(cli_measure.bench)
app.command(context_settings=SETTINGS)(cli_collect.sample)
app.command()(cli_collect.label)
app.command()(cli_judge.judge)
app.command()(cli_report.report)
app.command(context_settings=SETTINGS)(cli_look.compare)
app.command(context_settings=SETTINGS)(cli_look.chat)
app.command(context_settings=SETTINGS)(cli_look.sweep)
app.command()(cli_export.merge)
app.command()(cli_ship.export)
app.command()(cli_ship.push)
app.command()(cli_report.doctor)


@app.command(name="presets")
def presets_(name: Annotated[str | None, typer.Argument(help="Show this preset's file.")] = None) -> None:
    """List the presets with their forecast and measured peaks, or print one with its comments."""
    if name is not None:
        typer.echo(layered.preset_text(name))
        return
    from qdpo.forecast.preset_table import preset_table

    for line in preset_table():
        typer.echo(line)


@app.command()
def runs(folder: Annotated[Path, typer.Argument(help="Folder that holds the run folders.")] = Path("runs")) -> None:
    """List runs with their state and result."""
    from qdpo.report.runs import run_lines

    for line in run_lines(folder):
        typer.echo(line)


@app.command(name="eval", context_settings={"ignore_unknown_options": True})
def eval_(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[data.path=…] [key=value …]")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Score a trained run again, on its own held-out pairs or on others."""
    quiet_libraries()
    from qdpo.report.terminal import Terminal, print_evaluation
    from qdpo.train.rescore import rescore

    terminal = Terminal(stderr=json_)
    try:
        scored = rescore(run_folder, settings or [], terminal)
    finally:
        terminal.finish()
    print_evaluation(scored, as_json=json_)


@app.command()
def metrics(
    name: Annotated[str | None, typer.Argument(help="A metric, a loss or a modifier. Default: the whole page.")] = None,
) -> None:
    """Explain the metrics, beta, the losses and their modifiers.

    Example: qdpo metrics rewards/margins
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from qdpo.report.explain import explain

    text, console = explain(name), Console()
    if console.is_terminal:
        console.print(Markdown(text))
    else:
        typer.echo(text)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qdpo {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    os.environ["QDPO_VERBOSE"] = "1" if verbose else ""


def main() -> None:
    """Console entry: exit codes are those of `errors`; 130 for an interruption before anything was saved."""
    try:
        app()
    except QdpoError as error:
        _show_traceback()
        if _run_folder and _run_folder[-1].is_dir():
            _note(_run_folder[-1], error)
        print(f"qdpo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("qdpo: stopped. What was saved before is intact; the same command continues.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        _show_traceback()
        from qdpo.run.disk import cache_folder

        is_run = bool(_run_folder) and _run_folder[-1].is_dir()
        path = _note(_run_folder[-1] if is_run else cache_folder(None), error)
        what = (str(error).splitlines() or [""])[0]
        print(
            f"qdpo: unexpected {type(error).__name__}: {what}. This is a bug in qdpo; what was saved before is intact. "
            f"The traceback is in {path or 'no file: none could be written (-v shows it)'}; please report it.",
            file=sys.stderr,
        )
        sys.exit(1)


def _show_traceback() -> None:
    if os.environ.get("QDPO_VERBOSE"):
        traceback.print_exc()


def _note(folder: Path, error: Exception) -> Path | None:
    from qdpo.report.debug import note

    return note(folder, error, sys.argv[1:])


if __name__ == "__main__":
    main()
