"""Norms and MLPs of the families that write them in their own way: equal to the plain ones, and what they keep."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from qdpo.model.fast import attention, norm
from qdpo.model.policy import install
from qdpo.model.policy.adapter import Policy
from tests.model.families import CPU, SHARED, SIZE, assert_equal, differentiated, make_policy, tiny_row
from tests.model.test_install import kept_bytes

HALF = ["full_attention", "full_attention"]
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 2,
    "num_local_experts": 0, "shared_intermediate_size": 64, "layer_types": ["mamba", "attention"],
}  # fmt: skip
# Config, fast norms and MLPs, and the most bytes that they may keep, as a share of the plain ones' in float32.
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, int], float]] = {
    "glm4": (lambda: hf.Glm4Config(**SIZE, head_dim=8), {"norm": 9, "fused MLP": 2}, 0.83),
    "arcee": (lambda: hf.ArceeConfig(**SIZE), {"norm": 5, "ungated MLP": 2}, 0.88),
    "apertus": (lambda: hf.ApertusConfig(**SIZE), {"norm": 9, "ungated MLP": 2}, 0.72),
    "starcoder2": (SHARED["starcoder2"], {"ungated MLP": 2}, 0.88),
    "nanochat": (lambda: hf.NanoChatConfig(**SIZE), {"norm": 9, "ungated MLP": 2}, 0.90),
    "gpt-neox": (SHARED["gpt-neox"], {"ungated MLP": 2}, 0.87),
    "cohere2": (lambda: hf.Cohere2Config(**SIZE, head_dim=8, layer_types=HALF), {"norm": 3, "gated MLP": 2}, 0.74),
    "cohere": (lambda: hf.CohereConfig(**SIZE, use_qk_norm=True), {"norm": 7, "gated MLP": 2}, 0.72),
    "lfm2": (
        lambda: hf.Lfm2Config(**SIZE, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False),
        {"norm": 7, "gated MLP": 2}, 0.80,
    ),
    "gemma4": (
        lambda: hf.Gemma4TextConfig(
            **SIZE, head_dim=8, global_head_dim=8, layer_types=HALF, hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=160, num_kv_shared_layers=0,
        ),
        {"norm": 18, "gated MLP": 2}, 0.86,
    ),
    "qwen3_5": (lambda: hf.Qwen3_5TextConfig(**SIZE, head_dim=8, **DELTA), {"norm": 8, "gated MLP": 2}, 0.92),
    "granitemoehybrid": (lambda: hf.GraniteMoeHybridConfig(**SIZE, **MAMBA), {"norm": 6, "fused MLP": 2}, 0.84),
}  # fmt: skip
SEPARATE = ("lfm2", "qwen3_5", "granitemoehybrid")


def policy_of(family: str, dtype: torch.dtype = torch.float32) -> Policy:
    if family in SEPARATE:
        return make_policy(FAMILIES[family][0](), attention_name="sdpa", layout="separate", dtype=dtype)
    return make_policy(FAMILIES[family][0](), attention_name=attention.NAME, dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_plain_one_and_keeps_less(family: str) -> None:
    plain, other = policy_of(family), policy_of(family)
    installed = install.install(other.peft, CPU)
    _config, expected, share = FAMILIES[family]
    assert {kind: count for kind, count in installed.fast.items() if kind != "adapter linear"} == expected, installed
    assert not installed.plain
    row = tiny_row()
    assert_equal(differentiated(other, row), differentiated(plain, row))
    assert kept_bytes(other, row) < share * kept_bytes(plain, row)


def test_a_partial_rotary_embedding_keeps_no_more() -> None:
    """Joining the rotated and the other numbers of a head makes a copy that attention keeps instead of its input."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    kept = []
    for share in (1.0, 0.5):
        config = hf.Glm4Config(**SIZE, head_dim=8, rope_parameters={**rope, "partial_rotary_factor": share})
        policy = make_policy(config)
        install.install(policy.peft, CPU)
        kept.append(kept_bytes(policy, tiny_row()))
    assert kept[1] <= kept[0]


@pytest.mark.parametrize("family", ["glm4", "apertus", "qwen3_5"])
def test_in_bf16_it_is_as_near_to_fp32_as_the_plain_one(family: str) -> None:
    """On average over rows: in one row, a rounding more or less can double the distance."""
    exact, plain, other = policy_of(family), policy_of(family, torch.bfloat16), policy_of(family, torch.bfloat16)
    for one, rounded in zip(exact.peft.parameters(), plain.peft.parameters(), strict=True):
        one.data.copy_(rounded.data)
    assert not install.install(other.peft, CPU).plain
    apart = torch.zeros(2)
    for count in (1, 2, 3):
        row = tiny_row(count)
        true, *found = (
            torch.cat([gradient.flatten() for gradient in differentiated(policy, row)[1].values()])
            for policy in (exact, plain, other)
        )
        apart += torch.stack([(gradient - true).norm() / true.norm() for gradient in found])
    assert apart[1] < 1.35 * apart[0] < 0.5


def test_each_form_of_a_norm_is_told_from_the_others() -> None:
    """In bf16 the ways to round are within each other's bounds: the nearest is taken."""
    for kind, weigh in ((LlamaRMSNorm, norm.weigh_after_cast), (Olmo2RMSNorm, norm.weigh_before_cast)):
        module = kind(64).to(torch.bfloat16).requires_grad_(False)
        module.weight.data.normal_()
        chosen: dict[Any, norm.NormForm] = {}
        forward, why = install._fast_norm(module, CPU, torch.bfloat16, chosen)
        assert forward is not None and why is None and [form.weigh for form in chosen.values()] == [weigh]
        x = torch.randn(5, 64).to(torch.bfloat16).requires_grad_()
        assert torch.equal(forward(x), module.forward(x))


class Odd(nn.Module):
    """What a tower of another model may hold: linear layers of its own, and errors of its own."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyError("not made for this")


def test_whatever_a_check_raises_leaves_the_module_plain() -> None:
    policy = make_policy(SHARED["llama"]())
    layer = policy.backbone.layers[0]
    layer.mlp.gate_proj = Odd(layer.mlp.gate_proj)
    layer.input_layernorm.forward = lambda x: 1 / 0
    said = str(install.install(policy.peft, CPU))
    assert "gated MLP LlamaMLP stays plain (KeyError: 'not made for this')" in said
    assert "norm LlamaRMSNorm stays plain (ZeroDivisionError" in said


def test_an_mlp_without_an_adapter_keeps_its_forward() -> None:
    """The first layer's check holds for the kind, but not for a layer that has no adapter there."""
    policy = make_policy(SHARED["llama"]())
    last = policy.backbone.layers[1].mlp
    last.down_proj = last.down_proj.base_layer
    installed = install.install(policy.peft, CPU)
    assert installed.fast["gated MLP"] == 1 and "no plain adapter" in str(installed)
    differentiated(policy, tiny_row())


@pytest.mark.parametrize("family", ["llama", "phi3", "apertus", "lfm2"])
def test_a_trace_installs_what_a_run_does(family: str) -> None:
    """Without numbers, an MLP's form is checked on small layers: one with a factor of its own is refused there too."""
    config = SHARED[family] if family in SHARED else FAMILIES[family][0]
    found = [
        install.install(make_policy(config(), attention_name="sdpa").peft, CPU, weightless=weightless)
        for weightless in (False, True)
    ]
    assert found[0].fast == found[1].fast and not found[1].plain
    policy = make_policy(config(), attention_name="sdpa")
    for layer in policy.backbone.layers:
        mlp = getattr(layer, "mlp", None) or layer.feed_forward
        plain = type(mlp).forward
        mlp.__class__ = type("Odd", (type(mlp),), {"forward": lambda self, x, plain=plain: 1.5 * plain(self, x)})
    said = str(install.install(policy.peft, CPU, weightless=True))
    assert "MLP Odd stays plain (differs by 0." in said, said
