"""The names of one weight: in a model's files, in the class that is trained, and in the class that servers load.

transformers renames tensors while it loads them, and joins some (the experts of a layer, the parts of a fused matrix).
Its own renamings are applied here to the names in the files, one by one, so that every part of a checkpoint (text
model, vision tower, projector) has the names that it really has. No weight is read.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from qdpo.errors import ConfigError
from qdpo.model.base.folder import read_json
from qdpo.model.base.foreign import reading
from qdpo.model.base.originals import plain_folder, plain_names
from qdpo.model.base.text_model import TextModel, found_in, model_config, skeleton

WEIGHT = ".weight"


@dataclass(frozen=True)
class StoredNames:
    """The tensors of a checkpoint's files, as one class of transformers loads them."""

    sources: dict[str, tuple[str, ...]]
    """Parameter or buffer → the tensors of the files that it is made of."""
    converted: frozenset[str]
    """Parameters that no tensor of the files holds as they are: they are joined, cut or transposed at load."""
    others: tuple[str, ...]
    """Tensors of the files that this class does not load, in their order."""

    @property
    def modules(self) -> list[str]:
        """The modules that have a weight."""
        return [name.removesuffix(WEIGHT) for name in self.sources if name.endswith(WEIGHT)]

    def key(self, module: str) -> str | None:
        """The tensor of the files that is the module's weight as it is; None if there is none."""
        found = self.sources.get(module + WEIGHT, ())
        return found[0] if len(found) == 1 and module + WEIGHT not in self.converted else None

    def as_in(self, other: "StoredNames") -> dict[str, str]:
        """Module of this class → module of another class that is loaded from the same tensors."""
        theirs = {made_of: name for name, made_of in other.sources.items()}
        pairs = [(name, theirs.get(made_of, "")) for name, made_of in self.sources.items()]
        return {
            mine.removesuffix(WEIGHT): its.removesuffix(WEIGHT)
            for mine, its in pairs
            if mine.endswith(WEIGHT) and its.endswith(WEIGHT)
        }


@dataclass(frozen=True, kw_only=True)
class FolderNames:
    """The names of a folder's weights, for its two classes."""

    folder: Path
    text: TextModel
    """The class that is trained."""
    served: Any
    """The class that servers load: the one that config.json names."""
    trained: StoredNames

    @property
    def is_served_as_trained(self) -> bool:
        """True if both classes are one."""
        return not self.text.is_part and self.served is self.text.cls

    def in_files(self, modules: Iterable[str]) -> dict[str, str]:
        """The tensor of the files that is each module's weight. Raises: ConfigError if one has none."""
        found = {module: self.trained.key(module) for module in modules}
        lost = sorted(module for module, key in found.items() if key is None)
        if lost:
            raise ConfigError(self._not_stored(lost))
        return {module: key for module, key in found.items() if key is not None}

    def on_servers(self, model: nn.Module, modules: Iterable[str]) -> dict[str, str]:
        """The module of `model`, the served class, with each module's weight. Raises: ConfigError if one has none."""
        wanted, own = list(modules), set(self.trained.modules)
        foreign = sorted(module for module in wanted if module not in own)
        if foreign:
            raise ConfigError(self._not_stored(foreign))
        if self.is_served_as_trained:
            return {module: module for module in wanted}
        files = [*self.trained.others, *(key for made_of in self.trained.sources.values() for key in made_of)]
        pairs = self.trained.as_in(stored_names(model, files))
        lost = sorted(module for module in wanted if module not in pairs)
        if lost:
            raise ConfigError(
                f"{len(lost)} of the adapter's layers, such as {lost[0]}, are not layers of {self.served.__name__}, "
                f"which config.json of {self.folder} names and servers load. Serve the merged model: `qdpo merge`."
            )
        return {module: pairs[module] for module in wanted}

    def _not_stored(self, lost: Sequence[str]) -> str:
        first, more = lost[0], f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        made_of = self.trained.sources.get(first + WEIGHT)
        if made_of:
            return (
                f"{first}{more} cannot be merged: transformers makes its weight at load from {', '.join(made_of[:3])} "
                f"in {self.folder}, so no tensor of the files is the one that was trained. Use the adapter as it is: "
                "`qdpo export --to peft`."
            )
        return (
            f"The files of the base in {self.folder} do not hold weights that the adapter or the run names: "
            f"{first}.weight{more}. The adapter belongs to another base, or this architecture stores its weights in "
            "another form."
        )


def stored_names(model: nn.Module, files: Collection[str], key_mapping: Mapping[str, str] | None = None) -> StoredNames:
    """Maps the names in the files to those of a transformers model, which may be on meta, as `from_pretrained` does.

    `key_mapping` holds the renamings that `from_pretrained` is called with.
    """
    causal: Any = model
    transforms: list[Any] = get_model_conversion_mapping(causal, key_mapping=dict(key_mapping) if key_mapping else None)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    expected, prefix = causal.state_dict(), causal.base_model_prefix
    sources: dict[str, list[str]] = {}
    converted: set[str] = set()
    others: list[str] = []
    for name in sorted(files, key=dot_natural_key):
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if renamed not in expected and name in expected:
            renamed, pattern = rename_source_key(name, [], [], prefix, expected)
        if renamed not in expected:
            others.append(name)
            continue
        sources.setdefault(renamed, []).append(name)
        if pattern is not None:
            converted.add(renamed)
    return StoredNames({name: tuple(found) for name, found in sources.items()}, frozenset(converted), tuple(others))


def float32_parameters(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Parameters and buffers that transformers keeps in float32 where the model is loaded in `dtype`."""
    causal: Any = model
    globs = causal._get_dtype_plan(dtype)
    return {name for name in causal.state_dict() if any(re.search(one.replace("*", ".*"), name) for one in globs)}


def served_class(config: Mapping[str, Any]) -> Any:
    """The class that a config.json's `architectures` names, which servers load; None if transformers lacks it."""
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, transformers.GenerationMixin) else None


def folder_names(folder: Path, stored: Collection[str] | None = None) -> FolderNames:
    """The names of a model folder's weights; with `stored`, those in its files, before the files are there.

    Raises: ConfigError if transformers cannot build the class that is trained, or the files do not hold it.
    """
    files = plain_folder(folder) if stored is None else plain_names(folder, stored)
    text = found_in(folder, files)
    trained = stored_names(skeleton(text), files, text.key_mapping)
    served = served_class(read_json(folder / "config.json")) or text.whole
    if served.config_class is not None and not isinstance(model_config(folder), served.config_class):
        served = text.whole  # a text model that was cut out of a checkpoint may still name the whole one's class
    return FolderNames(folder=folder, text=text, served=served, trained=trained)


def served_skeleton(names: FolderNames) -> Any:
    """The class that servers load, on no device. Raises: ConfigError if transformers cannot build it here."""
    config = model_config(names.folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    name = names.served.__name__
    where = f"transformers cannot build {name}, the class that servers load for {names.folder}"
    with reading(where, "Install what it needs."), torch.device("meta"):
        return names.served._from_config(config)
