"""Fast parts against their plain twins: numbers, what is kept for the backward pass, and what is not computed twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from qdpo.data.tokens.pack import PairRow
from qdpo.model.base import quant
from qdpo.model.fast import norm, products
from qdpo.model.fast.activation import Activation
from qdpo.model.policy import install, recompute
from qdpo.model.policy.adapter import Policy
from qdpo.train.step.step import row_tensors
from tests.model.families import CPU, SHARED, assert_equal, differentiated, make_policy, scores, tiny_row


def both(family: str, kept: int | str = "all", **layers: Any) -> tuple[Policy, Policy, install.Installed]:
    """The same policy twice, plain and with fast parts."""
    plain, other = make_policy(SHARED[family]()), make_policy(SHARED[family]())
    installed = install.install(other.peft, CPU)
    recompute.Layers(other.backbone, **layers).keep(kept)
    return plain, other, installed


@pytest.mark.parametrize("kept", [0, 1, "all"])
@pytest.mark.parametrize("family", SHARED)
def test_a_whole_step_equals_the_plain_one(family: str, kept: int | str) -> None:
    plain, other, installed = both(family, kept)
    assert installed.fast or family == "gpt2"
    row = tiny_row()
    assert_equal(differentiated(other, row, "spans"), differentiated(plain, row, "spans"))


def test_what_is_recognised() -> None:
    fast_llama = both("llama")[2]
    assert fast_llama.fast == {"adapter linear": 14, "norm": 5, "gated MLP": 2} and not fast_llama.plain
    assert "14 adapter linear, 5 norm, 2 gated MLP checked against their plain twins" in str(fast_llama)
    assert both("phi3")[2].fast == {"adapter linear": 8, "norm": 5, "fused MLP": 2} and not both("gpt2")[2].fast


def test_names_and_the_adapter_switch_stay() -> None:
    plain, other, _ = both("llama")
    assert plain.peft.state_dict().keys() == other.peft.state_dict().keys()
    row = tiny_row()
    with torch.no_grad(), plain.reference(), other.reference():
        assert torch.equal(scores(plain, row, "spans"), scores(other, row, "spans"))


@pytest.mark.parametrize("part", ["linear", "norm", "mlp"])
def test_a_wrong_fast_part_is_not_installed(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if part == "linear":
        right = products.mm_fp32
        monkeypatch.setattr(products, "mm_fp32", lambda left, rest: right(left, rest) * 1.001)
    elif part == "norm":
        monkeypatch.setattr(norm, "WEIGHINGS", (lambda unit, weight: weight * unit * 1.001,))
    else:
        slope = Activation.slope
        monkeypatch.setattr(Activation, "slope", lambda self, x: slope(self, x) * 1.001)
    _, _, installed = both("llama")
    kind = {"linear": "adapter linear", "norm": "norm", "mlp": "gated MLP"}[part]
    assert kind not in installed.fast and "differs by 0.00" in str(installed)


def test_norms_of_one_class_with_and_without_a_weight() -> None:
    """As of Gemma 4's keys and values; the one without is met first."""
    norms = [Gemma4RMSNorm(install.ANY_WIDTH, with_scale=scaled) for scaled in (False, True, False, True)]
    for one in norms[1::2]:
        nn.init.normal_(one.weight).requires_grad_(False)
    chosen: dict[Any, norm.NormForm] = {}
    assert [install._fast_norm(one, CPU, torch.float32, chosen)[1] for one in norms] == [None] * 4


def test_an_activation_of_several_numbers_stays_plain() -> None:
    plain = make_policy(SHARED["llama"]())
    for module in plain.peft.modules():
        if hasattr(module, "act_fn"):
            module.act_fn = nn.Softmax(dim=-1)
    assert "gated MLP LlamaMLP stays plain (differs by" in str(install.install(plain.peft, CPU))


def kept_bytes(policy: Policy, row: Any) -> int:
    """Bytes of distinct storages that the forward pass keeps, without parameters."""
    weights = {p.untyped_storage().data_ptr() for p in policy.peft.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        scores(policy, row, "spans")
    return sum(storage.nbytes() for storage in storages.values())


def test_a_lean_layer_keeps_less() -> None:
    """In numbers a token: 6H + 2Hkv + 2I of a Llama layer, and what attention keeps for itself."""
    config = SHARED["llama"]()
    row = tiny_row()
    tokens, width, inner, key = len(row.token_T), config.hidden_size, config.intermediate_size, 16
    plain, other, _ = both("llama")
    one = SHARED["llama"]()
    one.num_hidden_layers = 1
    single_plain, single = make_policy(one), make_policy(one)
    install.install(single.peft, CPU)
    layer_plain = (kept_bytes(plain, row) - kept_bytes(single_plain, row)) / 4 / tokens
    layer = (kept_bytes(other, row) - kept_bytes(single, row)) / 4 / tokens
    low_rank = 7 * 4 + 2  # x Aᵀ of 7 layers, and a number for each norm
    # Two SDPA calls a pair keep copies of their slices: keys and values repeated to all heads, query, output and lse.
    attention = 4 * 2 * width + 2 * 4
    assert layer <= 6 * width + 2 * key + 2 * inner + low_rank + attention
    assert layer < 0.85 * layer_plain


def test_the_recompute_stops_before_the_last_product(monkeypatch: pytest.MonkeyPatch) -> None:
    _, policy, _ = both("llama", kept=0)
    row, calls = tiny_row(), []
    product = quant.frozen_product
    monkeypatch.setattr(quant, "frozen_product", lambda layer, x: calls.append(layer) or product(layer, x))
    logp = scores(policy, row, "spans")
    forward = len(calls)
    logp.sum().backward()
    # 7 linear layers in each of 2 decoder layers; the recompute leaves out each down_proj.
    assert (forward, len(calls) - forward) == (14, 12)


def test_inputs_on_the_host_change_nothing() -> None:
    plain, other, _ = both("llama", kept=1, host=recompute.HostInputs())
    row = tiny_row()
    packed, fetched = [], []
    pack, unpack = recompute.HostInputs.pack, recompute.HostInputs.unpack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recompute.HostInputs, "pack", lambda s, t, h: packed.append(r := pack(s, t, h)) or r)
        patch.setattr(recompute.HostInputs, "unpack", lambda s, p: fetched.append(r := unpack(s, p)) or r)
        for _attempt in range(2):  # the second row reuses the buffers of the first
            found = differentiated(other, row, "spans")
    assert_equal(found, differentiated(plain, row, "spans"))
    parked = [item for item in packed if not isinstance(item, torch.Tensor)]
    assert len(parked) == len(packed) == 2  # the input of one of two layers, twice
    assert parked[0].whole is parked[1].whole and parked[0].tensor is None


def test_4_bit_and_bf16_are_as_near_to_fp32_as_the_plain_path(settings: dict[str, str]) -> None:
    """Never compared with each other: both with fp32."""
    from qdpo.settings import layered
    from qdpo.train.policy.build import load_policy
    from tests.conftest import arguments
    from tests.train.test_step import make

    _, made = make(settings)
    results: dict[tuple[str, bool], tuple[torch.Tensor, torch.Tensor]] = {}
    for dtype in ("fp32", "bf16"):
        for parts in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                if not parts:
                    patch.setattr(install, "install", lambda peft, device: install.Installed())
                words = arguments(settings, model__quantization="nf4", model__dtype=dtype)
                config = layered.resolve(words).config
                policy = load_policy(
                    config, Path(str(config.model.path)), device=CPU, dtype=dtype, probe_with=made[:2],
                    say=lambda line: None,
                ).policy  # fmt: skip
            torch.manual_seed(2)
            for name, parameter in policy.adapter_parameters().items():
                if "lora_B" in name:
                    parameter.data.normal_(std=0.05)
            logp, by_name = differentiated(policy, row_tensors(PairRow(made), CPU), "spans")
            results[dtype, parts] = logp, torch.cat([g.flatten() for g in by_name.values()])
    exact_logp, exact = results["fp32", False]
    assert (results["fp32", True][0] - exact_logp).abs().max() < 1e-4
    assert (results["fp32", True][1] - exact).norm() < 1e-5 * exact.norm()
    errors = {parts: (results["bf16", parts][1] - exact).norm() / exact.norm() for parts in (True, False)}
    assert errors[True] < 1.2 * errors[False] and errors[False] < 0.5
