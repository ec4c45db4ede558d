"""Scores are those of the model's own logits and of the bare base; recomputing layers changes no gradient."""

import numpy as np
import pytest
import torch
import transformers as hf

from qdpo.errors import VerificationError
from qdpo.model.fast import attention
from qdpo.model.fast.logps import Head, plain_logps
from qdpo.model.policy import probe, recompute
from qdpo.model.policy.adapter import Policy
from tests.model.families import (
    CPU,
    SEPARATE,
    SHARED,
    SIZE,
    build,
    differentiated,
    make_policy,
    pairs,
    scores,
    tiny_row,
)


@pytest.mark.parametrize("family", ["llama", "granite", "cohere", "gemma3-window", "gpt2"])
def test_separate_sequences_equal_the_models_own_logits(family: str) -> None:
    policy = make_policy(SHARED[family](), attention_name="sdpa")
    found = scores(policy, tiny_row(1), "separate")
    pair, expected = pairs(1)[0], []
    for answer in (pair.chosen, pair.rejected):
        ids = torch.from_numpy(np.concatenate([pair.prompt, answer]).astype(np.int64))
        logits = policy.peft(input_ids=ids[None], use_cache=False).logits[0]
        expected.append(plain_logps(logits[len(pair.prompt) - 1 : -1], ids[len(pair.prompt) :]))
    assert torch.allclose(found, torch.cat(expected), atol=2e-5)


def test_an_unknown_head_is_refused() -> None:
    policy = make_policy(SHARED["granite"]())
    row = tiny_row(1)
    assert probe.check_head(policy, policy.peft, row) < 1e-4
    policy.head = Head(policy.head.weight_VD)  # forgets logits_scaling
    with pytest.raises(VerificationError, match="output head"):
        probe.check_head(policy, policy.peft, row)


@pytest.mark.parametrize("kept", [0, 1, "all"])
def test_recomputed_layers_change_no_gradient(kept: int | str) -> None:
    config = SHARED["llama"]
    row = tiny_row()
    plain, other = make_policy(config()), make_policy(config(), kept_layers=kept)
    expected = differentiated(plain, row)[1]
    found = differentiated(other, row)[1]
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layers_of_several_classes_are_recomputed() -> None:
    config = SEPARATE["olmo-hybrid"]
    plain, other = (
        make_policy(config(), kept_layers=kept, layout="separate", attention_name="sdpa") for kept in ("all", 0)
    )
    assert len({type(layer) for layer in recompute.decoder_layers(other.backbone)}) == 2
    expected, found = (differentiated(policy, tiny_row())[1] for policy in (plain, other))
    assert all(torch.equal(found[name], expected[name]) for name in expected) and expected


def test_the_layers_are_as_many_as_the_config_names() -> None:
    """Gemma 3n has a longer list of projections beside two layers."""
    config = hf.Gemma3nTextConfig(
        **SIZE, head_dim=8, layer_types=["full_attention"] * 2, laurel_rank=4, num_kv_shared_layers=0,
        vocab_size_per_layer_input=160, hidden_size_per_layer_input=8, activation_sparsity_pattern=None,
    )  # fmt: skip
    backbone = build(config, "sdpa").model
    assert recompute.decoder_layers(backbone) is backbone.layers


def test_recomputing_saves_fewer_tensors() -> None:
    row = tiny_row()
    saved: dict[int | str, int] = {}
    for kept in (0, "all"):
        policy, sizes = make_policy(SHARED["llama"](), kept_layers=kept), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            scores(policy, row, "spans")
        saved[kept] = sum(sizes)
    assert saved[0] < saved["all"] / 3


def test_adapter_off_is_the_base() -> None:
    policy, row = make_policy(SHARED["llama"]()), tiny_row()
    base = build(SHARED["llama"](), attention.NAME)
    bare = Policy(base, base.base_model, Head.of(base), CPU, "spans", tile_mib=1)
    with torch.no_grad():
        with policy.reference():
            off = scores(policy, row, "spans")
        assert torch.equal(off, scores(bare, row, "spans"))
        assert not torch.allclose(off, scores(policy, row, "spans"), atol=1e-2)
