"""Loads config and frozen base from a local folder."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import logging
from transformers.utils.logging import disable_progress_bar

from qdpo.errors import ConfigError
from qdpo.model.base import quant
from qdpo.model.base.expected import check_loaded, check_strays
from qdpo.model.base.finite import check_files_finite, check_finite
from qdpo.model.base.folder import read_json, weight_files
from qdpo.model.base.foreign import reading
from qdpo.model.base.headers import AGAIN
from qdpo.model.base.text_model import TextModel, text_model
from qdpo.model.base.text_model import model_config as model_config
from qdpo.model.base.tokenizer import load_tokenizer as load_tokenizer
from qdpo.model.base.weight_renames import module_name
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
) -> Any:
    """Loads the frozen base onto its device, in evaluation mode, with no parameter trainable.

    Of a multimodal checkpoint its text model alone is loaded.
    `attention_name` is `sdpa` or `eager`, None for transformers' own choice; `choose_path` of model/policy switches it
    later. A folder that is already 4-bit keeps its own settings.
    Raises: ConfigError for a model that transformers cannot load, or cannot load with that attention.
    """
    compute = DTYPES[dtype]
    arguments = loading(folder, quantization, double_quant=double_quant, dtype=dtype, device=device, announce=announce)
    text = text_model(folder)
    if device.type == "cuda" and quantization != "none":
        check_files_finite(folder, weight_files(folder))
    with reading(f"transformers cannot load the model in {folder}", AGAIN), _unreported(text.is_part):
        model, about = text.cls.from_pretrained(
            folder, config=_as_stored(text, folder), key_mapping=text.key_mapping or None,
            attn_implementation=attention_name, output_loading_info=True, **arguments,
        )  # fmt: skip
    check_loaded(folder, about)
    if text.is_part:
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
    """Without transformers' list of the tensors of other parts, which are skipped on purpose."""
    before = logging.get_verbosity()
    logging.set_verbosity_error() if skips else None
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _as_stored(text: TextModel, folder: Path) -> Any:
    """The text model's config, with the 4-bit settings of a folder that is stored so, for this model's names."""
    config = copy.deepcopy(text.config)
    stored = read_json(folder / "config.json").get("quantization_config")
    if stored is not None:
        left = [module_name(one, text.decoder, text.key_mapping) for one in stored.get("llm_int8_skip_modules") or ()]
        config.quantization_config = {**stored, "llm_int8_skip_modules": left} if left else stored
    return config


def _token_ids_of(config: GenerationConfig) -> GenerationConfig:
    """The config without its settings of search and sampling, which transformers would put in for those left open."""
    return GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def loading(
    folder: Path, quantization: str, *, double_quant: bool, dtype: str, device: torch.device, announce: Say
) -> dict[str, Any]:
    """Arguments for loading a model of any kind with transformers: only this folder's safetensors, no custom code.

    A folder that is already 4-bit keeps its own settings.
    """
    disable_progress_bar()
    arguments: dict[str, Any] = {}
    if "quantization_config" in read_json(folder / "config.json"):
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
