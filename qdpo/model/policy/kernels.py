"""Optional kernel packages of the loaded model's layers: those that transformers uses, and those that are missing."""

import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import nn

from qdpo.families.kernels import KERNELS, is_installed, remedy

# Functions for one token after another, or for a model in training mode: a policy calls neither.
NOT_CALLED = ("update", "recurrent", "split")


@dataclass(frozen=True)
class KernelUse:
    """Packages of `families.kernels.KERNELS`, by import name, each with the number of layers that call it."""

    used: dict[str, int]
    missing: dict[str, int]
    """Those layers run transformers' own PyTorch code."""


def kernels_of(model: nn.Module) -> KernelUse:
    """The packages that transformers chose for this model's modules when it imported their code."""
    chosen: dict[bool, dict[str, int]] = {True: {}, False: {}}
    for module in model.modules():
        for package, is_used in set(_choices(type(module))):
            chosen[is_used][package] = chosen[is_used].get(package, 0) + 1
    return KernelUse(chosen[True], {name: count for name, count in chosen[False].items() if name not in chosen[True]})


def announcement(use: KernelUse, device: torch.device) -> str | None:
    """A line for the start of a run, or None: on a CPU missing kernels cost nothing, as none of them runs there."""
    if device.type == "cpu":
        names = ", ".join(KERNELS[package].name for package in sorted(use.used))
        if not names:
            return None
        return f"kernels: {names} is in use, and made for GPUs; should this model fail on the CPU, uninstall it"
    parts = [
        f"{KERNELS[package].work} of {count} layers ({KERNELS[package].name} "
        f"{'cannot be imported' if is_installed(package) else 'is not installed'})"
        for package, count in sorted(use.missing.items())
    ]
    if not parts:
        return None
    return (
        f"kernels: plain PyTorch computes {' and '.join(parts)}. It is exact, but slower than their kernels. To "
        f"install them: {remedy(sorted(use.missing))}"
    )


def _choices(kind: type) -> Iterator[tuple[str, bool]]:
    """Each kernel function that a class calls: the import name of its package, and whether the package is used.

    From transformers 5.17 to 5.24 such a function is wrapped, and its closure holds the decision.
    """
    if kind.__module__.partition(".")[0] != "transformers":
        return
    around = vars(sys.modules[kind.__module__])
    names = {name for member in vars(kind).values() for name in _names(member)}
    for name in sorted(names & around.keys()):
        if any(word in name for word in NOT_CALLED):
            continue
        for function in _layers(around[name]):
            held = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
            if "package" in held and "is_new_implementation" in held:
                package = held["package"].cell_contents
                if package in KERNELS:
                    yield package, bool(held["is_new_implementation"].cell_contents)


def _names(member: Any) -> Iterator[str]:
    """Names that a method reads, its inner functions included."""
    codes = [function.__code__ for function in _layers(member)]
    while codes:
        code = codes.pop()
        yield from code.co_names
        codes.extend(part for part in code.co_consts if isinstance(part, CodeType))


def _layers(function: Any) -> Iterator[Any]:
    """A function and those that it wraps."""
    while function is not None:
        if inspect.isfunction(function):
            yield function
        function = getattr(function, "__wrapped__", None)
