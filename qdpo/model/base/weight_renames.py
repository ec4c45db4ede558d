"""The renames that lead from a checkpoint's tensor names to those of its text model, found from the names themselves.

Files name the same decoder in several ways: `model.language_model.layers…`, `language_model.model.layers…`,
`model.layers…`. transformers has rules for the whole checkpoint's class, and other ones for the text class.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

FORMS = ("model.", "model.language_model.", "language_model.model.", "language_model.")
"""Places of a decoder in the files of multimodal checkpoints, in today's and in older styles."""


@dataclass(frozen=True, kw_only=True)
class Renames:
    """A way from the names in the files to those of a model's tensors."""

    key_mapping: dict[str, str]
    """For from_pretrained: regular expressions of beginnings, and their replacements."""
    sources: Mapping[str, tuple[str, ...]]
    """The tensors in the files that make each tensor of the model: several where transformers joins them."""
    has_own_head: bool
    """True if the files hold the output head next to the embedding table."""
    missing: list[str]
    """Tensors of the model that the files do not have."""
    twice: list[tuple[str, ...]]
    """Tensors of the files that would become one and the same tensor of the model."""


def renames_for(model: Any, decoder: str, stored: Collection[str]) -> Renames:
    """The renames with which every tensor of `model` (which may be on meta) is found; else the nearest attempt."""
    names = plain_names(stored)
    expected = set(model.state_dict())
    attempts = [_mapping(model, decoder, place, names) for place in _places(model, decoder, names)]
    direct = [len({renamed(name, one) for name in names} & expected) for one in attempts]
    found: list[Renames] = []
    for _hits, place in sorted(((-hits, place) for place, hits in enumerate(direct))):
        found.append(_renames(model, attempts[place], names))
        if not found[-1].missing:
            break
    best = min(found, key=lambda one: len(one.missing))
    used = {name for sources in best.sources.values() for name in sources}
    again = {renamed(name, one): name for one in attempts for name in names - used if renamed(name, one) in expected}
    doubles = [(*best.sources.get(target, ()), name) for target, name in sorted(again.items())]
    return Renames(**{**vars(best), "twice": [*best.twice, *doubles]})


def plain_names(stored: Collection[str]) -> set[str]:
    """The names without those of scales and tables that are stored with a 4-bit weight."""
    return {
        name for name in stored if name.partition(".weight.")[0] + ".weight" not in stored or name.endswith(".weight")
    }


def _places(model: Any, decoder: str, names: Collection[str]) -> list[str]:
    """Beginnings of names behind which the decoder's embedding table is stored, or usually is."""
    tail = _table_name(model).removeprefix(f"{decoder}.")
    seen = [one.removesuffix(tail) for one in sorted(names) if one == tail or one.endswith(f".{tail}")]
    return list(dict.fromkeys([f"{decoder}.", *seen, *FORMS]))


def _mapping(model: Any, decoder: str, place: str, names: Collection[str]) -> dict[str, str]:
    """The renames for a decoder whose tensors are stored behind `place`, and for the head, wherever it is."""
    mapping = {f"^{re.escape(place)}": f"{decoder}."} if place and place != f"{decoder}." else {}
    path = _head_path(model)
    for one in sorted(names) if path else []:
        before = one.removesuffix(f"{path}.weight")
        if before != one and before and place.startswith(before):
            mapping[f"^{re.escape(before + str(path))}\\."] = f"{path}."
    return mapping


def _table_name(model: Any) -> str:
    table = model.get_input_embeddings().weight
    found: str = next(name for name, parameter in model.named_parameters() if parameter is table)
    return found


def _head_path(model: Any) -> str | None:
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), None)


def renamed(name: str, mapping: Mapping[str, str]) -> str:
    """The name after the renames of a key_mapping alone."""
    for pattern, replacement in mapping.items():
        name = re.sub(pattern, replacement, name, count=1)
    return name


def _renames(model: Any, mapping: dict[str, str], names: Collection[str]) -> Renames:
    """Follows transformers' own steps from each stored name to a tensor of the model."""
    transforms = get_model_conversion_mapping(model, mapping)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    made_by = {pattern: one for one in converters for pattern in one.source_patterns}
    expected = model.state_dict()
    sources: dict[str, list[str]] = defaultdict(list)
    joined: set[str] = set()
    for name in sorted(names):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, expected)
        if target not in expected and name in expected:
            target, pattern = name, None
        if target not in expected:
            continue
        targets = [target]
        if pattern is not None:
            patterns = made_by[pattern].target_patterns
            targets = [target.replace(patterns[0], one) for one in patterns]
            joined |= set(targets)
        for one in targets:
            sources[one].append(name)
    tied = model.all_tied_weights_keys
    groups = [{first, second} for first, second in tied.items()]
    there = set(sources) | {one for group in groups if group & sources.keys() for one in group}
    ignored = [re.compile(one) for one in model._keys_to_ignore_on_load_missing or ()]
    missing = [one for one in expected if one not in there and not any(rule.search(one) for rule in ignored)]
    twice = [tuple(found) for target, found in sources.items() if len(found) > 1 and target not in joined]
    return Renames(
        has_own_head={f"{_head_path(model)}.weight", _table_name(model)} <= sources.keys(),
        key_mapping=mapping,
        sources={one: tuple(found) for one, found in sources.items()},
        missing=missing,
        twice=twice,
    )
