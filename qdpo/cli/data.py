"""The verbs of data: check, show, convert, split."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qdpo.cli.common import EXTRA, SettingArguments, finite, quiet_libraries
from qdpo.errors import ConfigError, DataError
from qdpo.settings import layered
from qdpo.settings.schema import RunConfig

if TYPE_CHECKING:
    from qdpo.data.layouts.origin import Origin

app = typer.Typer(no_args_is_help=True, help="Check, look at, convert or split preference data.")
SourceArgument = Annotated[
    str, typer.Argument(metavar="PATH", help="A file, a folder, a hub id; several joined with +.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace files that exist.")]


@app.command(context_settings=EXTRA)
def check(
    path: SourceArgument,
    settings: SettingArguments = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    report: Annotated[
        Path, typer.Option(help="File to write: every dropped, cut or mended row, with its file and line.")
    ] = Path("data_report.jsonl"),
) -> None:
    """Read, recognise, render and tokenise a data set as a run would, and report whether it is fit to train on.

    Needs only the model's tokenizer. Exits with code 3 if a run would stop.

    Example: qdpo data check pairs.jsonl model.path=Qwen/Qwen2.5-7B-Instruct data.max_tokens=2048
    """
    quiet_libraries()
    from qdpo.data.check import check_data
    from qdpo.data.positions import within_positions
    from qdpo.families.config_fields import positions_of
    from qdpo.report.screen.dataset import print_report, print_token_pair, print_verdict
    from qdpo.report.screen.live import Terminal

    resolved = layered.resolve([*(settings or []), f"data.path={path}"])
    terminal = Terminal(stderr=json_)
    try:
        tokenizer, policy = model_side(resolved.config, terminal.say)
        config = within_positions(resolved, positions_of(Path(tokenizer.name_or_path)), terminal.say)
        checked = check_data(config, tokenizer, policy, terminal, report)
    finally:
        terminal.finish()
    if json_:
        typer.echo(json.dumps(dataclasses.asdict(checked.report), ensure_ascii=False, indent=1))
    else:
        console = Terminal().console
        print_report(checked.report, console)
        for pair in checked.shown:
            print_token_pair(pair, checked.tokenizer, console)
        print_verdict(checked.report, console)
        console.print(f"every row that was dropped or changed: {report}", markup=False)
    if not checked.report.fit:
        raise typer.Exit(DataError.exit_code)


@app.command(context_settings=EXTRA)
def show(
    path: SourceArgument,
    settings: Annotated[list[str] | None, typer.Argument(metavar="[key=value …]", help="data.* settings.")] = None,
    row: Annotated[int | None, typer.Option(help="The row to show, counted from 1. Default: the first three.")] = None,
) -> None:
    """Show rows as the pairs they become: prompt, chosen and rejected, or the reason why a row is not used.

    Example: qdpo data show pairs.jsonl --row 17
    """
    from qdpo.data.convert import pairs_of_rows
    from qdpo.report.screen.console import Screen
    from qdpo.report.screen.dataset import print_row
    from qdpo.report.screen.live import Terminal

    console = Screen()
    found = pairs_of_rows(_data(path, settings), {row} if row else {1, 2, 3}, Terminal(stderr=True))
    for number, pairs in found:
        print_row(number, pairs, console)
    if row and not found:
        raise ConfigError(f"--row {row}: {path} has no such row.")


@app.command(context_settings=EXTRA)
def convert(
    path: SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT.jsonl", help="The file to write.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[key=value …]", help="data.* settings.")] = None,
    force: Force = False,
) -> None:
    """Write the usable pairs as plain JSON lines: `prompt`, `chosen` and `rejected` as lists of messages.

    Example: qdpo data convert Anthropic/hh-rlhf hh.jsonl
    """
    from qdpo.data.convert import convert_data
    from qdpo.report.screen.live import Terminal

    typer.echo(convert_data(_data(path, settings, out), out, Terminal(stderr=True), force=force))


@app.command(context_settings=EXTRA)
def split(
    path: SourceArgument,
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for train.jsonl and held_out.jsonl.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[key=value …]", help="data.* settings.")] = None,
    fraction: Annotated[
        float, typer.Option(help="Share of the pairs to hold out.", min=0.0, max=0.5, callback=finite)
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="Random seed: which prompts are held out.")] = 0,
    force: Force = False,
) -> None:
    """Split a data set by prompt, so that no prompt is in both files; the rows are written as plain pairs.

    Example: qdpo data split pairs.jsonl split --fraction 0.1
    """
    from qdpo.data.convert import split_data
    from qdpo.report.screen.live import Terminal

    config = _data(path, settings, out)
    typer.echo(split_data(config, out, Terminal(stderr=True), fraction=fraction, seed=seed, force=force))


def model_side(config: RunConfig, say: Callable[[str], None]) -> "tuple[Any, Origin]":
    """The tokenizer of the model to train, and the model's name; peft is needed only for adapter.start.

    Raises: ConfigError if there is no tokenizer, or adapter.start is not an adapter.
    """
    from qdpo.data.layouts.origin import Origin
    from qdpo.model.base import fetch
    from qdpo.run.disk import cache_folder

    name, cache = str(config.model.path), cache_folder(config.cache.dir)
    tokenizer = fetch.locate_tokenizer(name, revision=config.model.revision, cache_dir=cache, announce=say)
    if config.adapter.start is None:
        return tokenizer, Origin(name)
    from qdpo.model.policy.adapter import WEIGHTS, check_adapter_folder
    from qdpo.run.record import file_record
    from qdpo.train.start.tokenizer import take_start

    folder = Path(config.adapter.start)
    check_adapter_folder(folder)
    take_start(tokenizer, config.adapter.start, config.data.template, say)
    return tokenizer, Origin(name, adapter=file_record(folder / WEIGHTS).sha256)


def _data(path: str, settings: list[str] | None, out: Path | None = None) -> RunConfig:
    """The settings of a verb that involves no model. Raises: ConfigError for a word that is none of its arguments."""
    words = [path, *([str(out)] if out else []), *(settings or [])]
    for word in words:
        if word.startswith("-") and not word.startswith("--data."):
            raise ConfigError(
                f"There is no option {word!r} here. Files are given without one, in the order of `--help`, and "
                "settings as data.NAME=value; ./ in front makes a file's name of it."
            )
    for word in settings or []:
        if "=" not in word:
            raise ConfigError(f"Cannot read {word!r}. Settings are written key=value, as in data.limit=100.")
        if not word.removeprefix("--").startswith("data."):
            raise ConfigError(f"{word} has no effect here: no model is involved. Give only data.* settings.")
    return layered.resolve(["model.path=none-needed", *(settings or []), f"data.path={path}"]).config
