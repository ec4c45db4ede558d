"""Builds a run's policy: base, adapter, verified attention path, and the name of its reference."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qdpo.data.tokens.pack import PairRow
from qdpo.data.tokens.sieve import TokenPair
from qdpo.errors import ConfigError, OutOfMemoryError, VerificationError
from qdpo.families.forward_values import forward_digest
from qdpo.model.base import quant
from qdpo.model.base.experts import stack_marks
from qdpo.model.base.load import embeddings_to_host, load_base
from qdpo.model.base.text_model import decoder_of
from qdpo.model.fast.logps import Head
from qdpo.model.policy import adapter, choose_attention, install, kernels, probe, recompute
from qdpo.model.policy.adapter import Policy
from qdpo.model.policy.lora_config import adapts_experts
from qdpo.run.record import FourBitMark, file_record
from qdpo.run.watcher import Say
from qdpo.settings.schema import RunConfig
from qdpo.train.policy import reference_cache
from qdpo.train.step.feed import row_tensors


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """The policy with its untouched adapter, and the identity of its reference in the cache."""

    policy: Policy
    layers: recompute.Layers
    reference_name: str
    older_name: str
    """The name that version 0.1.0 gave it, from the weights alone: models of another config may have shared it."""
    reference_is_start: bool
    weights: str
    marks: dict[str, FourBitMark]
    """For each 4-bit layer, the mark that proves it was reproduced exactly."""


def probe_pairs(pairs: Sequence[TokenPair]) -> list[TokenPair]:
    """Two real pairs truncated to about 100 tokens: enough to show a difference, too few to cost anything."""
    found = sorted(pairs, key=lambda pair: abs(pair.tokens - 100))[:2]
    return [TokenPair(pair.prompt[-64:], pair.chosen[:64], pair.rejected[:64], pair.row) for pair in found]


def load_policy(
    config: RunConfig,
    folder: Path,
    *,
    device: torch.device,
    dtype: str,
    probe_with: Sequence[TokenPair],
    say: Say,
    layers: Sequence[str] | None = None,
    of_0_1: bool = False,
    dense_experts: bool = False,
) -> Loaded:
    """Loads the base from `folder` and builds the policy from it; for `layers` and `of_0_1` see `make_policy`.

    `dense_experts`: as a run before 0.2 had them.
    """
    model = base_of(config, folder, device, dtype, say, dense_experts=dense_experts)
    return make_policy(
        config, model, device=device, dtype=dtype, probe_with=probe_with, say=say, layers=layers, of_0_1=of_0_1
    )


def make_policy(
    config: RunConfig,
    model: Any,
    *,
    device: torch.device,
    dtype: str,
    probe_with: Sequence[TokenPair],
    say: Say,
    layers: Sequence[str] | None = None,
    of_0_1: bool = False,
) -> Loaded:
    """Attaches the adapter to a base, selects the attention path by a check on two real pairs, installs fast parts.

    A new adapter gets the recorded `layers`, or those that adapter.targets means; in a run `of_0_1` as PEFT reads it.
    """
    weights, marks = quant.weights_checksum(model), quant.layer_marks(model) | stack_marks(model)
    if config.memory.embeddings == "host":
        embeddings_to_host(model)
    model = _attach(config, model, layers, of_0_1=of_0_1)
    check_base_unchanged(model, weights)
    policy = _policy(model, config, device)
    row = row_tensors(PairRow(list(probe_with)), device)
    path = choose_attention.choose_path(policy, row, config.model.attention, longest=config.data.max_tokens, say=say)
    probe.check_head(policy, policy.peft, row)
    use = kernels.kernels_of(policy.backbone)
    if (line := kernels.announcement(use, device)) is not None:
        say(line)
    if config.train.compile:
        say("compile: kept layers are compiled at their first row, which takes a while (fast parts are off)")
    else:
        say(f"fast parts: {install.install(policy.peft, device)}")
    offload = config.memory.offload is True and device.type == "cuda"
    host = recompute.HostInputs() if offload else None
    blocks = recompute.Layers(policy.backbone, host=host, compiled=config.train.compile)
    recomputed = blocks.keep(kept_layers(config))
    if recomputed:
        where = ", with their inputs in host memory" if offload else ""
        say(f"memory: the activations of {recomputed} of {len(blocks)} layers are recomputed{where}")
    is_start = config.adapter.start is not None and config.adapter.reference != "base"
    name, older = _reference_names(config, policy, path, weights, dtype, is_start, use)
    return Loaded(
        policy=policy, layers=blocks, reference_name=name, older_name=older, reference_is_start=is_start,
        weights=weights, marks=marks,
    )  # fmt: skip


def kept_layers(config: RunConfig) -> int | str:
    """memory.kept_layers; 0 while it is still `auto`, as when a run is scored again."""
    return 0 if config.memory.kept_layers == "auto" else config.memory.kept_layers


def base_of(
    config: RunConfig, folder: Path, device: torch.device, dtype: str, say: Say, *, dense_experts: bool = False
) -> Any:
    """The frozen base that the model.* settings describe. Raises: ConfigError; OutOfMemoryError if it does not fit."""
    settings, start = config.model, config.adapter.start
    if start is not None and settings.quantization != "none" and adapts_experts(Path(start)):
        if not dense_experts:
            say(f"experts: they stay in 16 bits, since the adapter in {start} adapts them; forecasts count 4 bits")
        dense_experts = True
    try:
        return load_base(
            folder,
            quantization=settings.quantization,
            double_quant=settings.double_quant,
            dtype=dtype,
            device=device,
            attention_name=None if settings.attention == "auto" else settings.attention,
            announce=say,
            dense_experts=dense_experts,
        )
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"The base in {folder} does not fit on {device}. Choose a smaller model or preset."
        ) from error


def _attach(config: RunConfig, model: Any, layers: Sequence[str] | None, *, of_0_1: bool) -> Any:
    settings, seed = config.adapter, config.train.seed
    if settings.start is not None:
        return adapter.start_adapter(model, Path(settings.start))
    if of_0_1:
        return adapter.adapter_of_0_1(
            model, rank=settings.rank, alpha=settings.alpha, targets=settings.targets, rslora=settings.rslora, seed=seed
        )
    return adapter.new_adapter(
        model,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=settings.targets,
        rslora=settings.rslora,
        seed=seed,
        layers=layers,
    )


def check_base_unchanged(model: Any, weights: str) -> None:
    """Raises: VerificationError if the base inside a PEFT model has another checksum than before the adapter."""
    if quant.weights_checksum(model.get_base_model()) != weights:
        raise VerificationError(
            "Attaching the adapter has changed the base's weights, so the model with its adapter off would not be the "
            "reference. Nothing was trained or cached. Please report this, with the adapter's adapter_config.json."
        )


def _policy(model: Any, config: RunConfig, device: torch.device) -> Policy:
    causal = model.get_base_model()
    head_layer = causal.get_output_embeddings()
    if not isinstance(head_layer, torch.nn.Linear) or not head_layer.weight.is_floating_point():
        raise ConfigError(
            f"The output head of {type(causal).__name__} is a {type(head_layer).__name__}, but a plain linear layer "
            "in 16 or 32 bits is needed. Use a base whose head is not quantised."
        )
    return Policy(model, decoder_of(causal), Head.of(causal), device, "separate", config.memory.head_tile_mib)


def adapter_identity(folder: Path) -> str:
    """sha256 over the adapter's weights and the fields that say how they are used."""
    fields = adapter.check_adapter_folder(folder)
    meaning = {name: value for name, value in fields.items() if name not in ("base_model_name_or_path", "revision")}
    weights = file_record(folder / adapter.WEIGHTS).sha256
    return hashlib.sha256(f"{weights} {json.dumps(meaning, sort_keys=True)}".encode()).hexdigest()


def _reference_names(
    config: RunConfig,
    policy: Policy,
    attention: str,
    weights: str,
    dtype: str,
    is_start: bool,
    use: kernels.KernelUse,
) -> tuple[str, str]:
    """The name of the reference, and the one that version 0.1.0 gave it."""
    start = adapter_identity(Path(str(config.adapter.start))) if is_start else None
    path = {
        "dtype": dtype,
        "attention": attention,
        "device": policy.device.type if policy.device.type != "cpu" else torch.backends.cpu.get_cpu_capability(),
    }
    now = {**path, "config": forward_digest(policy.peft.get_base_model().config.to_dict())}
    if use.used:  # other rounding than PyTorch's own code, as with another attention path
        now["kernels"] = "+".join(sorted(use.used))
    return reference_cache.identity(weights, start, now), reference_cache.identity(weights, start, path)
