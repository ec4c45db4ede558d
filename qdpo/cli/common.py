"""Shared by several verbs: arguments with one meaning, quiet libraries, the run that this process works on."""

import logging
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

MOST_TOKENS = 10**9
"""Bound of options that count tokens, and LARGEST_SEED of random seeds: what the libraries below still take."""
LARGEST_SEED = 2**63 - 1
COLDEST = 0.01
"""Lowest temperature above 0: below it, probabilities are 0 or 1, or no numbers."""


def finite(value: float | None) -> float | None:
    """Refuses `nan` and `inf`, which Python reads as numbers; for the options that take a number."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def warmth(value: float) -> float:
    """Refuses a temperature that is neither 0 nor a usable one."""
    if not (value == 0 or COLDEST <= value <= 100):
        raise typer.BadParameter(f"{value} is neither 0 nor between {COLDEST} and 100.")
    return value


SettingArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[preset=NAME] [FILE.toml] [key=value …]",
        help="Settings; later layers win: defaults, preset, file, key=value.",
    ),
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]
PlaceArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[key=value …]", help="Only model.device, memory.* and cache.dir may differ from the run's."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, max=MOST_TOKENS, help="Longest answer, in tokens.")]
Seed = Annotated[
    int, typer.Option(min=0, max=LARGEST_SEED, help="Random seed of the answers, for a temperature above 0.")
]
# For verbs that take settings: arguments such as --train.seed=1 are settings, not options.
EXTRA = {"ignore_unknown_options": True}
# The folder of the run that this process works on, once known: tracebacks are written to its debug.log.
run_folder: list[Path] = []


def quiet_libraries() -> None:
    """Turn off telemetry and library output on the screen, unless the user's environment asks for them.

    Code from the hub is turned off in any case.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # On CPUs, two caches (oneDNN's own and the one of torch's binding) each keep a compiled bf16 product and its
    # buffers for up to 1,024 shapes. With rows of all lengths they grew without bound.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    os.environ.setdefault("LRU_CACHE_CAPACITY", "16")
    # With the package `kernels`, bitsandbytes 0.50 downloads compiled code from the hub when it is imported (CPUs with
    # AVX512-BF16), and transformers does for some models. An entry of None makes it a missing package.
    sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|peft|bitsandbytes|torch|datasets)\b.*")
