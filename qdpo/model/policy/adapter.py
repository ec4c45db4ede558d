"""The policy: a LoRA adapter over the frozen base that can be switched on and off, saved and loaded as plain PEFT."""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from torch import Tensor

from qdpo.errors import ConfigError, VerificationError
from qdpo.model.fast.logps import Head
from qdpo.model.policy import lora_fit
from qdpo.model.policy.lora_config import CONFIG, WEIGHTS, check_adapter_folder
from qdpo.model.policy.lora_file import read_tensors
from qdpo.model.policy.peft_names import adapt, peft_names
from qdpo.model.policy.targets import ALL_LINEAR, LoraTargets, lora_targets

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


def new_adapter(
    base: Any,
    *,
    rank: int,
    alpha: float,
    targets: list[str],
    rslora: bool,
    seed: int,
    layers: Sequence[str] | None = None,
) -> Any:
    """A PEFT model with new fp32 LoRA weights (B = 0: the output is the base's), drawn from `seed`.

    `layers` are the names chosen when the run began; without them they are chosen here, by `targets`.
    Raises: ConfigError if one of the targets means no layer that can be trained, or the output head.
    """
    if layers is None:
        layers = list(choose_targets(base, targets).adapted)
    names = peft_names(base, layers)
    return _new(base, _fields(rank, alpha, rslora, names.modules, names.parameters or None), seed, targets)


def adapter_of_0_1(base: Any, *, rank: int, alpha: float, targets: list[str], rslora: bool, seed: int) -> Any:
    """As `new_adapter`, for a run of 0.1, which left the meaning of all-linear to PEFT: experts and routers too."""
    wanted: str | list[str] = ALL_LINEAR if targets == [ALL_LINEAR] else sorted(targets)
    return _new(base, _fields(rank, alpha, rslora, wanted, None), seed, targets)


def _fields(
    rank: int, alpha: float, rslora: bool, modules: str | list[str], parameters: list[str] | None
) -> LoraConfig:
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=modules,
        target_parameters=parameters,
        use_rslora=rslora,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _new(base: Any, config: LoraConfig, seed: int, targets: list[str]) -> Any:
    torch.manual_seed(seed)
    try:
        model = adapt(base, config)
    except lora_fit.MISFITS as error:
        raise ConfigError(f"adapter.targets={'+'.join(targets)} does not fit this model: {error}") from error
    model.eval()
    return model


def choose_targets(base: Any, targets: list[str], decoder: str | None = None) -> LoraTargets:
    """The layers that `adapter.targets` means in `base`, which may be a skeleton.

    Raises: ConfigError where a name is not that of a layer of the text model that can be trained.
    """
    if "lm_head" in targets:
        raise ConfigError("adapter.targets names lm_head, but the head must stay frozen. Remove it from the list.")
    if ALL_LINEAR in targets and len(set(targets)) > 1:
        raise ConfigError(
            f"adapter.targets={'+'.join(targets)}: {ALL_LINEAR} must be the only name. Remove it, or the others."
        )
    if targets != [ALL_LINEAR]:
        lora_fit.check_names(base, targets, "adapter.targets")
    return lora_targets(base, decoder, targets)


def adapted(config: Any, targets: Sequence[str] = (ALL_LINEAR,)) -> dict[str, tuple[int, int]]:
    """The layers that get LoRA in a model of this config, with their inputs and outputs; nothing is loaded."""
    return choose_targets(lora_fit.skeleton(config), list(targets)).adapted


def start_adapter(base: Any, folder: Path) -> Any:
    """A PEFT model that continues the LoRA adapter in `folder`, its weights trainable in fp32.

    Raises: ConfigError if the folder is not a plain LoRA adapter, or not one for this base.
    """
    lora_fit.check_fit(base.config, folder)
    model = lora_fit.attach(base, check_adapter_folder(folder), folder)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.eval()
    _load(model, read_tensors(folder), folder)
    return model


def _load(model: Any, tensors: dict[str, Tensor], origin: Path | str) -> None:
    """Copies saved weights into the adapter in place, and proves that they arrived."""
    expected = lora_fit.saved_state(model)
    odd = sorted(expected.keys() ^ tensors.keys())
    odd = odd or [name for name in sorted(expected) if expected[name].shape != tensors[name].shape]
    if odd:
        raise VerificationError(
            f"The adapter in {origin} does not belong to this model: names or shapes of {len(odd)} tensors differ, "
            f"such as {odd[0]}. Put the file back that belongs to this run."
        )
    set_peft_model_state_dict(model, tensors)
    for name, tensor in lora_fit.saved_state(model).items():
        if not torch.equal(tensor.detach().cpu(), tensors[name].to(tensor.dtype).cpu()):
            raise VerificationError(f"{name} in the model is not what {origin} holds. Please report this.")


def adapter_tensors(policy: Policy) -> dict[str, Tensor]:
    """The adapter's weights under PEFT's file names, on the CPU, contiguous."""
    state = lora_fit.saved_state(policy.peft)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}


def load_adapter_tensors(policy: Policy, tensors: dict[str, Tensor], origin: Path | str = "the checkpoint") -> None:
    """Copies saved weights into the adapter in place. Raises: VerificationError if any does not belong to it."""
    _load(policy.peft, tensors, origin)


def load_adapter_folder(policy: Policy, folder: Path) -> None:
    """Loads a trained adapter folder into the policy's adapter.

    Raises: ConfigError for a damaged folder; VerificationError for an adapter of another shape or scale.
    """
    fields = check_adapter_folder(folder)
    tensors = read_tensors(folder)
    load_adapter_tensors(policy, tensors, folder)
    stated = lora_fit.stated_scales(policy.peft.get_base_model().config, fields, folder)
    for name, scale in lora_fit.scales(policy.peft).items():
        if stated.get(name) != scale:
            raise VerificationError(
                f"{folder / CONFIG} scales {name} by {stated.get(name)}, but the run trained it with {scale:g} "
                "(lora_alpha, use_rslora or a pattern). Put the file back."
            )


def save_adapter(policy: Policy, folder: Path, *, base_name: str, revision: str | None) -> None:
    """Writes a plain PEFT adapter folder, and proves that `PeftModel.from_pretrained` loads it without qdpo.

    `base_name` and `revision` are recorded as the base's name and commit. Lists of names are sorted, so that the same
    adapter always gives the same bytes (PEFT writes a set in hash order).
    Raises: VerificationError if plain PEFT does not read what was trained.
    """
    policy.peft.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": base_name, "revision": revision, "inference_mode": True}
    for name in ("target_modules", "exclude_modules", "target_parameters"):
        if isinstance(config.get(name), list):  # a text is one regular expression
            config[name] = sorted(config[name])
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)
    _check_saved(policy, folder)


def _check_saved(policy: Policy, folder: Path) -> None:
    """Raises: VerificationError unless the folder holds the policy's tensors, and plain PEFT scales them as trained."""
    try:
        check_adapter_folder(folder)
        held = read_tensors(folder)
        again = read_by_peft(policy.peft.get_base_model().config, folder)
    except ConfigError as error:
        raise VerificationError(f"The adapter that was written cannot be read again: {error}") from error
    trained = adapter_tensors(policy)
    same = held.keys() == trained.keys() and all(torch.equal(held[name], trained[name].float()) for name in held)
    names = {name: tensor.shape for name, tensor in lora_fit.saved_state(again).items()}
    loads = names == {name: tensor.shape for name, tensor in trained.items()}
    scales = lora_fit.scales(again) == lora_fit.scales(policy.peft)
    if not (same and loads and scales):
        fault = "its tensors differ" if not same else "names or shapes differ" if not loads else "its scale differs"
        raise VerificationError(
            f"The adapter written to {folder} is not the trained one to plain PEFT: {fault}. The training is kept in "
            "the checkpoints. Please report this."
        )


def read_by_peft(config: Any, folder: Path) -> Any:
    """The adapter as `PeftModel.from_pretrained` reads it over a base without weights.

    Raises: ConfigError if PEFT cannot read it.
    """
    base = lora_fit.skeleton(config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tensors that stay on meta
            return PeftModel.from_pretrained(
                base, str(folder), low_cpu_mem_usage=True, torch_device="cpu", local_files_only=True
            )
    except lora_fit.MISFITS as error:
        raise ConfigError(f"plain PEFT cannot load {folder}: {error}") from error


__all__ = [
    "CONFIG", "WEIGHTS", "Policy", "RowLayout", "adapted", "adapter_of_0_1", "adapter_tensors", "check_adapter_folder",
    "choose_targets", "load_adapter_folder", "load_adapter_tensors", "new_adapter", "read_by_peft", "save_adapter",
    "start_adapter",
]  # fmt: skip
