"""The verbs that ship a trained run: export, push. `cli` registers them."""

from pathlib import Path
from typing import Annotated

import typer

from qdpo.cli_measure import quiet_libraries
from qdpo.errors import ConfigError

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]
TARGETS = ("peft", "gguf-adapter", "gguf", "ollama", "vllm")


def export(
    run_folder: Run,
    out: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="Where to write. Default: in RUN/export.")] = None,
    to: Annotated[str, typer.Option(help="peft, gguf-adapter, gguf, ollama or vllm.")] = "",
    quant: Annotated[str | None, typer.Option(help="Type in the GGUF: f32, f16, bf16 (default), q8_0.")] = None,
    merged: Annotated[Path | None, typer.Option(help="The merged model's folder. Default: RUN/merged.")] = None,
    lora: Annotated[
        bool, typer.Option("--lora", help="For ollama and vllm: serve base and adapter, unmerged.")
    ] = False,
    name: Annotated[str | None, typer.Option(help="What servers call the model. Default: the run's name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there already.")] = False,
) -> None:
    """Write what was trained for other programs, and check that it is the same.

    peft: the adapter as every loader reads it. gguf-adapter: for llama.cpp's --lora. gguf: the merged model for
    llama.cpp. ollama: a folder with a Modelfile. vllm: the command that serves it.

    Example: qdpo export runs/demo --to gguf --quant q8_0
    """
    if to not in TARGETS:
        raise ConfigError(f"--to={to} is not known. Choose one of {', '.join(TARGETS)}.")
    quiet_libraries()
    from qdpo.export import targets
    from qdpo.export.trained import trained_run

    trained = trained_run(run_folder)
    order = targets.Order(trained, out, quant, merged, lora, name or trained.name, force, typer.echo)
    targets.TARGETS[to](order)


def push(
    run_folder: Run,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Where to: owner/name, or name under your account.")],
    merged: Annotated[bool, typer.Option("--merged", help="Push RUN/merged instead of the adapter.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Anyone may see it. Default: only you.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Upload the adapter or the merged model with its card to the Hugging Face hub; private unless told otherwise.

    Shows every file first and asks. No path of this machine leaves it.

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
