"""The policy: a LoRA adapter over the frozen base that can be switched on and off, saved and loaded as plain PEFT."""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from qdpo.errors import ConfigError, VerificationError
from qdpo.model.fast.logps import Head

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Fields of a LoRA config that this kit does not train or merge; all must be off.
REFUSED = (
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "megatron_config",
    "auto_mapping",
)


# The row layouts for the model: the whole row, with the pairs' spans for our own attention function; the whole row,
# with a T×T mask; or separate sequences of prompt and answer.
RowLayout = Literal["spans", "mask", "separate"]


@dataclass
class Policy:
    """Everything a forward pass needs."""

    peft: Any
    backbone: Any
    head: Head
    device: torch.device
    layout: RowLayout
    tile_mib: int

    @property
    def shared(self) -> bool:
        """True if a prompt is computed once for both of its answers."""
        return self.layout != "separate"

    def adapter_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Trainable parameters by name: fp32 LoRA A and B."""
        return {name: parameter for name, parameter in self.peft.named_parameters() if parameter.requires_grad}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Switches the adapter off, so that the model is the bare base."""
        with self.peft.disable_adapter():
            yield


def new_adapter(base: Any, *, rank: int, alpha: float, targets: list[str], rslora: bool, seed: int) -> Any:
    """A PEFT model with new fp32 LoRA weights (B = 0: the output is the base's), drawn from `seed`.

    Raises: ConfigError if the targets match no layer, or match the output head, which must stay frozen.
    """
    if "lm_head" in targets:
        raise ConfigError("adapter.targets names lm_head, but the head must stay frozen. Remove it from the list.")
    wanted: str | list[str] = "all-linear" if targets == ["all-linear"] else sorted(targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=wanted,
        use_rslora=rslora,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise ConfigError(f"adapter.targets={'+'.join(targets)} does not fit this model: {error}") from error
    model.eval()
    return model


def start_adapter(base: Any, folder: Path) -> Any:
    """A PEFT model that continues the LoRA adapter in `folder`, its weights trainable in fp32.

    Raises: ConfigError if the folder is not a plain LoRA adapter in safetensors.
    """
    check_adapter_folder(folder)
    try:
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=True, local_files_only=True)
    except (ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"adapter.start={folder} does not fit this base: {error}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for module in model.modules():
        for dropout in getattr(module, "lora_dropout", {}).values():
            dropout.p = 0.0
    model.eval()
    return model


def check_adapter_folder(folder: Path) -> dict[str, Any]:
    """The adapter's config, checked strictly before PEFT reads it. Raises: ConfigError naming the problem."""
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"{folder} is not an adapter folder: it has no {CONFIG}. Give the folder that PEFT saved.")
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(
            f"{folder} has no {WEIGHTS}. Only safetensors files are read; save the adapter again as safetensors."
        )
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{folder} holds a {config.get('peft_type')} adapter. Only LoRA adapters can be continued.")
    for field in REFUSED:
        if config.get(field):
            raise ConfigError(f"The adapter in {folder} uses {field}={config[field]}, which is not supported.")
    if config.get("bias", "none") != "none":
        raise ConfigError(f"The adapter in {folder} trains biases (bias={config['bias']}), which is not supported.")
    return config


def adapter_tensors(policy: Policy) -> dict[str, Tensor]:
    """The adapter's weights under PEFT's file names, on the CPU, contiguous."""
    state = get_peft_model_state_dict(policy.peft, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}


def load_adapter_tensors(policy: Policy, tensors: dict[str, Tensor]) -> None:
    """Copies saved weights into the adapter in place. Raises: VerificationError if any is missing or unexpected."""
    expected = adapter_tensors(policy)
    if expected.keys() != tensors.keys():
        odd = sorted(expected.keys() ^ tensors.keys())[:3]
        raise VerificationError(
            f"The saved adapter does not belong to this model: {len(odd)} or more names differ, such as {odd}."
        )
    set_peft_model_state_dict(policy.peft, tensors)


def load_adapter_folder(policy: Policy, folder: Path) -> None:
    """Loads a trained adapter folder into the policy's adapter."""
    check_adapter_folder(folder)
    load_adapter_tensors(policy, load_file(folder / WEIGHTS))


def save_adapter(policy: Policy, folder: Path, *, base_name: str, revision: str | None) -> None:
    """Writes a plain PEFT adapter folder, which `PeftModel.from_pretrained` loads without qdpo.

    `base_name` and `revision` are recorded as the base's name and commit. Lists are sorted, so that the same adapter
    always gives the same bytes (PEFT writes a set in hash order).
    """
    policy.peft.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base_name, "revision": revision, "inference_mode": True}
    config["target_modules"] = sorted(config["target_modules"])
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)
