"""Sorts the layers of a model without weights into kinds, and counts the weights of each."""

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from qdpo.families.traced import ExpertStack, Weights
from qdpo.model.base.config_values import CHOSEN
from qdpo.model.base.expert_files import is_experts
from qdpo.model.base.quant import BLOCK

# A layer's own number, and those of layers that it refers to, do not make it another kind.
_NUMBERED = ("idx", "index", "layer_id", "layer_number")
_PLAIN = (bool, int, float, str, type(None))


def kinds_of(layers: nn.ModuleList) -> list[int]:
    """For each layer the first layer that is built like it: the same modules, sizes, types and switches."""
    first: dict[tuple[Any, ...], int] = {}
    return [first.setdefault(_signature(layer), place) for place, layer in enumerate(layers)]


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    parts = []
    for name, module in layer.named_modules():
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        sizes = tuple((one, tuple(tensor.shape)) for one, tensor in tensors)
        parts.append((name, type(module), sizes, _switches(module)))
    return tuple(parts)


def _switches(module: nn.Module) -> tuple[Any, ...]:
    return tuple(
        sorted(
            (name, repr(value))
            for name, value in vars(module).items()
            if isinstance(value, _PLAIN) and not name.startswith("_") and not any(part in name for part in _NUMBERED)
        )
    )


def weights_of(module: nn.Module, adapted: Mapping[int, tuple[int, int]], without: Collection[int] = ()) -> Weights:
    """The weights of a module, without the parameters whose `id` is in `without`. Linear layers, experts are in 4 bits.

    `adapted` holds inputs and outputs of the layers that get LoRA, by the `id` of the layer.
    """
    four_bit: list[int] = []
    stacks: list[ExpertStack] = []
    dense = experts = trained = low = 0
    for name, one in module.named_modules():
        for parameter_name, parameter in one.named_parameters(recurse=False):
            if id(parameter) in without:
                continue
            if type(one) is nn.Linear and parameter_name == "weight":
                four_bit.append(parameter.numel())
            elif parameter.dim() == 3 and is_experts(one) and parameter[0].numel() % BLOCK == 0:
                stacks.append(ExpertStack(len(parameter), parameter[0].numel(), _chosen(one, len(parameter))))
            else:
                dense += parameter.numel()
                experts += parameter.numel() if _is_experts(name, one) and not is_experts(one) else 0
        if id(one) in adapted and not any(id(parameter) in without for parameter in one.parameters(recurse=False)):
            trained += sum(adapted[id(one)])
            low += 1
    return Weights(
        four_bit=tuple(four_bit), stacks=tuple(stacks), dense=dense, experts=experts, adapted=trained, low=low
    )


def _is_experts(path: str, module: nn.Module) -> bool:
    return "experts" in path.split(".") or type(module).__name__.endswith("Experts")


def _chosen(module: Any, experts: int) -> int:
    """Experts that a token meets; all where the config does not say it."""
    found = (getattr(module.config, name, None) for name in CHOSEN)
    return next((one for one in found if isinstance(one, int)), experts)


def tables_of(model: Any) -> list[Tensor]:
    """The embedding tables and the head of a model on meta, each once."""
    found: dict[int, Tensor] = {id(one.weight): one.weight for one in model.modules() if isinstance(one, nn.Embedding)}
    head = model.get_output_embeddings()
    if not model.config.tie_word_embeddings:
        found[id(head.weight)] = head.weight
    return list(found.values())
