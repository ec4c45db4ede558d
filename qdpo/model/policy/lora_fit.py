"""Tries an adapter on the skeleton of its base, which has every layer and no weights, before anything is loaded."""

import copy
import difflib
import json
import math
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from qdpo.errors import ConfigError
from qdpo.model.base import text_model
from qdpo.model.policy.lora_config import CONFIG, WEIGHTS, check_adapter_folder, is_text
from qdpo.model.policy.lora_file import PREFIX, module_of, tensor_forms
from qdpo.model.policy.peft_names import adapt

# PEFT raises any of these for a config that does not fit a model.
MISFITS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, NotImplementedError, re.error)
MATCH_S = 20.0
# Runs in a process of its own: some expressions need longer than a life, and Python cannot interrupt a match.
MATCHER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    try:
        compiled = re.compile(pattern)
        for name in names:
            compiled.fullmatch(name)
    except (re.error, RecursionError, OverflowError, MemoryError) as error:
        sys.exit(f"{pattern!r}: {error}")
"""


def skeleton(config: Any) -> Any:
    """The text model of a config, on no device. Raises: ConfigError if transformers has none."""
    return text_model.skeleton(text_model.text_model_of(config))


def check_fit(config: Any, folder: Path) -> None:
    """Checks that the adapter in `folder` is one for the base with this config: each tensor has its place and shape.

    Raises: ConfigError, also for what PEFT would leave out without a word.
    """
    fields = check_adapter_folder(folder)
    check_part(config, folder)
    base = skeleton(config)
    check_patterns(base, fields, folder / CONFIG)
    named = fields.get("target_modules") or []
    if not is_text(named):
        check_names(base, named, f"{folder / CONFIG}: target_modules")
    parameters = [name for name, _ in base.named_parameters()]
    for one in fields.get("target_parameters") or []:
        if not any(name == one or name.endswith("." + one) for name in parameters):
            raise ConfigError(
                f"{folder / CONFIG}: target_parameters names {one}, but this {base.config.model_type} model has no "
                "such parameter. Give the base that the adapter was trained over as model.path."
            )
    model = attach(base, fields, folder, empty=True)
    _check_layers(model, fields, folder / CONFIG)
    forms = tensor_forms(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in saved_state(model).items()}
    for name, form in forms.items():
        if name in expected and form.shape != expected[name]:
            raise ConfigError(
                f"{folder / WEIGHTS} holds {name} of the shape {list(form.shape)}, but this base and {CONFIG} want "
                f"{list(expected[name])}. The adapter belongs to another base, or to other settings."
            )
    _check_sets(set(forms), set(expected), folder)


def check_part(config: Any, folder: Path) -> None:
    """Refuses an adapter over the whole class of a checkpoint of which qdpo loads the text model alone.

    Raises: ConfigError with the two classes and a way out.
    """
    text = text_model.text_model_of(config)
    if not text.is_part:
        return
    decoder = text_model.skeleton(text).get_submodule(text.decoder)
    inside = tuple(f"{text.decoder}.{name}." for name, _part in decoder.named_children())
    layers = sorted({module_of(name) for name in tensor_forms(folder)})
    lost = [name for name in layers if not f"{name}.".startswith(inside)]
    if lost:
        raise ConfigError(
            f"The adapter in {folder} was made over the whole checkpoint ({text.whole.__name__}), as by other programs "
            f"and by qdpo 0.1: {len(lost)} of its {len(layers)} layers, such as {lost[0]}, are not named as layers of "
            f"the text model ({text.cls.__name__}), which is all that is loaded here. Merge it over "
            f"{text.whole.__name__} with PEFT (merge_and_unload), and give the merged model as model.path."
        )


def attach(base: Any, fields: dict[str, Any], folder: Path, *, empty: bool = False) -> Any:
    """A PEFT model of `base` with the adapter's layers, without memory if `empty`. Raises: ConfigError for a misfit."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return adapt(base, lora_config(fields), empty=empty)
    except MISFITS as error:
        raise ConfigError(
            f"The adapter in {folder} (adapter.start) does not fit this base: {error} Give the base that it was "
            f"trained over as model.path, or correct {folder / CONFIG}."
        ) from error


def lora_config(fields: dict[str, Any]) -> LoraConfig:
    """PEFT's config with the fields that `check_adapter_folder` kept, and everything else at its default."""
    return LoraConfig(**copy.deepcopy(fields), task_type="CAUSAL_LM", bias="none", lora_dropout=0.0)


def full_config(fields: dict[str, Any]) -> dict[str, Any]:
    """The adapter_config.json of these fields, for loading; lists of names are sorted."""
    found = {**lora_config(fields).to_dict(), "inference_mode": True}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}


def saved_state(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors under the names of its file."""
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return found


def adapted_layers(model: Any) -> dict[str, LoraLayer]:
    """PEFT's layers by the name of the module that they adapt."""
    causal = model.get_base_model()
    return {name: layer for name, layer in causal.named_modules() if isinstance(layer, LoraLayer)}


def scales(model: Any) -> dict[str, float]:
    """The factor of B·A of each adapted layer, by module name."""
    return {name: float(layer.scaling["default"]) for name, layer in adapted_layers(model).items()}


def stated_scales(config: Any, fields: dict[str, Any], folder: Path) -> dict[str, float]:
    """The factors that PEFT reads from these fields, over the base with this config."""
    return scales(attach(skeleton(config), fields, folder, empty=True))


def scale_of(fields: dict[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / √rank with rsLoRA (arXiv 2312.03732); a pattern's alpha applies to its layers."""
    patterns = fields.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns.keys(), module), fields["lora_alpha"]))
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)


def check_names(base: Any, names: Iterable[str], origin: str) -> None:
    """Refuses names of layers of which one matches nothing, which PEFT ignores next to others that match.

    Raises: ConfigError with the nearest names that the base has.
    """
    modules = [name for name, _ in base.named_modules() if name]
    lost = [name for name in sorted(names) if not any(m == name or m.endswith("." + name) for m in modules)]
    if not lost:
        return
    linear = {
        name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    near = difflib.get_close_matches(lost[0], sorted(linear), n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"{origin} names {', '.join(lost)}, but no layer of this {base.config.model_type} model is called that. "
        f"{hint}Its linear layers: {', '.join(sorted(linear))}."
    )


def check_patterns(base: Any, fields: dict[str, Any], file: Path) -> None:
    """Refuses regular expressions that are none, or that need seconds to match the base's names."""
    patterns = {fields[name] for name in ("target_modules", "exclude_modules") if is_text(fields.get(name))}
    of_layers = fields.get("layers_pattern") or []
    patterns |= {rf"(?:^|.*?\.){one}\.(?P<idx>\d+)\..*" for one in ([of_layers] if is_text(of_layers) else of_layers)}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns |= {rf"(?:.*\.)?({key})$" for key in fields.get(name, {})}
    patterns = {text for text in patterns if re.escape(text) != text}
    if not patterns:
        return
    names = [name for name, _ in base.named_modules()]
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", MATCHER], input=json.dumps([sorted(patterns), names]), text=True,
            capture_output=True, timeout=MATCH_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{file} has regular expressions that do not end on the base's {len(names)} names within {MATCH_S:g} s: "
            f"{', '.join(sorted(patterns))[:200]}. Write the names of the layers as a list."
        ) from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no answer"])[-1]
        raise ConfigError(f"{file} has a regular expression that cannot be used: {last}. Correct it.")


def _check_layers(model: Any, fields: dict[str, Any], file: Path) -> None:
    causal = model.get_base_model()
    head = causal.get_output_embeddings()
    adapted = adapted_layers(model)
    for name, layer in adapted.items():
        inner = layer.get_base_layer()
        if inner is getattr(head, "base_layer", None) or layer is head:
            raise ConfigError(
                f"{file} (adapter.start) adapts the output head {name}, which must stay frozen. {WAY_OUT}"
            )
        if isinstance(layer, ParamWrapper):
            if isinstance(inner, nn.Linear | nn.Embedding):
                raise ConfigError(
                    f"{file} has target_parameters={fields.get('target_parameters')}, which adapts {name} as a "
                    "parameter. qdpo trains that only for stacked experts. Name the layer in target_modules instead."
                )
        elif not isinstance(inner, nn.Linear | Conv1D):
            raise ConfigError(
                f"{file} (adapter.start) adapts {name}, a {type(inner).__name__} (lora_embedding). Only linear layers "
                f"can be trained. {WAY_OUT}"
            )
    wanted = fields.get("layers_to_transform")
    if wanted is not None:
        found = {int(part) for name in adapted for part in name.split(".") if part.isdecimal()}
        lost = sorted({wanted} - found if isinstance(wanted, int) else set(wanted) - found)
        if lost:
            raise ConfigError(
                f"{file} has layers_to_transform={wanted}, but in this base no layer {lost[0]} can be adapted (of "
                f"{len(_layer_numbers(causal))}, counted from 0). Give the base that the adapter was trained over."
            )


WAY_OUT = (
    "Merge the adapter into its base with the program that made it, and give the merged model as model.path; or train "
    "it without this layer."
)


def _layer_numbers(causal: Any) -> set[str]:
    return {match[1] for name, _ in causal.named_modules() if (match := re.search(r"\.(\d+)\.", name))}


def _check_sets(held: set[str], expected: set[str], folder: Path) -> None:
    missing, surplus = sorted(expected - held), sorted(held - expected)
    if not missing and not surplus:
        return
    parts = []
    if missing:
        parts.append(f"lacks {len(missing)} that {CONFIG} names, such as {missing[0]}")
    if surplus:
        parts.append(
            f"holds {len(surplus)} that {CONFIG} does not name or this base does not have, such as {surplus[0]}"
        )
    raise ConfigError(
        f"{folder / WEIGHTS} {', and '.join(parts)}: of its {len(held)} tensors, {len(held & expected)} have a place. "
        "The adapter belongs to another base, or one of its two files to another adapter. Give the base that it was "
        "trained over as model.path, or copy the adapter again."
    )


__all__ = [
    "PREFIX", "adapted_layers", "attach", "check_fit", "check_names", "check_part", "check_patterns", "full_config",
    "lora_config", "saved_state", "scale_of", "scales", "skeleton", "stated_scales",
]  # fmt: skip
