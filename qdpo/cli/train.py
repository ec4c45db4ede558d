"""The verbs that train: run, sweep."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qdpo.cli import common
from qdpo.cli.common import SettingArguments, quiet_libraries
from qdpo.errors import ConfigError, DiskError
from qdpo.settings import layered

if TYPE_CHECKING:
    from qdpo.report.screen.live import Terminal
    from qdpo.run.record import Result


def run(
    settings: SettingArguments = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved settings with their origins, and stop.")
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Start again from scratch; an earlier run of the same settings is moved aside."),
    ] = False,
) -> None:
    """Train a LoRA adapter on preference pairs; the same command again resumes the run or shows its result.

    Example: qdpo run preset=7b-24gb data.path=pairs.jsonl

    Every setting and its default: qdpo run preset=demo --dry-run
    """
    resolved = layered.resolve(settings or [])
    for note in resolved.notes:
        typer.echo(note, err=dry_run)
    from qdpo.run import identity, lock, places

    if dry_run:
        typer.echo(identity.config_toml(resolved))
        return
    folder = identity.run_folder(resolved)
    common.run_folder.append(folder.path)
    if fresh and folder.path.exists():
        typer.echo(f"the earlier run is kept as {lock.move_aside(folder)}")
    from qdpo.report.screen.live import Terminal, print_result
    from qdpo.run.finished import finished_run, is_finished
    from qdpo.run.record import read_record, read_result

    terminal = Terminal()
    places.check_places(folder)
    result = None
    if is_finished(folder):
        identity.check_unchanged(folder, resolved)
        try:
            result = read_result(folder)
            terminal.say(f"{folder.path} is finished; --fresh would start again")
        except DiskError as error:
            terminal.say(f"warning: {error}")
            terminal.say("writing the result again from the last checkpoint")
    if result is None:
        result = _train(resolved, terminal)
    if folder.adapter.is_dir() and not (folder.adapter / "README.md").exists():  # a kill may come before the card
        from qdpo.report.card import write_card

        with lock.exclusive(folder):
            lock.clear_leftovers(folder)
            write_card(finished_run(folder.path))
    print_result(folder, result, terminal.console, held_out=read_record(folder).data.held_out_pairs)


def _train(resolved: layered.Resolved, terminal: "Terminal") -> "Result":
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
    """Report a second Ctrl-C; typer would exit without a message."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("qdpo: stopped at once. What was saved before is intact; the same command resumes.", err=True)
        raise typer.Exit(130) from None


def sweep(settings: SettingArguments = None) -> None:
    """Train once for each combination of comma-separated values, one run after the other, and compare the runs.

    Each is an ordinary run in output.dir. The same command resumes where it stopped, and shows the finished runs.

    Example: qdpo sweep preset=7b-24gb loss.beta=0.05,0.1,0.3 train.learning_rate=5e-6,1e-5
    """
    from qdpo.report.screen.sweep import print_sweep, write_sweep
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
    """Write the page that compares the runs; return a line for the user."""
    from qdpo.report.page.page import write_report

    try:
        return f"report: {write_report(runs, out)}"
    except ConfigError as error:  # the curves' library is an extra, and the runs are done without it
        return f"no report: {error}"
