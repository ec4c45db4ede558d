"""Builds the policy of a run: base, adapter, checked attention path, and the name of its reference."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qdpo.config import RunConfig
from qdpo.data.pack import PairRow
from qdpo.data.tokens import TokenPair
from qdpo.errors import ConfigError, OutOfMemoryError
from qdpo.model import adapter, attention, base, checkpoint, probe, quant
from qdpo.model.adapter import Policy
from qdpo.model.logps import Head
from qdpo.train import reference
from qdpo.train.record import file_record
from qdpo.train.step import row_tensors

Say = Callable[[str], None]


@dataclass(frozen=True)
class Loaded:
    """The policy with its untouched adapter, and the identity of the reference in the cache."""

    policy: Policy
    reference_name: str
    reference_is_start: bool
    weights: str


def probe_pairs(pairs: Sequence[TokenPair]) -> list[TokenPair]:
    """Two real pairs of about 100 tokens: long enough to show a difference, short enough to cost nothing."""
    return sorted(pairs, key=lambda pair: abs(pair.tokens - 100))[:2]


def load_policy(
    config: RunConfig, folder: Path, *, device: torch.device, dtype: str, probe_with: Sequence[TokenPair], say: Say
) -> Loaded:
    """Loads the base from `folder`, attaches the adapter, chooses the attention path by a check on two real pairs."""
    model, wanted = _load(config, folder, device, dtype, say)
    weights = quant.weights_checksum(model)
    model = _attach(config, model)
    policy = _policy(model, config, device, shared=wanted == attention.NAME)
    row = row_tensors(PairRow(list(probe_with)), device)
    if policy.shared and (refusal := probe.check_shared_prompt(policy, row)) is not None:
        say(f"attention: each answer is computed with its own copy of the prompt, because {refusal.reason}")
        policy.peft.get_base_model().set_attn_implementation(refusal.attention)
        policy.shared = False
    elif policy.shared:
        say("attention: each prompt is computed once for both of its answers (checked against separate sequences)")
    probe.check_head(policy, policy.peft, row)
    layers = checkpoint.recompute_layers(policy.backbone, config.memory.kept_layers)
    if layers:
        say(f"memory: the activations of {layers} layers are recomputed in the backward pass")
    is_start = config.adapter.start is not None and config.adapter.reference != "base"
    name = _reference_name(config, policy, weights, dtype, is_start)
    return Loaded(policy, name, is_start, weights)


def _load(config: RunConfig, folder: Path, device: torch.device, dtype: str, say: Say) -> tuple[Any, str]:
    """The base and the attention function it took: with `auto` the first of ours, sdpa and eager that it accepts."""
    settings = config.model
    names = [attention.NAME, "sdpa", "eager"] if settings.attention == "auto" else [settings.attention]
    for name in names:
        try:
            model = base.load_base(
                folder,
                quantization=settings.quantization,
                double_quant=settings.double_quant,
                dtype=dtype,
                device=device,
                attention_name=name,
                announce=say,
            )
        except base.AttentionRefused as error:
            if name == names[-1]:
                raise
            say(f"attention: this architecture does not take {name} ({error.__cause__}); trying the next")
            continue
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"The base in {folder} does not fit on {device}. Choose a smaller model or preset."
            ) from error
        return model, name
    raise AssertionError("unreachable: the last refusal is raised")


def _attach(config: RunConfig, model: Any) -> Any:
    settings = config.adapter
    if settings.start is not None:
        return adapter.start_adapter(model, Path(settings.start))
    return adapter.new_adapter(
        model,
        rank=settings.rank,
        alpha=settings.alpha,
        targets=settings.targets,
        rslora=settings.rslora,
        seed=config.train.seed,
    )


def _policy(model: Any, config: RunConfig, device: torch.device, *, shared: bool) -> Policy:
    causal = model.get_base_model()
    head_layer = causal.get_output_embeddings()
    if not isinstance(head_layer, torch.nn.Linear) or not head_layer.weight.is_floating_point():
        raise ConfigError(
            f"The output head of {type(causal).__name__} is a {type(head_layer).__name__}; a plain linear layer "
            "in 16 or 32 bit "
            "is needed. Use a base whose head is not quantised."
        )
    return Policy(model, causal.base_model, Head.of(causal), device, shared, config.memory.head_tile_mib)


def _reference_name(config: RunConfig, policy: Policy, weights: str, dtype: str, is_start: bool) -> str:
    start = file_record(Path(str(config.adapter.start)) / adapter.WEIGHTS)["sha256"] if is_start else None
    path = {
        "dtype": dtype,
        "attention": "shared prompt" if policy.shared else policy.backbone.config._attn_implementation,
        "device": policy.device.type if policy.device.type != "cpu" else torch.backends.cpu.get_cpu_capability(),
    }
    return reference.identity(weights, start, path)
