"""The text model of a checkpoint: its class, its config and the names of its weights, without towers for other input.

A checkpoint that takes pictures or sound holds a language model among other parts. Where transformers has a causal
class for that part, it alone is built and loaded. Where it has none, the class of the whole checkpoint is built without
its other parts. Everything that loads, sketches or traces a model asks here for it.
"""

import copy
import importlib
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from qdpo.errors import ConfigError
from qdpo.model.base.foreign import reading
from qdpo.model.base.headers import AGAIN
from qdpo.model.base.originals import plain_folder
from qdpo.model.base.weight_renames import Renames, renames_for

TEXT = "text_config"


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """The model that is built and loaded of a checkpoint."""

    config: Any
    """The config of `cls`: of the text part where it is built alone, with the tied tables of the whole checkpoint."""
    cls: Any
    """The causal class; without one, the class of the whole checkpoint, which leaves out its other parts."""
    decoder: str
    """The path of the decoder in `cls`, which every adapter and fast part stays within."""
    key_mapping: dict[str, str]
    """Renames for from_pretrained, as regular expressions, from the names in the files."""
    sources: Mapping[str, tuple[str, ...]]
    """For a part of a folder: the tensors in the files that make each tensor of `cls`."""
    is_part: bool
    """True if the checkpoint holds more than this model."""
    whole: Any
    """The class of the whole checkpoint, which servers load; `cls` if there is no other."""


def text_model(folder: Path) -> TextModel:
    """The text model of a checked folder, with the renames that its weights need.

    Raises: ConfigError if there is none, or the weights do not hold every tensor of it once.
    """
    return found_in(folder, plain_folder(folder))


def found_in(folder: Path, stored: Collection[str]) -> TextModel:
    """As `text_model`, where the names of the folder's tensors are known already."""
    config = model_config(folder)
    text = text_model_of(config)
    if not text.is_part:
        return text
    way = _way_into(text, stored)
    if (way.missing or way.twice) and text.cls is not _without_other_parts(text.whole):
        # transformers renames tensors for the whole checkpoint's class that it does not know for the text class.
        within = _within_whole(_without_quantization(config), text.whole)
        other = _way_into(within, stored)
        if not other.missing and not other.twice:
            text, way = within, other
    if way.twice:
        names = " and ".join(map(repr, way.twice[0]))
        raise ConfigError(
            f"The weights in {folder} (from model.path) hold {len(way.twice)} tensors of the text model twice, such as "
            f"{names}, so which is meant is unknown. {AGAIN}"
        )
    if way.missing:
        raise ConfigError(
            f"The weights in {folder} (from model.path) do not fit its config.json: of the text model "
            f"({text.cls.__name__}) {len(way.missing)} tensors are missing, such as {', '.join(way.missing[:3])}. "
            f"{AGAIN}"
        )
    if way.has_own_head and getattr(text.config, "tie_word_embeddings", False):
        # Some configs leave it out and their class's default ties; transformers unties two tables that differ.
        text.config.tie_word_embeddings = False
    return replace(text, key_mapping=way.key_mapping, sources=way.sources)


def text_model_of(config: Any) -> TextModel:
    """The text model of a config, without the renames, which depend on a folder's files.

    Raises: ConfigError if transformers has no causal model for it.
    """
    plain = _without_quantization(config)
    text = _text_part(plain)
    if text is not plain and text.model_type != type(text).model_type:
        # transformers keeps the name and builds its own family, so every later choice by the name would be wrong.
        raise ConfigError(
            f"The model_type of text_config in config.json (from model.path) is {text.model_type!r:.60}, but "
            f"transformers builds {type(text).model_type!r} for a {config.model_type} model. Copy config.json from the "
            "model's source."
        )
    cls, whole = _causal_class(text), None if text is plain else _whole_class(plain)
    if (cause := _obstacle(plain, cls, whole)) is not None:
        raise ConfigError(
            f"transformers {transformers.__version__} has no language model of its own for model_type "
            f"{config.model_type!r} ({cause}), so it cannot be trained on text. Choose another model."
        )
    if cls is None:
        return _within_whole(plain, whole)
    if whole is not None:
        text.tie_word_embeddings = _is_tied(plain, text, whole)
        for name in ("bos_token_id", "eos_token_id"):  # the outer ones are those that generation goes by
            if getattr(plain, name, None) is not None:
                setattr(text, name, getattr(plain, name))
    return _with_decoder(text, cls, whole or cls, is_part=text is not plain)


def check_text_model(config: Mapping[str, object], owner: str) -> None:
    """Refuses a config.json of which there is no text model to train, by name; for use before a download.

    Raises: ConfigError.
    """
    with reading(f"transformers cannot build the model of config.json of {owner} (from model.path)", AGAIN):
        text_model_of(config_of_json(config))


def config_of_json(content: Mapping[str, object]) -> Any:
    """The transformers config of a config.json's content; transformers writes infinity as {"__float__": "Infinity"}."""
    return transformers.CONFIG_MAPPING[str(content["model_type"])].from_dict(_decoded(content))


def _decoded(value: object) -> Any:
    if isinstance(value, Mapping):
        if value.keys() == {"__float__"}:
            return float(str(value["__float__"]))
        return {name: _decoded(one) for name, one in value.items()}
    return [_decoded(one) for one in value] if isinstance(value, list) else value


def has_text_model(config: Any) -> bool:
    """True if `text_model_of` finds a class for this config, which it then has still to build."""
    text = _text_part(config)
    return _obstacle(config, _causal_class(text), None if text is config else _whole_class(config)) is None


def model_config(folder: Path) -> Any:
    """The folder's config, as transformers reads it. Raises: ConfigError for an unknown architecture."""
    with reading(f"transformers cannot read {folder}/config.json (from model.path)", AGAIN):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def skeleton(text: TextModel) -> Any:
    """The model on no device: every module, no numbers."""
    with torch.device("meta"):
        return text.cls._from_config(copy.deepcopy(text.config))


def decoder_path(model: Any) -> str:
    """The path of the decoder in a causal model: the outermost text model that has the embeddings and not the head.

    `base_model_prefix` does not say it: in Llama 4 it names nothing, in a multimodal class more than the decoder.
    """
    kind, head = type(_text_part(model.config)), model.get_output_embeddings()
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        table = None
    name: str
    for name, module in model.named_modules():
        if name and table is not None and isinstance(module, PreTrainedModel) and isinstance(module.config, kind):
            inside = {id(part) for part in module.modules()}
            if id(table) in inside and id(head) not in inside:
                return name
    prefix: str = model.base_model_prefix
    if isinstance(getattr(model, prefix, None), nn.Module):
        return prefix
    raise ConfigError(
        f"transformers' {type(model).__name__} has no decoder apart from its head, so it cannot be trained here. "
        "Choose another model."
    )


def decoder_of(model: Any) -> Any:
    """The decoder of a causal model, whose output are the hidden states that the head reads."""
    return model.get_submodule(decoder_path(model))


def _without_quantization(config: Any) -> Any:
    plain = copy.deepcopy(config)
    for one in (plain, _text_part(plain)):
        if hasattr(one, "quantization_config"):
            del one.quantization_config
    return plain


def _text_part(config: Any) -> Any:
    """The config of the language model inside a multimodal one, else the config itself."""
    return getattr(config, TEXT, None) or config if TEXT in config.sub_configs else config


def _causal_class(config: Any) -> Any:
    """The causal class for a text config: transformers' choice, else the one in the module of its models, else None."""
    mapping = AutoModelForCausalLM._model_mapping
    found = mapping[type(config)] if type(config) in mapping else None
    if found is not None and found.config_class in (None, type(config)):
        return found
    home = type(config).__module__.replace("configuration_", "modeling_")
    if not home.startswith("transformers."):
        return found
    for name, one in vars(importlib.import_module(home)).items():
        if name.endswith("ForCausalLM") and _is_for(one, config):
            return one
    return found if TEXT not in config.sub_configs else None


def _whole_class(config: Any) -> Any:
    """The class of a whole multimodal checkpoint: the one that its config names, else transformers' choice, or None."""
    for name in config.architectures or ():
        one = getattr(transformers, name, None)
        if _is_for(one, config):
            return one
    mappings = [transformers.AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForCausalLM]
    found = (one._model_mapping[type(config)] for one in mappings if type(config) in one._model_mapping)
    return next((one for one in found if _is_for(one, config)), None)


def _is_for(one: Any, config: Any) -> bool:
    """True for a class of models that are built from just this kind of config."""
    if not (inspect.isclass(one) and issubclass(one, PreTrainedModel)):
        return False
    wanted: Any = one.config_class  # type: ignore[attr-defined]
    return wanted is type(config)


def _obstacle(config: Any, cls: Any, whole: Any) -> str | None:
    """The reason why a checkpoint predicts no text from text alone by either class, or None."""
    if config.is_encoder_decoder or _text_part(config).is_encoder_decoder:
        return "it is an encoder and a decoder"
    if any(str(name).endswith("ForMaskedLM") for name in config.architectures or ()):
        return f"{config.architectures[0]} fills in tokens between others"
    if (setting := _looks_ahead(_text_part(config))) is not None:
        return f"by {setting} in its config.json its attention sees the tokens that are to be predicted"
    if cls is not None:
        return None
    if whole is None:
        return "there is no causal class for it"
    needed = [
        name
        for name, one in inspect.signature(whole.forward).parameters.items()
        if name != "self" and one.default is inspect.Parameter.empty and one.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    if needed:
        return f"{whole.__name__} needs {', '.join(needed)}"
    if not whole.__name__.endswith(("ForConditionalGeneration", "ForCausalLM", "ForVisionText2Text")):
        return f"{whole.__name__} is of another kind"
    return None


def _looks_ahead(config: Any) -> str | None:
    """The setting with which tokens of text attend to later ones, as in a model of embeddings, or None.

    Gemma 4 has `vision` there: only the patches of a picture see each other.
    """
    both = getattr(config, "use_bidirectional_attention", None)
    if both is True or both == "all":
        return "use_bidirectional_attention"
    return "is_causal" if getattr(config, "is_causal", None) is False else None


def _is_tied(config: Any, text: Any, whole: Any) -> bool:
    """True if head and embedding table are one in the whole checkpoint: its class ties them by the outer config.

    A class that holds a causal model leaves it to that one's config.
    """
    stated = getattr(config, "tie_word_embeddings", None)
    if stated is None or not whole._tied_weights_keys:
        return bool(getattr(text, "tie_word_embeddings", False))
    return bool(stated)


def _within_whole(config: Any, whole: Any) -> TextModel:
    return _with_decoder(config, _without_other_parts(whole), whole, is_part=True)


def _with_decoder(config: Any, cls: Any, whole: Any, *, is_part: bool) -> TextModel:
    bare = TextModel(config=config, cls=cls, decoder="", key_mapping={}, sources={}, is_part=is_part, whole=whole)
    with reading(f"transformers cannot build a {config.model_type} model", "Copy config.json from the model's source."):
        model = skeleton(bare)
    return replace(bare, decoder=decoder_path(model))


def _way_into(text: TextModel, stored: Collection[str]) -> Renames:
    return renames_for(skeleton(text), text.decoder, stored)


@cache
def _without_other_parts(whole: Any) -> Any:
    """The class of a whole checkpoint whose models have the decoder and the head alone.

    The other parts are dropped before anything is loaded, so their weights are skipped like those of any unknown name.
    """

    def __init__(self: Any, config: Any) -> None:
        whole.__init__(self, config)
        _drop_other_parts(self)

    fields = {"__init__": __init__, "__module__": whole.__module__, "__doc__": whole.__doc__}
    return type(whole.__name__, (whole,), fields)


def _drop_other_parts(model: Any) -> None:
    head = model.get_output_embeddings()
    kept = [decoder_path(model), *(name for name, module in model.named_modules() if module is head)]
    above = {"", *(path.rpartition(".")[0] for path in kept)}
    for path in sorted(above):
        parent = model.get_submodule(path)
        for name, _part in [*parent.named_children(), *parent.named_parameters(recurse=False)]:
            full = f"{path}.{name}".removeprefix(".")
            if not any(one == full or one.startswith(f"{full}.") for one in kept):
                setattr(parent, name, None)
