"""The path chosen at the start is the fastest exact one, and what was refused is named with its reason."""

from dataclasses import replace

import pytest
import torch

from qdpo.errors import ConfigError, VerificationError
from qdpo.model.fast import attention
from qdpo.model.fast.attention import PAIRWISE, SCORED, PairSpans
from qdpo.model.policy import forward, probe
from qdpo.model.policy.adapter import Policy, RowLayout
from qdpo.model.policy.choose_attention import choose_path, switch_attention
from tests.model import families
from tests.model.families import MASKED, SEPARATE, SHARED, Families, assert_equal, differentiated, make_policy, tiny_row

PATHS = (
    [(SHARED, family, f"spans, {PAIRWISE}") for family in SHARED]
    + [(families.SCORED, family, f"spans, {SCORED}") for family in families.SCORED]
    + [(MASKED, "falcon", "mask, sdpa"), (MASKED, "stablelm", "mask, sdpa"), (MASKED, "xglm", "mask, eager")]
)


def choose(policy: Policy, wanted: str = "auto", longest: int = 24) -> tuple[str, str]:
    """The chosen path, and what was announced."""
    said: list[str] = []
    return choose_path(policy, tiny_row(), wanted, longest=longest, say=said.append), " ".join(said)


@pytest.mark.parametrize(("group", "family", "path"), PATHS, ids=[family for _, family, _ in PATHS])
def test_the_chosen_path_equals_separate_sequences(group: Families, family: str, path: str) -> None:
    policy, row = make_policy(group[family](), attention_name=None, kept_layers=1), tiny_row()
    found, said = choose(policy)
    assert found == path and policy.shared and "computed once for both" in said
    packed, own = differentiated(policy, row), differentiated(policy, row, "separate")
    if switch_attention(policy, "eager"):
        truth = differentiated(policy, row, "separate")
        assert (packed[0] - truth[0]).abs().max() < 2e-5
        own = truth if group is families.SCORED else own
    assert_equal(packed, own)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3-window", "qwen3"])
def test_a_mask_equals_separate_sequences(family: str, name: str) -> None:
    policy, row = make_policy(SHARED[family](), attention_name=name), tiny_row()
    assert_equal(differentiated(policy, row, "mask"), differentiated(policy, row, "separate"))


@pytest.mark.parametrize("family", families.SCORED)
def test_an_eager_mask_holds_soft_caps_and_sinks(family: str) -> None:
    policy, row = make_policy(families.SCORED[family](), attention_name="eager"), tiny_row()
    assert_equal(differentiated(policy, row, "mask"), differentiated(policy, row, "separate"))


@pytest.mark.parametrize(
    ("family", "path", "reason"),
    [
        ("bloom-alibi", "separate, eager", "no position ids"),
        ("falcon-alibi", "separate, sdpa", "ALiBi"),
        ("gpt-neo-local", "separate, eager", "local"),
        ("llama4", "separate, sdpa", "chunked_attention"),
        ("mamba", "separate, eager", "no position ids"),
    ],
)
def test_sharing_is_refused_where_it_would_be_wrong(family: str, path: str, reason: str) -> None:
    policy = make_policy(SEPARATE[family](), attention_name=None)
    found, said = choose(policy)
    assert found == path and not policy.shared
    assert "its own copy of the prompt" in said and reason in said.partition("refused: ")[2]


def test_refused_paths_are_named() -> None:
    _, said = choose(make_policy(MASKED["stablelm"](), attention_name=None))
    assert "a mask of T×T" in said and "qdpo's own function: the model does not pass the row's layout" in said


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_wanted_function_means_separate_sequences(name: str) -> None:
    policy = make_policy(SHARED["llama"](), attention_name=name)
    assert choose(policy, name)[0] == f"separate, {name}"
    assert not policy.shared and policy.backbone.config._attn_implementation == name


def test_fp16_scores_that_overflow_in_eager_code_are_shared_all_the_same() -> None:
    policy = make_policy(SHARED["llama"](), dtype=torch.float16)
    for layer in policy.backbone.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            module.base_layer.weight.data *= 300
    assert choose(policy)[0] == f"spans, {PAIRWISE}"
    switch_attention(policy, "eager")
    assert not probe.separate_logps(policy, tiny_row()).isfinite().all()


def test_sdpa_is_refused_for_soft_caps() -> None:
    with pytest.raises(ConfigError, match="model.attention=sdpa is not exact .*soft-caps.* Use `auto`"):
        choose(make_policy(families.SCORED["gemma2-softcap"](), attention_name=None), "sdpa")


def test_positions_that_change_with_the_longest_pair_are_not_shared() -> None:
    assert choose(make_policy(SHARED["phi3-longrope"]()), longest=32)[0] == f"spans, {PAIRWISE}"
    found, said = choose(make_policy(SHARED["phi3-longrope"]()), longest=33)
    assert found == "separate, sdpa" and "change beyond 32 tokens" in said


def fault(policy: Policy) -> str | None:
    row = tiny_row()
    truth = probe.separate_logps(policy, row)
    return probe.fault(policy, row, truth, PairSpans(row.spans))


@pytest.mark.parametrize("layout", ["spans", "mask"])
def test_a_leak_of_one_token_is_found(layout: RowLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pair's rejected answer sees one token of its chosen one: nothing that bf16 log-probs would show."""
    name = attention.NAME if layout == "spans" else "sdpa"
    policy = make_policy(SHARED["llama"](), attention_name=name, layout=layout, dtype=torch.bfloat16)
    assert fault(policy) is None
    visible, sequences = forward.visible_keys, PairSpans.sequences

    def leaky_mask(position_T: torch.Tensor, spans: object, window: int | None) -> torch.Tensor:
        mask = visible(position_T, tiny_row().spans, window)
        mask[13:20, 12] = True
        return mask

    def leaky_keys(self: PairSpans, device: torch.device) -> attention.Sequences:
        found = sequences(self, device)
        key_G = found.key_G.clone()
        key_G[13] = 12
        return replace(found, key_G=key_G)

    monkeypatch.setattr(forward, "visible_keys", leaky_mask)
    monkeypatch.setattr(PairSpans, "sequences", leaky_keys)
    assert fault(policy) == "the rejected answer sees the chosen one"


def test_a_state_that_runs_along_the_row_is_a_leak() -> None:
    assert fault(make_policy(SEPARATE["falcon-h1-mamba"]())) == "the rejected answer sees the chosen one"


def test_rounding_of_experts_is_no_leak() -> None:
    """Other tokens change the batch of each expert, hence its rounding, and nothing else."""
    assert fault(make_policy(SHARED["mixtral"](), dtype=torch.bfloat16)) is None


def test_a_wrong_mask_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PairSpans, "mask", lambda self, q, k, w, d: torch.ones(q, k, dtype=torch.bool).tril())
    assert "log-probs differ" in str(fault(make_policy(SHARED["llama"]())))


def test_a_window_longer_than_the_probe_is_compared_with_the_config() -> None:
    config = SHARED["gemma3-window"]()
    config.sliding_window = 1000
    policy = make_policy(config)
    assert fault(policy) is None
    policy.backbone.config.sliding_window = 2000
    assert fault(policy) == "layers request sliding windows 1000+none, but the config names 2000+none"


def test_nothing_exact_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "TOLERANCE", {torch.float32: -1.0})
    with pytest.raises(VerificationError, match="No attention path .*eager: log-probs differ"):
        choose(make_policy(SHARED["llama"]()))
