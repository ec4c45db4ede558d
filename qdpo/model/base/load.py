"""Loads config and frozen base from a local folder."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.logging import disable_progress_bar

from qdpo.errors import ConfigError
from qdpo.families.stored_form import stored_form
from qdpo.model.base import quant
from qdpo.model.base.dequantise import state_dict_of
from qdpo.model.base.expected import check_loaded
from qdpo.model.base.finite import check_files_finite, check_finite
from qdpo.model.base.folder import read_json, weight_files
from qdpo.model.base.foreign import reading
from qdpo.model.base.headers import AGAIN
from qdpo.model.base.tokenizer import load_tokenizer as load_tokenizer
from qdpo.model.device import DTYPES
from qdpo.run.watcher import Say


def model_config(folder: Path) -> Any:
    """The folder's config, as transformers reads it. Raises: ConfigError for an unknown architecture."""
    with reading(f"transformers cannot read the config of {folder}", AGAIN):
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def load_base(
    folder: Path,
    *,
    quantization: str,
    double_quant: bool,
    dtype: str,
    device: torch.device,
    attention_name: str | None,
    announce: Say,
) -> Any:
    """Loads the frozen base onto its device, in evaluation mode, with no parameter trainable.

    `attention_name` is `sdpa` or `eager`, None for transformers' own choice; `choose_path` of model/policy switches it
    later. A folder that is already 4-bit keeps its own settings.
    Raises: ConfigError for a model that transformers cannot load, or cannot load with that attention.
    """
    compute = DTYPES[dtype]
    arguments = loading(folder, quantization, double_quant=double_quant, dtype=dtype, device=device, announce=announce)
    if device.type == "cuda" and quantization != "none":
        check_files_finite(folder, weight_files(folder))
    with reading(f"transformers cannot load the model in {folder}", AGAIN):
        model, about = loaded(AutoModelForCausalLM, attn_implementation=attention_name, **arguments)
    check_loaded(folder, about)
    model.name_or_path = model.config.name_or_path = str(folder)  # unknown to transformers where it got the weights
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


def _token_ids_of(config: GenerationConfig) -> GenerationConfig:
    """The config without its settings of search and sampling, which transformers would put in for those left open."""
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def loading(
    folder: Path, quantization: str, *, double_quant: bool, dtype: str, device: torch.device, announce: Say
) -> dict[str, Any]:
    """Arguments for loading a model of any kind with transformers: only this folder's safetensors, no custom code.

    A folder that is already 4-bit keeps its own settings; one in FP8 or MXFP4 is dequantised weight by weight.
    """
    disable_progress_bar()
    arguments: dict[str, Any] = {"pretrained_model_name_or_path": folder}
    form = stored_form(read_json(folder / "config.json"), f"The folder {str(folder)!r}")
    if form is not None and form.is_dequantised:
        announce(f"weights: stored in {form.words}, dequantised one by one while loading")
        arguments = _dequantised(folder, DTYPES[dtype])
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


def loaded(auto: Any, **arguments: Any) -> tuple[Any, dict[str, Any]]:
    """The model by an Auto class with the arguments of `loading`, and transformers' report of what was missing."""
    config = arguments.get("config")
    if config is not None:  # without a folder an Auto class fails: it looks for code there
        auto = auto._model_mapping[type(config)]
    found: tuple[Any, dict[str, Any]] = auto.from_pretrained(output_loading_info=True, **arguments)
    return found


def _dequantised(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments in the place of the folder of an original in FP8 or MXFP4.

    transformers dequantises as well, but has one quantiser a model: then the rest could not become 4-bit.
    """
    config = model_config(folder)
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    arguments = {"pretrained_model_name_or_path": None, "config": config, "state_dict": state_dict_of(folder, dtype)}
    if (folder / GENERATION_CONFIG_NAME).is_file():
        with reading(f"transformers cannot read {folder / GENERATION_CONFIG_NAME}", AGAIN):
            arguments["generation_config"] = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return arguments


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
