"""Loads config and frozen base from a local folder."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, logging
from transformers.utils.logging import disable_progress_bar

from qdpo.errors import ConfigError
from qdpo.families.stored_form import settings_of, stored_form
from qdpo.model.base import quant
from qdpo.model.base.dequantise import state_dict_of
from qdpo.model.base.expected import check_loaded, check_strays
from qdpo.model.base.experts import FourBitExperts
from qdpo.model.base.finite import check_files_finite, check_finite
from qdpo.model.base.folder import read_json, weight_files
from qdpo.model.base.foreign import reading
from qdpo.model.base.headers import AGAIN, tensors_of
from qdpo.model.base.text_model import TextModel, skeleton, text_model
from qdpo.model.base.text_model import model_config as model_config
from qdpo.model.base.tokenizer import load_tokenizer as load_tokenizer
from qdpo.model.device import DTYPES
from qdpo.run.watcher import Say


def load_base(
    folder: Path,
    *,
    quantization: str,
    double_quant: bool,
    dtype: str,
    device: torch.device,
    attention_name: str | None,
    announce: Say,
    dense_experts: bool = False,
) -> Any:
    """Loads the frozen base onto its device, in evaluation mode, with no parameter trainable.

    Of a multimodal checkpoint its text model alone is loaded.
    `attention_name` is `sdpa` or `eager`, None for transformers' own choice; `choose_path` of model/policy switches it
    later. A folder that is already 4-bit keeps its own settings. `dense_experts`: stacked experts are not quantised.
    Raises: ConfigError for a model that transformers cannot load, or cannot load with that attention.
    """
    compute = DTYPES[dtype]
    arguments = loading(folder, quantization, double_quant=double_quant, dtype=dtype, device=device, announce=announce)
    text = text_model(folder)
    if device.type == "cuda" and quantization != "none":
        check_files_finite(folder, weight_files(folder))
    experts = None
    if "quantization_config" in arguments and not dense_experts:
        experts = FourBitExperts.of(folder, text, quant.FourBit(quantization, double_quant, compute), announce)
    if experts is not None:
        arguments["state_dict"] = state_dict_of(folder, compute, without=experts.files)
    cls = text.cls if experts is None else experts.without(text.cls)
    with (
        reading(f"transformers cannot load the model in {folder}", AGAIN),
        _unreported(text.is_part or experts is not None),
    ):
        model, about = loaded(
            cls, folder, config=_as_stored(text, folder), key_mapping=text.key_mapping or None,
            attn_implementation=attention_name, **arguments,
        )  # fmt: skip
        if experts is not None:
            about["missing_keys"] = set(about["missing_keys"]) - experts.sources.keys()
            experts.put_into(model, text.cls, device, announce)
    check_loaded(folder, about)
    check_strays(folder, about, model.get_submodule(text.decoder), text.decoder)
    check_finite(model, folder)
    model.requires_grad_(False)
    model.eval()
    model.generation_config = _token_ids_of(model.generation_config)
    layers = quant.settle(model, compute)
    if quantization != "none" and layers == 0:
        raise ConfigError(
            f"No linear layer of {folder} was quantised to 4 bits. Use `model.quantization=none` for this model."
        )
    return model


@contextmanager
def _unreported(skips: bool) -> Iterator[None]:
    """Without transformers' list of the tensors of other parts and of experts, which are skipped on purpose."""
    before = logging.get_verbosity()
    logging.set_verbosity_error() if skips else None
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _as_stored(text: TextModel, folder: Path) -> Any:
    """The text model's config, with the 4-bit settings of a folder that is stored so, for this model's names."""
    config, outer = copy.deepcopy(text.config), read_json(folder / "config.json")
    stored, form = settings_of(outer), stored_form(outer, f"The folder {str(folder)!r}")
    if form is not None and not form.is_dequantised:
        left = kept_plain(text, folder) if text.is_part else stored.get("llm_int8_skip_modules")
        config.quantization_config = {**stored, "llm_int8_skip_modules": left} if left else stored
    return config


def kept_plain(text: TextModel, folder: Path) -> list[str]:
    """Linear layers of a folder's text model, with the head, that its files hold in plain numbers.

    The names in config.json are those of the class, and of the release of transformers, that wrote the folder.
    """
    files = tensors_of(folder, weight_files(folder))
    found = []
    for name, module in skeleton(text).named_modules():
        made_of = text.sources.get(f"{name}.weight", ())
        if isinstance(module, nn.Linear) and not any(f"{one}.absmax" in files for one in made_of):
            found.append(name)
    return found


def _token_ids_of(config: GenerationConfig) -> GenerationConfig:
    """The config without its settings of search and sampling, which transformers would put in for those left open."""
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def loading(
    folder: Path, quantization: str, *, double_quant: bool, dtype: str, device: torch.device, announce: Say
) -> dict[str, Any]:
    """Arguments of `loaded` for a model of any kind: only this folder's safetensors, no custom code.

    A folder that is already 4-bit keeps its own settings; one in FP8 or MXFP4 is dequantised weight by weight.
    transformers can do that too, but has one quantiser a model: then the rest could not become 4-bit.
    """
    disable_progress_bar()
    arguments: dict[str, Any] = {}
    form = stored_form(read_json(folder / "config.json"), f"The folder {str(folder)!r}")
    if form is not None and form.is_dequantised:
        announce(f"weights: stored in {form.words}, dequantised one by one while loading")
        arguments["state_dict"] = state_dict_of(folder, DTYPES[dtype])
    if form is not None and not form.is_dequantised:
        announce("quantisation: as stored in the folder (already 4-bit)")
    elif quantization != "none":
        arguments["quantization_config"] = quant.four_bit_config(quantization, double_quant, DTYPES[dtype])
    return arguments | {
        "dtype": DTYPES[dtype],
        "device_map": {"": device},
        "trust_remote_code": False,
        "local_files_only": True,
        "use_safetensors": True,
    }


def loaded(cls: Any, folder: Path, *, config: Any, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """The model of a folder, and transformers' report of missing tensors, with the arguments of `loading`."""
    if "state_dict" not in arguments:
        found: tuple[Any, dict[str, Any]]
        found = cls.from_pretrained(folder, config=config, output_loading_info=True, **arguments)
        return found
    if (folder / GENERATION_CONFIG_NAME).is_file():
        arguments["generation_config"] = GenerationConfig.from_pretrained(folder, local_files_only=True)
    # Weights from elsewhere than a folder; then transformers knows no name, and writes None into adapters.
    model, about = cls.from_pretrained(None, config=config, output_loading_info=True, **arguments)
    model.name_or_path = model.config.name_or_path = str(folder)
    return model, about


def embeddings_to_host(model: Any) -> None:
    """Moves the embedding table to host memory; looked-up rows are copied to the model's device. Results are the same.

    Raises: ConfigError if the head is the same table.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight.data_ptr() == table.weight.data_ptr():
        raise ConfigError("memory.embeddings=host: this model's head is the same table, and the device needs it.")
    plain, device = table.forward, table.weight.device
    table.to("cpu")

    def forward(token: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = plain(token.cpu())
        return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows

    table.forward = forward
