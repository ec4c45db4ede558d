"""Names for adapter_config.json by which plain PEFT adapts exactly the chosen layers, and PEFT's own way to read them.

PEFT rewrites target_modules of families whose experts transformers has stacked: gate_proj, up_proj, down_proj, w1, w2,
w3 and gate then mean all experts and the router, and no longer a dense layer of that name, whatever precedes it
(peft 0.21, utils/transformers_weight_conversion.py). The one form in which such a layer keeps its own meaning is the
name of its weight in target_parameters; the adapter's tensors have the same names in both forms.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import DUMMY_TARGET_MODULES

from qdpo.errors import ConfigError
from qdpo.model.policy.targets import is_plain

WEIGHT = ".weight"


@dataclass(frozen=True)
class PeftNames:
    """target_modules, and target_parameters, which are weights of linear layers."""

    modules: list[str]
    parameters: list[str]


def peft_names(model: Any, layers: Iterable[str]) -> PeftNames:
    """The shortest names by which PEFT adapts `layers` of `model`, a skeleton or a loaded base, and nothing else.

    Raises: ConfigError if the installed PEFT reads no form of them so.
    """
    chosen = list(layers)
    every = [name for name, _ in model.named_modules() if name]
    for names in _forms(every, chosen):
        if read_names(model, names) == set(chosen):
            return PeftNames(names, [])
    for named in _forms(every, _kept(model, chosen)):
        rest = [layer for layer in chosen if layer not in read_names(model, named)]
        # Where a reader's experts are single layers, the name must not mean theirs.
        experts = [f"experts.0.{layer.rpartition('.')[2]}" for layer in rest]
        weights = [name + WEIGHT for name in _suffixes([*every, *experts], rest)]
        if read_names(model, named) == set(chosen) - set(rest) and set(linear_layers(model, weights)) == set(rest):
            return PeftNames(named, weights)
    raise ConfigError(
        f"The installed PEFT cannot be told by name to adapt these {len(chosen)} layers of a "
        f"{model.config.model_type} model and nothing else, such as {chosen[0]}. Give adapter.targets=q_proj+v_proj "
        "or other names of layers."
    )


def read_names(model: Any, modules: list[str]) -> set[str]:
    """The layers of `model` that plain PEFT adapts for these target_modules; empty if it would take parameters."""
    if not modules:
        return set()
    config = LoraConfig(target_modules=copy.copy(modules), task_type="CAUSAL_LM")
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # before PEFT rewrote names
        pass
    else:
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # some of the fused names, but not all
            return set()
    if config.target_parameters:
        return set()
    return {name for name, _ in model.named_modules() if name and check_target_module_exists(config, name) in (True,)}


def linear_layers(model: Any, parameters: Iterable[str]) -> list[str]:
    """The plain linear layers whose weight is named by one of `parameters`, in the model's order."""
    named = [one for one in parameters if one.endswith(WEIGHT)]
    return [
        name
        for name, module in model.named_modules()
        if is_plain(module) and any(_ends(name + WEIGHT, one) for one in named)
    ]


def adapt(model: Any, config: LoraConfig, *, empty: bool = False) -> Any:
    """The PEFT model of `config`; a linear layer named by its weight gets the LoRA of a layer named by itself.

    PEFT's own layer for parameters computes the same, but needs the weight in 16 or 32 bits.
    Raises: ValueError for a layer that is named both ways.
    """
    layers = linear_layers(model, config.target_parameters or [])
    if not layers:
        return get_peft_model(model, config, low_cpu_mem_usage=empty)
    named, modules = list(config.target_parameters), config.target_modules
    others = [one for one in named if not any(_ends(layer + WEIGHT, one) for layer in layers)]
    config.target_parameters = others or None
    if not modules and not others:
        config.target_modules = DUMMY_TARGET_MODULES
    found = get_peft_model(model, config, low_cpu_mem_usage=empty)
    held = found.peft_config["default"]
    stacked, held.target_parameters = held.target_parameters, None
    twice = [layer for layer in layers if isinstance(model.get_submodule(layer), LoraLayer)]
    if twice:
        raise ValueError(f"target_parameters names {twice[0]}, which target_modules names, too.")
    if held.target_modules == DUMMY_TARGET_MODULES:
        held.target_modules = modules or set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the config names other layers
        state = {f"{layer}.lora_A.weight": None for layer in layers}
        found.base_model.inject_adapter(model, "default", low_cpu_mem_usage=empty, state_dict=state)
    held.target_parameters = {*(stacked or []), *named}
    lost = [layer for layer in layers if not isinstance(model.get_submodule(layer), LoraLayer)]
    if lost:
        raise ValueError(f"the installed PEFT does not adapt {lost[0]}, which target_parameters names by its weight.")
    return found


def _kept(model: Any, layers: Sequence[str]) -> list[str]:
    """The layers that PEFT does not take for something else when each is named alone."""
    leaves = {layer.rpartition(".")[2] for layer in layers}
    own = {leaf for leaf in leaves if leaf in {name.rpartition(".")[2] for name in read_names(model, [leaf])}}
    return [layer for layer in layers if layer.rpartition(".")[2] in own]


def _forms(every: Sequence[str], layers: Sequence[str]) -> Iterator[list[str]]:
    """Names that mean `layers` alone, shortest first: last parts, longer suffixes, full names."""
    if not layers:
        yield []
        return
    last = sorted({layer.rpartition(".")[2] for layer in layers})
    yield last
    suffixes = _suffixes(every, layers)
    if not any(suffix[0].isdecimal() for suffix in suffixes):
        yield suffixes
    yield sorted(layers)


def _suffixes(every: Sequence[str], layers: Sequence[str]) -> list[str]:
    """For each layer the shortest end of its name, in whole parts, that no other module's name has; sorted."""
    chosen = set(layers)
    others: set[str] = set()
    for name in every:
        if name not in chosen:
            parts = name.split(".")
            others.update(".".join(parts[start:]) for start in range(len(parts)))
    found = set()
    for layer in layers:
        parts = layer.split(".")
        ends = (".".join(parts[start:]) for start in reversed(range(len(parts))))
        found.add(next((end for end in ends if end not in others), layer))
    return sorted(found)


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
