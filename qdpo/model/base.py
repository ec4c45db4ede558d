"""Chooses device and compute type, and loads tokenizer and frozen base from a local folder."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from qdpo.errors import ConfigError
from qdpo.model import attention, quant

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Announce = Callable[[str], None]


def choose_device(wanted: str, announce: Announce) -> torch.device:
    """The device to train on: among several CUDA devices the one with the most free memory.

    Raises: ConfigError if CUDA is asked for and there is none, saying what would run instead.
    """
    if wanted == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if wanted == "auto":
            return torch.device("cpu")
        raise ConfigError(
            f"model.device=cuda, but torch {torch.__version__} finds no CUDA device{_driver_hint()}. "
            "This machine can run `qdpo run preset=demo`; model.device=cpu forces these settings onto the CPU, slowly."
        )
    count = torch.cuda.device_count()
    free = [torch.cuda.mem_get_info(index)[0] for index in range(count)]
    best = max(range(count), key=lambda index: free[index])
    torch.cuda.set_device(best)
    name = torch.cuda.get_device_properties(best).name
    others = f", the freest of {count} devices" if count > 1 else ""
    announce(f"device: cuda:{best} {name}, {free[best] / 2**30:.1f} GiB free{others}")
    return torch.device("cuda", best)


def repeat_rounding() -> None:
    """Holds CUDA to kernels that give the same bits each time. Must come before the first product.

    cuBLAS repeats itself only with a fixed workspace (NVIDIA's documentation, "Results reproducibility").
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)


def _driver_hint() -> str:
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if found.returncode == 0 and found.stdout.strip():
        return f" although the driver lists {found.stdout.splitlines()[0]!r}: this torch is probably a CPU build"
    return ""


def choose_dtype(wanted: str, device: torch.device, announce: Announce) -> str:
    """Name of the compute type: bf16, fp16 or fp32; what `auto` found is announced."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16"
        announce("compute type: fp16 with loss scaling, because this card has no bf16")
        return "fp16"
    ratio = _cpu_bf16_speed()
    if ratio >= 1:
        announce(f"compute type: bf16 (this CPU multiplies bf16 matrices {ratio:.1f} times as fast as fp32)")
        return "bf16"
    announce(f"compute type: fp32, because this CPU multiplies bf16 matrices {1 / ratio:.1f} times slower than fp32")
    return "fp32"


def _cpu_bf16_speed() -> float:
    """Measured speed of a bf16 matrix product over an fp32 one on this CPU, with its instruction set as configured."""

    def seconds(dtype: torch.dtype) -> float:
        left, right = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        best = float("inf")
        for _attempt in range(5):
            started = time.perf_counter()
            left @ right
            best = min(best, time.perf_counter() - started)
        return best

    return seconds(torch.float32) / seconds(torch.bfloat16)


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer. Raises: ConfigError if it has none."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The model folder {folder} has no usable tokenizer: {error}") from error


def model_config(folder: Path) -> Any:
    """The folder's config, as transformers reads it. Raises: ConfigError for an architecture that it does not know."""
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"transformers cannot read the config of {folder}: {error}") from error


def load_base(
    folder: Path,
    *,
    quantization: str,
    double_quant: bool,
    dtype: str,
    device: torch.device,
    attention_name: str | None,
    announce: Announce,
) -> Any:
    """The frozen base on its device, in evaluation mode, every parameter without gradient.

    `attention_name` is `sdpa` or `eager`, None for transformers' own choice; `model.paths` switches it later. A folder
    that is already 4-bit keeps its own settings.
    Raises: ConfigError for a model that transformers cannot load, or not with that attention.
    """
    attention.register()
    compute = DTYPES[dtype]
    arguments = loading(folder, quantization, double_quant=double_quant, dtype=dtype, device=device, announce=announce)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention_name, **arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"transformers cannot load the model in {folder}: {error}") from error
    model.requires_grad_(False)
    model.eval()
    layers = quant.settle(model, compute)
    if quantization != "none" and layers == 0:
        raise ConfigError(
            f"No linear layer of {folder} became 4-bit. Use model.quantization=none for this architecture."
        )
    return model


def loading(
    folder: Path, quantization: str, *, double_quant: bool, dtype: str, device: torch.device, announce: Announce
) -> dict[str, Any]:
    """What transformers is told when it loads a model of any kind: safetensors of this folder, and no code of its own.

    A folder that is already 4-bit keeps its own settings.
    """
    disable_progress_bar()
    arguments: dict[str, Any] = {}
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
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
    """Moves the embedding table into host memory; looked-up rows go to the model's device. The numbers are the same.

    Raises: ConfigError if the head is the same table.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight.data_ptr() == table.weight.data_ptr():
        raise ConfigError("memory.embeddings=host: this model's head is the same table, which the device needs.")
    plain, device = table.forward, table.weight.device
    table.to("cpu")

    def forward(token: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = plain(token.cpu())
        return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows

    table.forward = forward
