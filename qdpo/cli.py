"""The verbs: parse, call one function, turn a QdpoError into one message and an exit code."""

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from qdpo import __version__, presets
from qdpo.errors import ConfigError, QdpoError

app = typer.Typer(
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Preference-tune a 7B-13B language model on one consumer GPU: DPO with a LoRA adapter over a 4-bit base.",
)
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[preset=NAME] [FILE.toml] [key=value …]",
        help="Settings; later layers win: defaults, preset, file, key=value.",
    ),
]


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
    resolved = presets.resolve(settings or [])
    for note in resolved.notes:
        typer.echo(note, err=dry_run)
    from qdpo.train import record

    if dry_run:
        typer.echo(record.config_toml(resolved, {}))
        return
    folder = record.run_folder(resolved)
    if fresh and folder.path.exists():
        typer.echo(f"the earlier run is kept as {record.move_aside(folder)}")
    from qdpo.report.terminal import Terminal, print_result
    from qdpo.rundir import read_json

    terminal = Terminal()
    if folder.result.exists():
        record.check_unchanged(folder, resolved)
        terminal.say(f"{folder.path} is finished; --fresh would start anew")
        result = read_json(folder.result)
    else:
        result = _train(resolved, terminal)
        from qdpo.report.card import write_card

        write_card(folder, resolved)
    print_result(folder, result, terminal.console)


def _train(resolved: presets.Resolved, terminal: Any) -> dict[str, Any]:
    _quiet_libraries()
    if resolved.preset is not None:
        for name, what in (("model.path", "model"), ("data.path", "preference pairs")):
            if resolved.origins[name] == f"preset {resolved.preset}":
                value = presets.flat(resolved.config)[name]
                terminal.say(f"{what}: {value}, the preset's own; {name}=… replaces it")
    from qdpo.train.loop import run_training

    try:
        return run_training(resolved, terminal)
    finally:
        terminal.finish()


@app.command(context_settings={"ignore_unknown_options": True})
def plan(
    settings: Settings = None,
    gpu_gib: Annotated[float | None, typer.Option(help="Memory of the card, in GiB. Default: the preset's.")] = None,
    card: Annotated[str | None, typer.Option(help="A card by name, for memory and time: rtx-4090, …")] = None,
    others_gib: Annotated[float | None, typer.Option(help="What other programs hold of it. Default: 0.7.")] = None,
    like: Annotated[str | None, typer.Option(help="The family whose layers an unknown architecture has.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Forecast a run's memory by cause, its time, and whether it fits; loads and downloads nothing.

    Example: qdpo plan preset=7b-24gb data.path=pairs.jsonl --gpu-gib 12
    """
    import json

    from qdpo.measure.plan import make_plan, print_plan

    resolved = presets.resolve(settings or [])
    found = make_plan(resolved, gpu_gib=gpu_gib, card=card, others_gib=others_gib, like=like)
    if json_:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        print_plan(found, typer.echo)


@app.command()
def fit(
    gpu_gib: Annotated[float, typer.Option(help="Memory of the card, in GiB.")],
    card: Annotated[str | None, typer.Option(help="The card by name, for the estimate of time: rtx-4090, …")] = None,
    others_gib: Annotated[float | None, typer.Option(help="What other programs hold of it. Default: 0.7.")] = None,
    longest: Annotated[int, typer.Option(help="Longest pair, in tokens of prompt and both answers.")] = 2000,
    mean: Annotated[float, typer.Option(help="Mean pair, in tokens.")] = 600,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """Which models from 1B to 32B a card can train, how long their pairs may be, and how fast it may go.

    Example: qdpo fit --gpu-gib 8
    """
    import json

    from qdpo.measure.fit import fit_table, table_lines
    from qdpo.measure.plan import usable

    limit, name = usable(gpu_gib, card, others_gib)
    fits = fit_table(limit, card=name, longest=longest, mean=mean)
    if json_:
        typer.echo(json.dumps([vars(one) for one in fits], indent=1))
        return
    for line in table_lines(fits):
        typer.echo(line)
    typer.echo(f"* an estimate for {name}, pairs of {mean:g} tokens on average and {longest:,} at most; LoRA rank 16")


@app.command(context_settings={"ignore_unknown_options": True})
def bench(
    settings: Settings = None,
    limit_gib: Annotated[float | None, typer.Option(help="Stand for a card with this memory, in GiB.")] = None,
    others_gib: Annotated[
        float | None, typer.Option(help="What other programs would hold of it. Default: 0.7.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Timed steps, after one to warm up.")] = 5,
    longest: Annotated[int | None, typer.Option(help="Longest pair in tokens. Default: 2 x data.max_tokens.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    write: Annotated[bool, typer.Option("--write", help="Put the figures into the preset's [measured] table.")] = False,
) -> None:
    """Run the real step on random weights of the model's shape, under a memory cap: speed, and peak against forecast.

    Example: qdpo bench preset=7b-24gb --limit-gib 24
    """
    _quiet_libraries()
    import json

    resolved = presets.resolve(settings or [])
    if write and resolved.preset is None:
        raise ConfigError("--write puts figures into a preset's file; give preset=NAME.")
    from qdpo.measure.bench import print_measured, run_bench, write_measured

    say = lambda line: typer.echo(line, err=json_)  # noqa: E731
    found = run_bench(resolved, limit_gib=limit_gib, others_gib=others_gib, steps=steps, longest=longest, say=say)
    if json_:
        typer.echo(json.dumps(vars(found), indent=1))
    else:
        print_measured(found, typer.echo)
    if write and resolved.preset is not None:
        typer.echo(f"written to {write_measured(resolved.preset, found, presets.shipped_folder())}", err=json_)


@app.command(name="presets")
def presets_(name: Annotated[str | None, typer.Argument(help="Show this preset's file.")] = None) -> None:
    """List the presets with their forecast and measured peaks, or print one with its comments."""
    if name is not None:
        typer.echo(presets.preset_text(name))
        return
    from qdpo.measure.table import preset_table

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
    _quiet_libraries()
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


def _quiet_libraries() -> None:
    """No telemetry, and no library noise on the screen, unless the user's environment asks for them."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # On CPUs, two caches keep a compiled bf16 product and its buffers for each shape met, 1,024 of them each: oneDNN's
    # own and that of torch's binding. With rows of all lengths they grew without end.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    import logging
    import warnings

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|peft|bitsandbytes|torch|datasets)\b.*")


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
        if os.environ.get("QDPO_VERBOSE"):
            traceback.print_exc()
        print(f"qdpo: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("qdpo: stopped. What was saved before is intact; the same command continues.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
