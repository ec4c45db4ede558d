"""Loads the experts of a model into 4 bits, a matrix at a time, in the place of the stacks that transformers builds."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from qdpo.errors import ConfigError
from qdpo.model.base import quant
from qdpo.model.base.dequantise import Dequantised, plain_tensors
from qdpo.model.base.expert_files import ExpertSource, expert_sources, read_part, stacks_of
from qdpo.model.base.expert_stack import FourBitStack
from qdpo.model.base.finite import is_finite
from qdpo.model.base.tensor_files import Stored
from qdpo.model.base.text_model import TextModel, skeleton
from qdpo.run.record import FourBitMark, RunRecord
from qdpo.run.watcher import Say

# transformers' own code for experts, which takes one expert after another, and so one matrix.
ONE_BY_ONE = "eager"


@dataclass(frozen=True, kw_only=True)
class FourBitExperts:
    """The stacks of experts of a folder that are to be held in 4 bits."""

    folder: Path
    form: quant.FourBit
    stored: dict[str, Stored | Dequantised]
    sources: dict[str, ExpertSource]
    """By the name of the stack."""

    @classmethod
    def of(cls, folder: Path, text: TextModel, form: quant.FourBit, announce: Say) -> "FourBitExperts | None":
        """The stacks of a checked folder; None if it has none that can be held in 4 bits."""
        model = skeleton(text)
        wanted = stacks_of(model)
        if not wanted:
            return None
        stored = plain_tensors(folder)
        found = expert_sources(model, stored, text.key_mapping)
        sources = {name: one for name, one in found.items() if one.shape[1:].numel() % quant.BLOCK == 0}
        left = {name: shape for name, shape in wanted.items() if name not in sources}
        if left:
            bits, numbers = 8 * form.dtype.itemsize, sum(shape.numel() for shape in left.values())
            name = next(iter(left))
            announce(
                f"experts: {len(left)} of {len(wanted)} stacks stay in {bits} bits "
                f"({numbers * form.dtype.itemsize / 2**30:.1f} GiB), such as {name}: "
                + (
                    f"a matrix of it is not made of whole blocks of {quant.BLOCK} numbers"
                    if name in found
                    else "the files hold it in a form of which one expert cannot be read alone"
                )
            )
        return cls(folder=folder, form=form, stored=stored, sources=sources) if sources else None

    @property
    def files(self) -> set[str]:
        """The tensors of the files that the stacks are made of."""
        return {name for source in self.sources.values() for name in source.files}

    def without(self, cls: Any) -> Any:
        """A class of the same models whose stacks are empty, so that transformers makes and fills none."""
        return _without_stacks(cls, self.sources)

    def put_into(self, model: Any, cls: Any, device: torch.device, announce: Say) -> None:
        """Fills the 4-bit stacks of a model that was loaded without, and makes it one of `cls` again.

        Raises: ConfigError for a weight that is not finite.
        """
        model.__class__ = cls
        for name, source in self.sources.items():
            path, _, stack = name.rpartition(".")
            module: Any = model.get_submodule(path)
            filled = FourBitStack(source.shape, self.form, device)
            for expert in range(source.shape[0]):
                matrix = source.matrix(expert, self._read)
                if not is_finite(matrix):
                    raise ConfigError(
                        f"{self.folder} (from model.path): {', '.join(source.of(expert).values())} holds NaN or "
                        "infinite values, so nothing can be calculated with this model. Copy or download it again."
                    )
                filled.put(expert, matrix)
            _replace(module, stack, filled)
        _take_one_by_one(model)
        numbers = sum(source.shape.numel() for source in self.sources.values())
        announce(f"experts: {numbers / 1e9:.2f} billion numbers in {self.form.kind}, quantised expert by expert")

    def _read(self, name: str, expert: int | None) -> Tensor:
        return read_part(self.stored[name], expert, self.form.dtype)


def put_random(model: Any, form: quant.FourBit, device: torch.device) -> None:
    """4-bit stacks with random numbers in place of those of a model, which may be on meta; without any if fake."""
    for name, shape in stacks_of(model).items():
        path, _, stack = name.rpartition(".")
        if shape[1:].numel() % quant.BLOCK == 0:
            made = FourBitStack(shape, form, device)
            for expert in range(0 if isinstance(made.weight, FakeTensor) else shape[0]):
                made.put(expert, torch.randn(shape[1:], dtype=form.dtype, device=device).mul_(shape[2] ** -0.5))
            _replace(model.get_submodule(path), stack, made)
    _take_one_by_one(model)


def _replace(module: Any, stack: str, made: FourBitStack) -> None:
    del module._parameters[stack]
    module.add_module(stack, made)


def _take_one_by_one(model: Any) -> None:
    """Lets transformers' own code take one expert after another; others want a whole stack in 16 bits."""
    for module in model.modules():
        if any(isinstance(child, FourBitStack) for child in module.children()):
            module.config._experts_implementation = ONE_BY_ONE


def _without_stacks(cls: Any, stacks: Collection[str]) -> Any:
    def __init__(self: Any, config: Any) -> None:
        cls.__init__(self, config)
        for name in stacks:
            path, _, stack = name.rpartition(".")
            module = self.get_submodule(path)
            module._parameters[stack] = nn.Parameter(torch.empty(0), requires_grad=False)

    fields = {"__init__": __init__, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), fields)


def left_dense(record: RunRecord) -> bool:
    """True if the run was started with any stacked experts in 16 bits: before version 0.2, or by adapter.start."""
    if record.four_bit is None:
        return record.weights is not None
    return not any(mark.experts for mark in record.four_bit.values())


def stack_marks(model: nn.Module) -> dict[str, FourBitMark]:
    """The mark of every 4-bit stack of experts, by its module: see `layer_marks` of model/base/quant."""
    return {name: module.mark() for name, module in model.named_modules() if isinstance(module, FourBitStack)}
