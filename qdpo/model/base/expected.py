"""Holds a folder's tensors to its architecture: first by their shapes, without memory, then as they were loaded."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from qdpo.errors import ConfigError
from qdpo.families.stored_form import stored_form
from qdpo.model.base import text_model
from qdpo.model.base.config_values import check_values
from qdpo.model.base.expert_files import expert_fault
from qdpo.model.base.folder import check_config, check_files, read_json
from qdpo.model.base.foreign import reading
from qdpo.model.base.headers import HeaderEntry, tensors_of
from qdpo.model.base.originals import as_plain
from qdpo.model.base.weight_renames import renamed

SOURCE = "Copy or download the model again."
ELEMENTS_PER_BYTE = 2  # of 4-bit weights
ROOM = 4  # a head or tables that the folder stores once, or leaves out
SMALL = 10**7  # parameters that any model may have beyond its weights, as tiny ones in tests
# The matrix that joins a hidden state with the next token's embedding: only layers of multi-token prediction have it.
AHEAD = "eh_proj.weight"
# Masks and frequencies that transformers once stored, and scales of a server's cache of keys and values.
BUFFERS = re.compile(r"(^|[._])(inv_freq|masked_bias|(attn|attention)\.bias|[kv]_scale)$")


def check_folder(folder: Path) -> None:
    """Raises: ConfigError unless the folder is complete and transformers can build the model from it."""
    stored, config = tensors_of(folder, check_files(folder)), read_json(folder / "config.json")
    owner = f"The folder {str(folder)!r}"
    check_values(config, f"{owner} (from model.path)", tensors=len(stored))
    check_config(config, owner, folder.name)
    check_shapes(folder, as_plain(folder, stored))


def check_shapes(folder: Path, stored: dict[str, HeaderEntry]) -> None:
    """Build the text model without memory from config.json, and compare it with the headers.

    Names are compared where both sides have them: transformers renames, splits and joins tensors of many families at
    load, and reports then what is missing.
    Raises: ConfigError if the model cannot be built, is far larger than its weights, or a tensor has another size.
    """
    where = f"transformers cannot build the model of {folder}/config.json (from model.path)"
    with reading(where, "Copy config.json from the model's source."):
        config = text_model.model_config(folder)
        if not text_model.has_text_model(config):
            return  # refused later, by the verb that wants such a model
        text = text_model.found_in(folder, stored)
        model = text_model.skeleton(text)
    check_twice(folder, stored, text.decoder)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    stored_bytes = sum(tensor.end - tensor.start for tensor in stored.values())
    if wanted > ELEMENTS_PER_BYTE * ROOM * stored_bytes + SMALL:
        raise ConfigError(
            f"{folder}/config.json (from model.path) describes a model of {wanted:,} parameters, but the weights take "
            f"only {stored_bytes:,} bytes. {SOURCE}"
        )
    form = stored_form(config.to_dict(), str(folder))
    if form is not None and not form.is_dequantised:
        return
    by_name = {renamed(name, text.key_mapping): entry for name, entry in stored.items()}
    for name, parameter in model.state_dict().items():
        found = by_name.get(name)
        if found is not None and found.elements != parameter.numel():
            raise ConfigError(
                f"{folder} (from model.path): the tensor {found.name!r} has the shape {list(found.shape)}, but "
                f"config.json describes {list(parameter.shape)}. Weights and config.json are of different models, or "
                f"damaged. {SOURCE}"
            )
    if (fault := expert_fault(model, stored, text.key_mapping)) is not None:
        raise ConfigError(f"{folder} (from model.path): {fault}. {SOURCE}")


def check_twice(folder: Path, stored: Collection[str], decoder: str) -> None:
    """Raises: ConfigError if the files hold a tensor of the decoder with and without the decoder's path before it.

    transformers takes both names for the same tensor, and which of them wins is not said.
    """
    twice = sorted(name for name in stored if f"{decoder}.{name}" in stored)
    if twice:
        raise ConfigError(
            f"The weights in {folder} (from model.path) hold {len(twice)} tensors of the text model twice, such as "
            f"{twice[0]!r} and {f'{decoder}.{twice[0]}'!r}, so which is meant is unknown. {SOURCE}"
        )


def check_strays(folder: Path, about: dict[str, Any], decoder: nn.Module, path: str) -> None:
    """Raises: ConfigError if the files hold tensors of the text model that its config does not describe.

    transformers skips them, in a part of a checkpoint as it skips a vision tower: a config of fewer layers, or one
    without biases, gives another model. Tensors of multi-token prediction and buffers of older releases are skipped.
    """
    parts = tuple(f"{path}.{name}." for name, _part in decoder.named_children())
    bare = tuple(part.removeprefix(f"{path}.") for part in parts)  # of files that hold the decoder alone
    strays = [str(name) for name in about.get("unexpected_keys") or () if str(name).startswith((*parts, *bare))]
    ahead = tuple(name.removesuffix(AHEAD) for name in strays if name.endswith(AHEAD))
    names = sorted(name for name in strays if not (name.startswith(ahead) or BUFFERS.search(name)))
    if names:
        raise ConfigError(
            f"The weights in {folder} (from model.path) do not fit its config.json: {len(names)} tensors of the text "
            f"model have no place in it, such as {', '.join(names[:3])}. {SOURCE}"
        )


def check_loaded(folder: Path, about: dict[str, Any]) -> None:
    """Raises: ConfigError if transformers found tensors missing or of another shape, which it fills at random."""
    for kind, what in (("missing_keys", "are missing"), ("mismatched_keys", "have another shape")):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in about.get(kind) or ())
        if names:
            raise ConfigError(
                f"The weights in {folder} (from model.path) do not fit its config.json: {len(names)} tensors {what}, "
                f"such as {', '.join(names[:3])}. {SOURCE}"
            )
    if about.get("error_msgs"):
        raise ConfigError(
            f"The weights in {folder} (from model.path) cannot be read: {about['error_msgs'][0]}. {SOURCE}"
        )
