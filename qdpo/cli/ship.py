"""The verbs that ship a trained run: merge, export, push."""

import dataclasses
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qdpo.cli.common import Run, quiet_libraries
from qdpo.errors import ConfigError

TARGETS = ("peft", "gguf-adapter", "gguf", "ollama", "vllm")


class BaseOption(StrEnum):
    dequantized = "dequantized"
    original = "original"


class Dtype(StrEnum):
    bf16 = "bf16"
    fp16 = "fp16"
    fp32 = "fp32"


def merge(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="A new folder. Default: RUN/merged.")] = None,
    base: Annotated[
        BaseOption,
        typer.Option(
            help="Merge into the dequantised 4-bit weights of the training, or into the base's original files."
        ),
    ] = BaseOption.dequantized,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: that of the base's files if it has 16 bits, else the run's.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Reload the files and compare them with the trained model.")] = True,
    compare: Annotated[bool, typer.Option("--compare", help="Also compare a merge into the other base.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Merge nothing; only compare an existing OUT again.")] = False,
    data: Annotated[
        str | None, typer.Option(help="Pairs to compare on, as data.path. Default: the run's held-out pairs.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Compare on this many pairs at most.")] = 32,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Merge a run's adapter into its base, and prove that the merged files equal the model that was trained.

    Example: qdpo merge runs/7b-24gb-1a2b3c
    """
    quiet_libraries()
    from qdpo.export.proof.prove import MergeOptions, check_again, merge_proved, table
    from qdpo.report.screen.live import Terminal
    from qdpo.run.folder import RunDir

    if not verify and (compare or check):
        raise ConfigError("--compare and --check need the verification that --no-verify turns off. Leave one out.")
    run, terminal = RunDir(run_folder), Terminal(stderr=json_)
    folder = out or run.merged
    options = MergeOptions(base.value, dtype.value if dtype else None, verify, compare, data, pairs)
    try:
        if check:
            report, found = None, check_again(run, folder, options, terminal)
        else:
            report, found = merge_proved(run, folder, options, terminal)
    finally:
        terminal.finish()
    if json_:
        typer.echo(
            json.dumps(
                {
                    "merged": dataclasses.asdict(report) if report else None,
                    "verification": [one.to_json(run) for one in found],
                }
            )
        )
        return
    for line in table(found) if found else ["not compared with the trained model (--no-verify)"]:
        typer.echo(line)
    if report:
        typer.echo(f"merged model: {report.folder}  ({report.bytes / 2**30:.2f} GiB in {report.seconds:.0f} s)")


def export(
    run_folder: Run,
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="Output path. Default: in RUN/export.")] = None,
    to: Annotated[str, typer.Option(help="peft, gguf-adapter, gguf, ollama or vllm.")] = "",
    quant: Annotated[str | None, typer.Option(help="Type in the GGUF: f32, f16, bf16 (default), q8_0.")] = None,
    merged: Annotated[Path | None, typer.Option(help="The merged model's folder. Default: RUN/merged.")] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="For ollama and vllm: serve base and adapter, unmerged.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="The model's name for servers. Default: the run's name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Write the trained model for other programs, and check that it is the same model.

    peft: the adapter, as every loader reads it, for the class that servers load. gguf-adapter: the adapter for
    llama.cpp's --lora. gguf: the merged model for llama.cpp. ollama: a folder with a Modelfile. vllm: the command that
    serves the model.

    Example: qdpo export runs/demo --to gguf --quant q8_0
    """
    if to not in TARGETS:
        raise ConfigError(f"--to={to} is not known. Choose one of {', '.join(TARGETS)}.")
    quiet_libraries()
    from qdpo.export import targets
    from qdpo.export.trained import trained_run

    trained = trained_run(run_folder)
    order = targets.Order(
        trained=trained,
        out=out,
        quant=quant,
        merged=merged,
        lora=lora,
        name=name or trained.name,
        force=force,
        say=typer.echo,
    )
    targets.TARGETS[to](order)


def push(
    run_folder: Run,
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Hub repository: owner/name, or name under your account.")
    ],
    merged: Annotated[bool, typer.Option("--merged", help="Push RUN/merged instead of the adapter.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Anyone may see it. Default: only you.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Upload the adapter or the merged model with its card to the Hugging Face hub; private by default.

    Lists every file first and asks. No path of this machine is uploaded.

    Example: qdpo push runs/demo my-name/my-adapter
    """
    quiet_libraries()
    from qdpo.export import push as pushing
    from qdpo.export.trained import trained_run

    parcel = pushing.pack(trained_run(run_folder), repo, merged=merged, public=public, say=typer.echo)
    for line in parcel.listing():
        typer.echo(line)
    if not yes and not typer.confirm(f"Upload to {parcel.repo} ({'PUBLIC' if public else 'private'})?"):
        typer.echo("nothing was uploaded")
        return
    typer.echo(f"uploaded: {parcel.send()}")
