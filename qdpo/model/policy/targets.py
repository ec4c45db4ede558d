"""Decides which linear layers of a model get LoRA, from its modules and their roles; a skeleton is enough.

A layer is adapted if it is a plain linear layer of the text decoder that every token passes through and that is called
as a module. Roles follow from the names that transformers' models share and by what surrounds a layer, not by family.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qdpo.errors import ConfigError
from qdpo.model.base.text_model import decoder_path

ALL_LINEAR = "all-linear"
# bitsandbytes' layers of the same meaning, by name, so that a loaded base and its skeleton give the same answer.
QUANTISED = {"Linear4bit", "Linear8bitLt"}
# PEFT 0.21 refuses LoRA on these layers of a state-space mixer in these families, at training as at loading
# (tuners_utils): the fused kernel of their training mode reads out_proj.weight and never calls the layer.
PEFT_REFUSES = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
NAMES_SHOWN = 8


@dataclass(frozen=True)
class Module:
    """A module of the decoder, with what its role follows from."""

    path: str
    parts: tuple[str, ...]
    """The path's parts below the decoder."""
    holders: tuple[nn.Module, ...]
    """The module that holds each part."""
    itself: nn.Module
    model_type: str

    @property
    def leaf(self) -> str:
        return self.parts[-1]


@dataclass(frozen=True)
class Role:
    """Layers that get no LoRA; those that could learn are adapted where the user names them."""

    label: str
    why: str
    holds: Callable[[Module], bool]
    can_learn: bool = False


def _any(pattern: str) -> Callable[[Module], bool]:
    compiled = re.compile(pattern)
    return lambda module: any(compiled.fullmatch(part) for part in module.parts)


def _is_router(module: Module) -> bool:
    """By its name, or as the gate next to a set of experts."""
    for part, holder in zip(module.parts, module.holders, strict=True):
        if re.fullmatch(r"(\w+_)?router", part):
            return True
        if re.fullmatch(r"gate|gating|wg", part) and any(
            EXPERTS.fullmatch(name) for name, _ in holder.named_children()
        ):
            return True
    return False


def _is_special(module: Module) -> bool:
    return isinstance(module.itself, nn.Linear) and not is_plain(module.itself)


def _is_read_by_peft_as_kernel(module: Module) -> bool:
    in_mixer = hasattr(module.holders[-1], "conv1d")
    return module.model_type in PEFT_REFUSES and in_mixer and module.leaf in ("out_proj", "conv1d")


EXPERTS = re.compile(r"(local_|routed_)?experts")
ROLES = (
    Role("router", "it decides which experts see a token, and nothing in DPO holds their load in balance", _is_router,
         can_learn=True),
    Role("expert gate", "it weighs experts against each other", _any(r"(\w+_)?experts?_gate"), can_learn=True),
    Role("experts", "each sees few tokens, and its LoRA is as large as a dense layer's", _any(EXPERTS.pattern),
         can_learn=True),
    Role("indexer", "it only chooses keys, which passes no gradient on", _any(r"(\w+_)?indexer|index_\w+")),
    # DeepSeek-V4: one of its kinds summarises blocks of 128 tokens, so most answers give it no gradient.
    Role("compressor", "it summarises blocks of keys, and rows shorter than a block pass no gradient to it",
         _any("compressor"), can_learn=True),
    Role("hyper-connection", "it mixes a few residual streams", _any(r"\w*hyper_?connection\w*|hc_\w+|\w+_hc"),
         can_learn=True),
    Role("altup", "it mixes a few residual streams", _any("altup"), can_learn=True),
    Role("multi-token prediction", "the text model's output does not depend on it", _any(r"mtp|mtp_\w+|nextn_\w+")),
    Role("time-step projection", "the scan reads its weight and never calls it", _any("dt_proj")),
    Role("state-space output", "plain PEFT refuses LoRA on it, at training as at loading, because a fused kernel of "
         "the training mode reads its weight", _is_read_by_peft_as_kernel),
    Role("special linear layer", "its class computes more than x Wᵀ, which LoRA does not follow", _is_special),
)  # fmt: skip


@dataclass(frozen=True)
class LoraTargets:
    """The layers that get LoRA with their inputs and outputs, and all others by the label of their role."""

    adapted: dict[str, tuple[int, int]]
    left: dict[str, list[str]] = field(default_factory=dict)

    def numbers(self, rank: int) -> int:
        """Trained numbers: A has rank · inputs, B outputs · rank."""
        return rank * sum(inputs + outputs for inputs, outputs in self.adapted.values())

    def sentence(self, rank: int) -> str:
        """The line for the screen."""
        return sentence(list(self.adapted), self.numbers(rank), self.left)


def sentence(modules: Sequence[str], numbers: int, left: dict[str, list[str]] | None = None) -> str:
    """Adapted layers by the last part of their names, trained numbers, and what is left alone."""
    names = list(Counter(module.rpartition(".")[2] for module in modules))
    shown = ", ".join(names[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")
    alone = ", ".join(f"{label} ({len(found)})" for label, found in (left or {}).items())
    return (
        f"adapter: {len(modules)} linear layers ({shown}), {numbers:,} trained numbers"
        f"{f'; left alone: {alone}' if alone else ''}"
    )


def lora_targets(model: Any, decoder: str | None = None, targets: Sequence[str] = (ALL_LINEAR,)) -> LoraTargets:
    """The layers of `model` that `adapter.targets` means; `decoder` is the path of the text decoder, found if None.

    Raises: ConfigError where a name of adapter.targets means no layer that can learn, with the reason.
    """
    inside = decoder_path(model) if decoder is None else decoder
    head = model.get_output_embeddings()
    wanted = None if list(targets) == [ALL_LINEAR] else list(targets)
    adapted: dict[str, tuple[int, int]] = {}
    left: dict[str, list[str]] = {}
    hit: set[str] = set()
    for path, module in _layers(model):
        named = [] if wanted is None else [name for name in wanted if path == name or path.endswith(f".{name}")]
        if module is head or (wanted is not None and not named):
            continue
        where = _inside(model, path, inside)
        role = None if where is None else _role(where)
        if where is None:
            left.setdefault(_outside_label(path, inside), []).append(path)
        elif role is not None and not (wanted is not None and role.can_learn and is_plain(module)):
            left.setdefault(role.label, []).append(path)
        elif is_plain(module):
            adapted[path] = size(module)
            hit.update(named)
    for name in wanted or []:
        if name not in hit:
            raise _refusal(name, left, inside)
    return LoraTargets(adapted, left)


def unusual(model: Any, chosen: LoraTargets, decoder: str | None = None) -> dict[str, str]:
    """Layers that the user named and that the default leaves alone: label of the role → reason."""
    inside = decoder_path(model) if decoder is None else decoder
    found = {}
    for path in chosen.adapted:
        where = _inside(model, path, inside)
        role = None if where is None else _role(where)
        if role is not None:
            found[role.label] = role.why
    return found


def is_plain(module: nn.Module) -> bool:
    """True for y = x Wᵀ + b in 4, 8, 16 or 32 bits; a subclass may return tuples or work in groups."""
    if type(module) in (nn.Linear, Conv1D) or type(module).__name__ in QUANTISED:
        return True
    return isinstance(module, nn.Linear) and _computes_as_linear(module)


def _computes_as_linear(module: nn.Linear) -> bool:
    """True if the class's own forward gives x Wᵀ + b, tried with a small weight in the place of the module's."""
    small = nn.Linear(3, 2)
    weights = {"in_features", "out_features", "_parameters", "_buffers", "_modules", "forward"}
    small.__dict__.update({name: value for name, value in vars(module).items() if name not in weights})
    small.__class__ = type(module)
    x = torch.linspace(-1, 1, 12).view(1, 4, 3)
    with torch.no_grad():
        expected = nn.functional.linear(x, small.weight, small.bias)
        try:
            found: object = type(module).forward(small, x)
        except Exception:  # its forward needs more than weight and bias
            return False
        return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)


def size(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a plain linear layer."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return int(module.in_features), int(module.out_features)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers of any class, and the modules that hold matrices of their own under a role's name."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield path, module
        elif re.fullmatch(rf"{EXPERTS.pattern}|gate|(\w+_)?router", path.rpartition(".")[2]) and any(
            parameter.dim() > 1 for parameter in module.parameters(recurse=False)
        ):
            yield path, module


def _inside(model: nn.Module, path: str, decoder: str) -> Module | None:
    """The module's place below the decoder; None outside."""
    if decoder and not path.startswith(f"{decoder}."):
        return None
    parts = path.removeprefix(f"{decoder}.").split(".")
    holder = model.get_submodule(decoder)
    holders = []
    for part in parts:
        holders.append(holder)
        holder = holder.get_submodule(part)
    config: Any = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", ""))
    return Module(path, tuple(parts), tuple(holders), holder, kind)


def _role(module: Module) -> Role | None:
    return next((role for role in ROLES if role.holds(module)), None)


def _outside_label(path: str, decoder: str) -> str:
    """The first part of the path that the decoder's path does not share, such as vision_tower."""
    parts, inner = path.split("."), decoder.split(".")
    shared = next((i for i, (one, other) in enumerate(zip(parts, inner, strict=False)) if one != other), len(inner))
    return parts[min(shared, len(parts) - 1)]


def _refusal(name: str, left: dict[str, list[str]], decoder: str) -> ConfigError:
    for label, paths in left.items():
        path = next((path for path in paths if path == name or path.endswith(f".{name}")), None)
        if path is not None:
            why = next((role.why for role in ROLES if role.label == label), f"it is outside the text model, {decoder}")
            return ConfigError(
                f"adapter.targets names {name}, but {path} gets no LoRA ({label}): {why}. Remove {name} from the list."
            )
    return ConfigError(
        f"adapter.targets names {name}, which is not a linear layer of the text model. Only linear layers can be "
        "trained. Remove it from the list."
    )


__all__ = [
    "ALL_LINEAR", "LoraTargets", "is_plain", "lora_targets", "sentence", "size", "unusual",
]  # fmt: skip
