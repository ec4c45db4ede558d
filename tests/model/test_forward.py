"""Shared-prompt rows equal separate sequences; where they would not, the check at the start says so."""

from typing import Any

import numpy as np
import pytest
import torch

from qdpo.data.pack import PairRow
from qdpo.data.tokens import TokenPair
from qdpo.errors import VerificationError
from qdpo.model import adapter, attention, checkpoint, probe
from qdpo.model.adapter import Policy
from qdpo.model.forward import row_scores
from qdpo.model.logps import Head, plain_logps
from qdpo.model.probe import RowTensors
from qdpo.train.step import row_tensors
from tests.model.families import REFUSED, SHARED, build

CPU = torch.device("cpu")


def pairs(count: int = 3) -> list[TokenPair]:
    rng = np.random.default_rng(4)
    sizes = [(9, 4, 7), (3, 8, 2), (12, 1, 5)][:count]
    return [
        TokenPair(*(rng.integers(3, 160, n, dtype=np.int32) for n in size), row) for row, size in enumerate(sizes, 1)
    ]


def make_policy(config: Any, *, kept_layers: int | str = "all", attention_name: str = attention.NAME) -> Policy:
    """A policy whose adapter does something: B is not zero."""
    attention.register()
    model = build(config, attention_name)
    # peft refuses to adapt the linear layers of a Mamba block.
    targets = ["q_proj", "v_proj"] if config.model_type == "falcon_h1" else ["all-linear"]
    peft = adapter.new_adapter(model, rank=4, alpha=8, targets=targets, rslora=False, seed=0)
    torch.manual_seed(2)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    causal = peft.get_base_model()
    policy = Policy(peft, causal.base_model, Head.of(causal), CPU, shared=True, tile_mib=1)
    checkpoint.recompute_layers(policy.backbone, kept_layers)
    return policy


def scores(policy: Policy, row: RowTensors, *, shared: bool) -> torch.Tensor:
    policy.shared = shared
    return row_scores(policy, row.token_T, row.position_T, row.source_N, row.label_N, row.spans, metrics=False).logp


def gradients(policy: Policy, logp: torch.Tensor) -> dict[str, torch.Tensor]:
    policy.peft.zero_grad()
    (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
    return {name: p.grad.clone() for name, p in policy.adapter_parameters().items() if p.grad is not None}


@pytest.mark.parametrize("family", SHARED)
def test_packed_rows_equal_separate_sequences(family: str) -> None:
    policy, row = make_policy(SHARED[family](), kept_layers=1), row_tensors(PairRow(pairs()), CPU)
    packed = scores(policy, row, shared=True)
    packed_gradients = gradients(policy, packed)
    separate = scores(policy, row, shared=False)
    separate_gradients = gradients(policy, separate)
    assert (packed - separate).abs().max() < 2e-5
    largest = max(g.abs().max() for g in separate_gradients.values())
    assert packed_gradients.keys() == separate_gradients.keys() and largest > 0
    for name, gradient in separate_gradients.items():
        assert (packed_gradients[name] - gradient).abs().max() <= 2e-6 * largest, name
    assert probe.check_shared_prompt(policy, row) is None


@pytest.mark.parametrize("family", ["llama", "granite", "cohere", "gemma3-window", "gpt2"])
def test_separate_sequences_equal_the_models_own_logits(family: str) -> None:
    policy = make_policy(SHARED[family](), attention_name="sdpa")
    found = scores(policy, row_tensors(PairRow(pairs(1)), CPU), shared=False)
    pair, expected = pairs(1)[0], []
    for answer in (pair.chosen, pair.rejected):
        ids = torch.from_numpy(np.concatenate([pair.prompt, answer]).astype(np.int64))
        logits = policy.peft(input_ids=ids[None], use_cache=False).logits[0]
        expected.append(plain_logps(logits[len(pair.prompt) - 1 : -1], ids[len(pair.prompt) :]))
    assert torch.allclose(found, torch.cat(expected), atol=2e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_sharing_is_refused_where_it_would_be_wrong(family: str) -> None:
    policy = make_policy(
        REFUSED[family](),
        attention_name="eager" if family == "bloom-alibi" else "sdpa" if family == "falcon" else attention.NAME,
    )
    refusal = probe.check_shared_prompt(policy, row_tensors(PairRow(pairs(2)), CPU))
    leaks = family in ("falcon", "falcon-h1-mamba")
    assert refusal is not None and ("sees the chosen one" if leaks else "does not take the layout") in refusal.reason


def test_a_wrong_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, row = make_policy(SHARED["llama"]()), row_tensors(PairRow(pairs(2)), CPU)
    monkeypatch.setattr(attention.PairSpans, "mask", lambda self, q, k, w, d: torch.ones(q, k, dtype=torch.bool))
    assert "differ" in str(probe.check_shared_prompt(policy, row))


def test_an_unknown_head_is_refused() -> None:
    policy = make_policy(SHARED["granite"]())
    row = row_tensors(PairRow(pairs(1)), CPU)
    assert probe.check_head(policy, policy.peft, row) < 1e-4
    policy.head = Head(policy.head.weight_VD)  # forgets logits_scaling
    with pytest.raises(VerificationError, match="output head"):
        probe.check_head(policy, policy.peft, row)


@pytest.mark.parametrize("kept", [0, 1, "all"])
def test_recomputed_layers_change_no_gradient(kept: int | str) -> None:
    config = SHARED["llama"]
    row = row_tensors(PairRow(pairs()), CPU)
    plain, other = make_policy(config()), make_policy(config(), kept_layers=kept)
    expected = gradients(plain, scores(plain, row, shared=True))
    found = gradients(other, scores(other, row, shared=True))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_recomputing_saves_fewer_tensors() -> None:
    row = row_tensors(PairRow(pairs()), CPU)
    saved: dict[int | str, int] = {}
    for kept in (0, "all"):
        policy, sizes = make_policy(SHARED["llama"](), kept_layers=kept), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            scores(policy, row, shared=True)
        saved[kept] = sum(sizes)
    assert saved[0] < saved["all"] / 3


def test_adapter_off_is_the_base() -> None:
    policy, row = make_policy(SHARED["llama"]()), row_tensors(PairRow(pairs()), CPU)
    base = build(SHARED["llama"](), attention.NAME)
    bare = Policy(base, base.base_model, Head.of(base), CPU, shared=True, tile_mib=1)
    with torch.no_grad():
        with policy.reference():
            off = scores(policy, row, shared=True)
        assert torch.equal(off, scores(bare, row, shared=True))
        assert not torch.allclose(off, scores(policy, row, shared=True), atol=1e-2)
