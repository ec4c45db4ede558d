"""Finds the matrix of each expert in a folder's files, and puts it back: transformers stacks a layer's experts at load.

Some folders hold each expert's matrices as tensors of their own, others hold stacks. transformers' own conversions are
used for one expert at a time, so no stack is ever held in 16 bits.
"""

import copy
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from qdpo.model.base.dequantise import Dequantised
from qdpo.model.base.headers import HeaderEntry
from qdpo.model.base.tensor_files import Stored

LAST = "down_proj"


def is_experts(module: Any) -> bool:
    """True for stacked experts in transformers' common form, see its `use_experts_implementation`."""
    marks = ("is_transposed", "has_gate", "has_bias")
    if not all(isinstance(getattr(module, one, None), bool) for one in marks):
        return False
    stacks = [getattr(module, name, None) for name in (first_of(module), LAST)]
    is_stacked = all(stack is not None and len(stack.shape) == 3 for stack in stacks)
    return is_stacked and not getattr(module, "has_post_expert_norm", False)


def first_of(module: Any) -> str:
    """The name of the first stack of a module of experts; that of the last is LAST."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def stacks_of(model: nn.Module) -> dict[str, torch.Size]:
    """The stacked weights of experts by name, with their shapes (E, N, K)."""
    found: dict[str, torch.Size] = {}
    for name, module in model.named_modules():
        for stack in (first_of(module), LAST) if is_experts(module) else ():
            found[f"{name}.{stack}".removeprefix(".")] = getattr(module, stack).shape
    return found


@dataclass(frozen=True, kw_only=True)
class ExpertSource:
    """The tensors of the files that make a stack of experts, in transformers' order."""

    stack: str
    """The name of the parameter."""
    shape: torch.Size
    names: Mapping[str, tuple[str, ...]]
    """The tensors, by pattern of transformers' conversion."""
    parts: Mapping[str, torch.Size]
    """The shape of what belongs to one expert, by pattern."""
    is_stacked: bool
    """True where a tensor of the files holds its part of every expert; else of one."""
    conversion: Any
    """transformers' WeightConverter; None where the files hold the stack as it is."""

    @property
    def files(self) -> list[str]:
        """The names of the tensors."""
        return [name for every in self.names.values() for name in every]

    def of(self, expert: int) -> dict[str, str]:
        """The tensors that hold the matrix of one expert, by pattern."""
        return {pattern: every[0 if self.is_stacked else expert] for pattern, every in self.names.items()}

    def experts_in(self, name: str) -> range:
        """The experts whose numbers a tensor of the files holds."""
        if self.is_stacked:
            return range(self.shape[0])
        place = next(every.index(name) for every in self.names.values() if name in every)
        return range(place, place + 1)

    def matrix(self, expert: int, read: Callable[[str, int | None], Tensor]) -> Tensor:
        """The matrix (N, K) of one expert.

        `read` gives a tensor of the files; with a number, the part of that expert of a stacked one.
        """
        place = expert if self.is_stacked else None
        return self._converted({pattern: read(name, place) for pattern, name in self.of(expert).items()})

    def back(self, expert: int, matrix: Tensor) -> dict[str, Tensor]:
        """The numbers of one expert's matrix as the tensors of the files hold them, by their names."""
        names, flat = self.of(expert), matrix.reshape(-1)
        if self.conversion is None:
            return {next(iter(names.values())): matrix}
        return {names[pattern]: flat[places] for pattern, places in self._places.items()}

    def _converted(self, found: Mapping[str, Tensor]) -> Tensor:
        """One expert's matrix from its tensors, by pattern."""
        if self.conversion is None:
            return next(iter(found.values()))
        converter = copy.deepcopy(self.conversion)
        values: dict[str, Any] = {
            pattern: [tensor[None] if self.is_stacked else tensor] for pattern, tensor in found.items()
        }
        for operation in converter.operations:
            values = operation.convert(
                values, source_patterns=converter.source_patterns, target_patterns=converter.target_patterns,
                full_layer_name=self.stack, model=_OneExpert(self.shape), config=None, missing_keys=None,
            )  # fmt: skip
        (made,) = values.values()
        matrix: Tensor = (made[0] if isinstance(made, list) else made)[0]
        return matrix

    @cached_property
    def _places(self) -> dict[str, Tensor]:
        """By pattern: the place in the matrix, counted flat, of each number of one expert's part."""
        sizes = [shape.numel() for shape in self.parts.values()]
        numbers = torch.split(torch.arange(sum(sizes)), sizes)
        numbered = {
            pattern: part.view(shape) for (pattern, shape), part in zip(self.parts.items(), numbers, strict=True)
        }
        came_from = self._converted(numbered).reshape(-1)
        place = torch.empty_like(came_from)
        place[came_from] = torch.arange(len(came_from))
        return {
            pattern: part.view(shape)
            for (pattern, shape), part in zip(self.parts.items(), torch.split(place, sizes), strict=True)
        }


class _OneExpert:
    """Stands for the model in a conversion that looks at a parameter's shape."""

    def __init__(self, shape: torch.Size):
        self._shape = shape

    def get_parameter(self, _name: str) -> Tensor:
        return torch.empty((1, *self._shape[1:]), device="meta")


def expert_sources(
    model: Any, stored: Mapping[str, Stored | Dequantised], key_mapping: Mapping[str, str] | None
) -> dict[str, ExpertSource]:
    """The sources of every stack of experts of a model, which may be on meta; `key_mapping` as in from_pretrained.

    A stack is left out if its files hold it in a form of which one expert cannot be converted alone.
    """
    wanted, (names, made_by) = stacks_of(model), _tensors_by_stack(model, stored, key_mapping)
    made = {stack: _source(stack, wanted[stack], one, stored, made_by) for stack, one in names.items()}
    return {stack: source for stack, source in made.items() if source is not None}


def expert_fault(model: Any, stored: Mapping[str, HeaderEntry], key_mapping: Mapping[str, str] | None) -> str | None:
    """A fault of the tensors of single experts in a folder's files; None if there is none.

    transformers stacks as many as there are, by the order of their numbers: with gaps, an expert's matrices could be of
    two experts.
    """
    wanted, (names, _made_by) = stacks_of(model), _tensors_by_stack(model, stored, key_mapping)
    for stack, by_pattern in names.items():
        for pattern, every in by_pattern.items():
            fault = _fault(every, wanted[stack][0], stored) if "*" in pattern or len(every) > 1 else None
            if fault is not None:
                return fault
    return None


def _fault(names: list[str], experts: int, stored: Mapping[str, HeaderEntry]) -> str | None:
    """Of the tensors of single experts that make one stack."""
    numbers = [re.findall(r"\d+", name) for name in names]
    counted = [list(map(int, place)) for place in zip(*numbers, strict=False)]
    if not any(place == list(range(experts)) for place in counted):
        return (
            f"config.json describes experts 0 to {experts - 1}, but the files hold {len(names)} tensors of the kind of "
            f"{names[0]!r}, up to {names[-1]!r}"
        )
    odd = next((name for name in names if stored[name].shape != stored[names[0]].shape), None)
    if odd is not None:
        shapes = [list(stored[name].shape) for name in (odd, names[0])]
        return f"the tensor {odd!r} has the shape {shapes[0]}, but that of another expert, {names[0]!r}, {shapes[1]}"
    return None


def _tensors_by_stack(
    model: Any, stored: Collection[str], key_mapping: Mapping[str, str] | None
) -> tuple[dict[str, dict[str, list[str]]], dict[str, Any]]:
    """For each stack, the tensors by pattern of transformers' conversion; and the conversions by pattern."""
    wanted = stacks_of(model)
    if not wanted:
        return {}, {}
    transforms = get_model_conversion_mapping(model, key_mapping=dict(key_mapping) if key_mapping else None)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    expected, prefix = model.state_dict(), model.base_model_prefix
    names: dict[str, dict[str, list[str]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in expected and name in expected:
            target, pattern = name, None
        if target in wanted:
            names.setdefault(target, {}).setdefault(pattern or "", []).append(name)
    return names, {pattern: one for one in converters for pattern in one.source_patterns}


def _source(
    stack: str,
    shape: torch.Size,
    names: Mapping[str, list[str]],
    stored: Mapping[str, Stored | Dequantised],
    made_by: Mapping[str, Any],
) -> ExpertSource | None:
    """The source of one stack; None if one expert's matrix does not come out of its tensors."""
    patterns = {made_by.get(pattern) for pattern in names}
    conversion = patterns.pop()
    if patterns or (conversion is not None and len(conversion.target_patterns) > 1):
        return None
    firsts = {pattern: stored[every[0]].shape for pattern, every in names.items()}
    is_stacked = all(len(every) == 1 and len(firsts[pattern]) == 3 for pattern, every in names.items())
    if any((firsts[pattern][0] if is_stacked else len(every)) != shape[0] for pattern, every in names.items()):
        return None
    if any(stored[name].shape != firsts[pattern] for pattern, every in names.items() for name in every):
        return None
    # transformers' order of patterns is that of its conversion, not of the names.
    order = list(names) if conversion is None else [one for one in conversion.source_patterns if one in names]
    source = ExpertSource(
        stack=stack, shape=shape, names={pattern: tuple(names[pattern]) for pattern in order},
        parts={pattern: torch.Size(firsts[pattern][is_stacked:]) for pattern in order}, is_stacked=is_stacked,
        conversion=conversion,
    )  # fmt: skip
    try:
        made = source.matrix(0, lambda name, _expert: torch.empty(_part(name, source), device="meta"))
    except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError):
        return None
    return source if made.shape == shape[1:] else None


def _part(name: str, source: ExpertSource) -> torch.Size:
    return next(source.parts[pattern] for pattern, every in source.names.items() if name in every)


def read_part(tensor: Stored | Dequantised, expert: int | None, dtype: torch.dtype) -> Tensor:
    """A tensor of the files in `dtype`; with a number, the part of that expert of a stacked one."""
    if expert is not None:
        return tensor.matrix(expert).to(dtype)
    return tensor.whole(dtype) if isinstance(tensor, Dequantised) else tensor.whole().to(dtype)
