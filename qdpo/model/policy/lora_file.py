"""Reads adapter_model.safetensors: the A and B of linear layers, finite, and nothing else."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qdpo.errors import ConfigError
from qdpo.model.policy.lora_config import WEIGHTS

PREFIX, A_SUFFIX, B_SUFFIX = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
DTYPES = {"F32", "F16", "BF16"}
AGAIN = "Save or copy the adapter again."


@dataclass(frozen=True)
class TensorForm:
    """A tensor's shape, and its type as safetensors names it."""

    shape: tuple[int, ...]
    dtype: str


def tensor_forms(folder: Path) -> dict[str, TensorForm]:
    """The tensors of an adapter by name, from the file's header alone: for each layer an A and a B that fit.

    Raises: ConfigError for a file that cannot be read, or that holds anything but these.
    """
    file = folder / WEIGHTS
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            forms = {name: TensorForm(tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{file} is not a sound safetensors file: {error}. {AGAIN}") from error
    if not forms:
        raise ConfigError(f"{file} holds no tensors. {AGAIN}")
    for name, form in forms.items():
        _check_name(name, file)
        if form.dtype not in DTYPES:
            raise ConfigError(f"{file} holds {name} as {form.dtype}. Save the adapter in float32, float16 or bfloat16.")
        if len(form.shape) != 2 or 0 in form.shape:
            raise ConfigError(f"{file} holds {name} of the shape {list(form.shape)}, which is not a matrix. {AGAIN}")
    for module in sorted({module_of(name) for name in forms}):
        found = [forms.get(f"{PREFIX}{module}{suffix}") for suffix in (A_SUFFIX, B_SUFFIX)]
        a, b = found
        if a is None or b is None:
            lacks = A_SUFFIX if a is None else B_SUFFIX
            raise ConfigError(f"{file} lacks the tensor {PREFIX}{module}{lacks}. {AGAIN}")
        if a.shape[0] != b.shape[1]:
            raise ConfigError(
                f"{file}: the ranks of A {list(a.shape)} and B {list(b.shape)} of {module} differ. {AGAIN}"
            )
    return forms


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors in float32, by name. Raises: ConfigError, as `tensor_forms`, or for NaN and infinity."""
    names, file = tensor_forms(folder), folder / WEIGHTS
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in names:
                tensors[name] = opened.get_tensor(name).float()
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}. {AGAIN}") from error
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            odd = int((~torch.isfinite(tensor)).sum())
            raise ConfigError(f"{file} holds {name}, of which {odd} numbers are NaN or infinite. {AGAIN}")
    return tensors


def idle_layers(folder: Path) -> list[str]:
    """The layers of which A and B are both 0: the gradient of each is then 0, for ever. Raises: as `read_tensors`."""
    tensors = read_tensors(folder)
    some = {module_of(name) for name, tensor in tensors.items() if tensor.any()}
    return [module for module in dict.fromkeys(map(module_of, tensors)) if module not in some]


def module_of(name: str) -> str:
    """The layer that a tensor of the file belongs to."""
    for suffix in (A_SUFFIX, B_SUFFIX):
        name = name.removesuffix(suffix)
    return name.removeprefix(PREFIX)


def _check_name(name: str, file: Path) -> None:
    if name.startswith(PREFIX) and name.endswith((A_SUFFIX, B_SUFFIX)):
        return
    hint = ""
    if name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_out.weight")):
        hint = (
            " PEFT saves the embeddings where the vocabulary was resized or they were trained. Merge the adapter into "
            "its base with the program that made it, and give the merged model as model.path."
        )
    raise ConfigError(
        f"{file} holds {name}, which is not the A or B of a linear layer. Only those can be trained, merged or "
        f"exported.{hint}"
    )
