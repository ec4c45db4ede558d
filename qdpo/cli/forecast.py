"""The verbs that forecast and measure: plan, fit, bench, presets."""

import json
from typing import Annotated

import typer

from qdpo.cli.common import MOST_TOKENS, SettingArguments, finite, quiet_libraries
from qdpo.errors import ConfigError
from qdpo.settings import layered


def plan(
    settings: SettingArguments = None,
    gpu_gib: Annotated[
        float | None, typer.Option(callback=finite, help="Memory of the card, in GiB. Default: the preset's.")
    ] = None,
    card: Annotated[str | None, typer.Option(help="A card by name, for memory and time: rtx-4090, …")] = None,
    others_gib: Annotated[
        float | None, typer.Option(callback=finite, help="GiB of it that other programs use. Default: 0.7.")
    ] = None,
    like: Annotated[
        str | None, typer.Option(help="For an unknown architecture: the family whose layers it has.")
    ] = None,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Download the config.json of a hub model that is not known, a few KB.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Forecast a run's memory by cause, its time, and whether it fits, without loading or downloading a model.

    Example: qdpo plan preset=7b-24gb data.path=pairs.jsonl --gpu-gib 12
    """
    from qdpo.forecast.plan import make_plan, print_plan
    from qdpo.model.trace.store import finder
    from qdpo.run.disk import cache_folder

    quiet_libraries()
    resolved = layered.resolve(settings or [])
    if fetch:
        from qdpo.model.base.fetch import fetch_config

        fetch_config(str(resolved.config.model.path), resolved.config.model.revision)
    trace = finder(cache_folder(resolved.config.cache.dir), lambda line: typer.echo(line, err=True))
    found = make_plan(resolved, gpu_gib=gpu_gib, card=card, others_gib=others_gib, like=like, trace=trace)
    if json_:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        print_plan(found, typer.echo)


def fit(
    gpu_gib: Annotated[float, typer.Option(callback=finite, help="Memory of the card, in GiB.")],
    card: Annotated[str | None, typer.Option(help="The card by name, for the estimate of time: rtx-4090, …")] = None,
    others_gib: Annotated[
        float | None, typer.Option(callback=finite, help="GiB of it that other programs use. Default: 0.7.")
    ] = None,
    longest: Annotated[
        int, typer.Option(min=1, max=MOST_TOKENS, help="Longest pair, in tokens of prompt and both answers.")
    ] = 2000,
    mean: Annotated[
        float, typer.Option(min=1, max=MOST_TOKENS, callback=finite, help="Mean length of a pair, in tokens.")
    ] = 600,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List the models from 1B to 32B that a card can train, how long their pairs may be, and how fast it may go.

    Example: qdpo fit --gpu-gib 8
    """
    from qdpo.forecast.model_table import fit_table, table_lines, with_kernels, without_forecast
    from qdpo.forecast.plan import usable
    from qdpo.model.trace.store import kept_finder
    from qdpo.run.disk import cache_folder

    limit, name = usable(gpu_gib, card, others_gib)
    trace = kept_finder(cache_folder(None))
    fits = fit_table(limit, card=name, longest=longest, mean=mean, trace=trace)
    if json_:
        typer.echo(json.dumps([vars(one) for one in fits], indent=1))
        return
    for line in table_lines(fits):
        typer.echo(line)
    typer.echo(f"* an estimate for {name}, pairs of {mean:g} tokens on average and {longest:,} at most; LoRA rank 16")
    if hybrid := with_kernels(trace):
        typer.echo(f"* with the packages of GPU kernels that `qdpo doctor` names, else fewer: {', '.join(hybrid)}")
    if missing := without_forecast(trace):
        typer.echo(
            f"not listed, as no forecast of these ships; `qdpo plan model.path=NAME` makes one: {', '.join(missing)}"
        )


def bench(
    settings: SettingArguments = None,
    limit_gib: Annotated[
        float | None, typer.Option(callback=finite, help="Simulate a card with this memory, in GiB.")
    ] = None,
    others_gib: Annotated[
        float | None, typer.Option(callback=finite, help="GiB of it that other programs would use. Default: 0.7.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Timed steps, after one warm-up step.")] = 5,
    longest: Annotated[
        int | None, typer.Option(min=1, max=MOST_TOKENS, help="Longest pair in tokens. Default: 2 x data.max_tokens.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Write the figures into the preset's [measured] table.")
    ] = False,
) -> None:
    """Run the real step on random weights of the model's shape under a memory cap; report speed, and peak vs forecast.

    Example: qdpo bench preset=7b-24gb --limit-gib 24
    """
    quiet_libraries()
    resolved = layered.resolve(settings or [])
    if write and resolved.preset is None:
        raise ConfigError("--write writes the figures into a preset's file, but no preset is given. Add preset=NAME.")
    from qdpo.measure.bench import print_measured, run_bench, write_measured

    say = lambda line: typer.echo(line, err=json_)  # noqa: E731
    found = run_bench(resolved, limit_gib=limit_gib, others_gib=others_gib, number=steps, longest=longest, say=say)
    if json_:
        typer.echo(json.dumps(vars(found), indent=1))
    else:
        print_measured(found, typer.echo)
    if write and resolved.preset is not None:
        typer.echo(f"written to {write_measured(resolved.preset, found, layered.shipped_folder())}", err=json_)


def presets_(name: Annotated[str | None, typer.Argument(help="Show this preset's file.")] = None) -> None:
    """List the presets with their forecast and measured peaks, or print one with its comments."""
    if name is not None:
        typer.echo(layered.preset_text(name))
        return
    from qdpo.forecast.preset_table import preset_table

    for line in preset_table():
        typer.echo(line)
