"""Recurrent layers over rows of pairs: both answers continue from their prompt's state, and see nothing else."""

import inspect
import sys
import types
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.nemotron_h import modeling_nemotron_h

from qdpo.data.tokens.pack import PairRow
from qdpo.data.tokens.sieve import TokenPair
from qdpo.model.fast import recurrent, row_scan
from qdpo.model.fast.attention import PairSpans
from qdpo.model.generate.generate import complete
from qdpo.model.policy import probe, recurrent_rows
from qdpo.model.policy.adapter import Policy
from qdpo.model.policy.choose_attention import choose_path
from qdpo.model.policy.recompute import Layers
from qdpo.model.policy.row import RowTensors
from qdpo.train.step.feed import row_tensors
from tests.matrix.configs import LINEAR, TEXT, TINY, config_of
from tests.model.families import CPU, Scored, differentiated, make_policy, scores, tiny_row

EXACT = (
    "qwen3_5 (text)", "qwen3_5_moe (text)", "qwen3_next", "olmo_hybrid", "kimi_linear", "bailing_hybrid", "lfm2",
    "lfm2_moe", "lfm3", "granitemoehybrid", "nemotron_h", "falcon_h1", "bamba",
)  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "minimax": {"layer_types": LINEAR},
}
# One of each arithmetic: gated delta rule, Kimi's, a convolution alone, Mamba 2.
KINDS = ("qwen3_5 (text)", "kimi_linear", "lfm2", "nemotron_h")


def config_named(name: str, **changes: Any) -> Any:
    if name in TEXT:
        return config_of(TEXT[name].model_type, TINY, {**TEXT[name].changes(TINY), **changes}, **IDS)
    return config_of(name, TINY, {**OTHERS[name], **changes}, **IDS)


def policy_of(
    name: str, *, kept_layers: int | str = 1, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[Policy, str]:
    """A tiny policy after the choice of its path, with the line that was said."""
    torch.manual_seed(3)
    config, said = config_named(name, **changes), []
    policy = make_policy(config, attention_name=None, kept_layers="all", dtype=dtype)
    choose_path(policy, tiny_row(), "auto", longest=1024, say=said.append)
    Layers(policy.backbone).keep(kept_layers)
    return policy, " ".join(said)


def row_of(*sizes: tuple[int, int, int]) -> RowTensors:
    rng = np.random.default_rng(4)
    pairs = [
        TokenPair(*(rng.integers(3, 160, length, dtype=np.int32) for length in size), number)
        for number, size in enumerate(sizes, 1)
    ]
    return row_tensors(PairRow(pairs), CPU)


def farthest(found: Scored, expected: Scored) -> tuple[float, float]:
    """The largest difference of a log-prob in nats, and of a gradient as a share of the largest."""
    largest = max(one.abs().max() for one in expected[1].values())
    assert found[1].keys() == expected[1].keys() and largest > 0
    shares = [(found[1][name] - one).abs().max() / largest for name, one in expected[1].items()]
    return float((found[0] - expected[0]).abs().max()), float(max(shares))


@pytest.mark.parametrize("name", EXACT)
def test_a_row_equals_its_sequences_alone(name: str) -> None:
    policy, said = policy_of(name)
    assert policy.shared and row_scan.LOOP in said, said
    row = row_of((70, 45, 37), (2, 20, 52), (300, 60, 90))
    logp, gradient = farthest(differentiated(policy, row), differentiated(policy, row, "separate"))
    assert logp <= 3e-5 and gradient <= 3e-5


@pytest.mark.parametrize(("name", "kind"), [("qwen3_5 (text)", "linear_attention"), ("lfm2", "conv")])
def test_a_model_without_attention_is_shared_too(name: str, kind: str) -> None:
    """No layer asks for a sliding window, and the config names none."""
    policy, said = policy_of(name, layer_types=[kind] * 4)
    assert policy.shared and "two SDPA calls" not in said, said
    row = row_of((70, 45, 37), (2, 20, 52))
    logp, gradient = farthest(differentiated(policy, row), differentiated(policy, row, "separate"))
    assert logp <= 3e-5 and gradient <= 3e-5


def test_a_layer_whose_forward_was_replaced_is_left_alone() -> None:
    """As hooks of other libraries do; layers of one kind are checked once, on the first."""
    torch.manual_seed(3)
    config, said = config_named("nemotron_h", layer_types=["linear_attention", "full_attention"] * 2), []
    policy = make_policy(config, attention_name=None)
    mixer = [one for one in policy.backbone.modules() if recurrent.has_recurrence(type(one))][-1]
    plain = mixer.forward
    mixer.forward = lambda hidden_states, **others: plain(hidden_states * 2, **others)
    choose_path(policy, tiny_row(), "auto", longest=1024, say=said.append)
    assert not policy.shared and "has been replaced" in said[0], said


@pytest.mark.parametrize(("name", "reason"), [("jamba", "linear_attention"), ("minimax", "linear_attention")])
def test_layers_of_another_form_are_computed_alone(name: str, reason: str) -> None:
    policy, said = policy_of(name)
    assert not policy.shared and f"the model has layers of {reason}" in said


LENGTHS = st.tuples(
    st.sampled_from([1, 2, 3, 4, 17, 63, 64, 65, 150]), st.sampled_from([1, 2, 5, 64, 70]), st.integers(1, 30)
)


@cache
def shared_policy(name: str) -> Policy:
    return policy_of(name)[0]


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@pytest.mark.parametrize("name", KINDS)
@given(sizes=st.lists(LENGTHS, min_size=1, max_size=6))
def test_any_spans(name: str, sizes: list[tuple[int, int, int]]) -> None:
    any_kind = shared_policy(name)
    row = row_of(*sizes)
    found = differentiated(any_kind, row, "spans")
    logp, gradient = farthest(found, differentiated(any_kind, row, "separate"))
    assert logp <= 1e-4 and gradient <= 1e-4, sizes


def _without_state(scan: Any, spans: PairSpans) -> Tensor:
    """Every answer begins with a state of zero."""
    run = scan.run
    scan.run = lambda parts, _state, **more: run(parts, None, **more)
    return right_loop(scan, spans)


def _one_sequence(scan: Any, _spans: PairSpans) -> Tensor:
    """The whole row is one sequence: the rejected answer sees the chosen one, a pair the pair before it."""
    return scan.run(scan.parts.values(), None)[0]


def _no_gradient(scan: Any, spans: PairSpans) -> Tensor:
    """The answers teach their prompt nothing through its state."""
    run = scan.run
    scan.run = lambda parts, state, **more: run(parts, None if state is None else state.detach(), **more)
    return right_loop(scan, spans)


def _conv_in_one(plain: Callable[..., Tensor], _spans: PairSpans, x: Tensor, weight: Tensor, **others: Any) -> Tensor:
    return plain(x, weight, **others)


def _conv_shifted(plain: Callable[..., Tensor], spans: PairSpans, x: Tensor, weight: Tensor, **others: Any) -> Tensor:
    return right_convolution(plain, spans, x.roll(1, 2), weight, **others)


def _conv_without_taps(
    plain: Callable[..., Tensor], spans: PairSpans, x: Tensor, weight: Tensor, **others: Any
) -> Tensor:
    """Every answer begins with zeros in place of its prompt's taps."""
    lengths = [length for span in spans for length in (span.prompt, span.chosen, span.rejected)]
    return torch.cat([plain(part, weight, **others) for part in torch.split(x, lengths, 2)], 2)


right_loop, right_convolution = row_scan.loop, row_scan.convolution


def mutate(monkeypatch: pytest.MonkeyPatch, place: str, wrong: Callable[..., Tensor]) -> None:
    if place == "loop":
        monkeypatch.setitem(row_scan.WAYS, row_scan.LOOP, wrong)
    else:
        monkeypatch.setattr(row_scan, place, wrong)


MUTATIONS = [
    ("loop", _without_state), ("loop", _one_sequence), ("convolution", _conv_in_one),
    ("convolution", _conv_shifted), ("convolution", _conv_without_taps),
]  # fmt: skip


@pytest.mark.parametrize(("place", "wrong"), MUTATIONS, ids=[wrong.__name__ for _, wrong in MUTATIONS])
@pytest.mark.parametrize("name", ["qwen3_5 (text)", "nemotron_h"])
def test_a_wrong_row_is_never_chosen(
    name: str, place: str, wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch, place, wrong)
    policy, said = policy_of(name)
    assert not policy.shared and "differs by" in said, said


@pytest.mark.parametrize("wrong", [_without_state, _no_gradient])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["qwen3_5 (text)", "nemotron_h"])
def test_a_state_that_is_lost_is_refused_in_16_bits_too(
    name: str, dtype: torch.dtype, wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole gradient, what a state carries is less than the rounding of 16 bits."""
    mutate(monkeypatch, "loop", wrong)
    policy, said = policy_of(name, dtype=dtype)
    assert not policy.shared and "differs by" in said, said


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", KINDS)
def test_rows_are_shared_in_16_bits(name: str, dtype: torch.dtype) -> None:
    policy, said = policy_of(name, dtype=dtype)
    assert policy.shared, said


@pytest.mark.parametrize(("place", "wrong"), MUTATIONS, ids=[wrong.__name__ for _, wrong in MUTATIONS])
def test_the_probe_sees_what_the_layers_check_would_miss(
    place: str, wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of a layer is one guard, log-probs and leaks of the whole model are another."""
    mutate(monkeypatch, place, wrong)
    monkeypatch.setattr(recurrent_rows, "_compare", lambda *_: None)
    policy, said = policy_of("qwen3_5 (text)")
    assert not policy.shared and ("sees" in said or "log-probs differ" in said), said


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule token by token, with the arguments of flash-linear-attention's kernel."""
    assert not chunk_size % 8 and use_qk_l2norm_in_kernel and q.shape[0] == 1
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    q, k = (torch.nn.functional.normalize(x.float(), dim=-1, eps=1e-6) for x in (q, k))
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    outputs, states = [], []
    for number, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        state = v.new_zeros(v.shape[2], k.shape[3], v.shape[3]) if initial_state is None else initial_state[number]
        for t in range(start, end):
            state = state * g[0, t].exp()[:, None, None]
            change = beta[0, t][:, None] * (v[0, t].float() - torch.einsum("hkv,hk->hv", state, k[0, t]))
            state = state + torch.einsum("hk,hv->hkv", k[0, t], change)
            outputs.append(torch.einsum("hkv,hk->hv", state, q[0, t]) * q.shape[-1] ** -0.5)
        states.append(state)
    return torch.stack(outputs)[None].to(v.dtype), torch.stack(states) if output_final_state else None


@pytest.mark.parametrize("way", [row_scan.VARLEN, row_scan.BATCH], ids=["varlen", "batch"])
def test_two_calls_a_layer_equal_the_loop(way: str) -> None:
    """A kernel computes all prompts and then all answers; here in PyTorch, with the kernel's own arguments."""
    policy, _ = policy_of("qwen3_5 (text)", kept_layers="all")
    row = row_of((70, 5, 7), (2, 20, 12), (1, 1, 1), (9, 3, 30))
    expected = differentiated(policy, row, "spans")
    calls: list[int] = []
    for module in policy.backbone.modules():
        if isinstance(getattr(module, "forward", None), recurrent.RowForward):
            _, functions = recurrent._places(type(module))
            name = next(name for name, function in functions.items() if recurrent.scan_names(function) is not None)
            torch_scan = functions[name]
            kernel = delta_rule if way == row_scan.VARLEN else torch_scan

            def counted(*args: Any, kernel: Any = kernel, **kwargs: Any) -> Any:
                """As transformers calls a kernel: what it does not know by name is left out."""
                calls.append(1)
                known = inspect.signature(kernel).parameters
                return kernel(*args, **{name: value for name, value in kwargs.items() if name in known})

            counted.__signature__ = inspect.signature(torch_scan)  # type: ignore[attr-defined]
            module.forward.way = way
            module.forward._row.__func__.__globals__[name] = module.forward._scan(
                counted, recurrent.scan_names(torch_scan), cap=False
            )
    logp, gradient = farthest(differentiated(policy, row, "spans"), expected)
    assert logp <= 3e-4 and gradient <= 3e-4  # token by token, not in chunks
    assert len(calls) == 2 * LINEAR.count("linear_attention")


def test_mamba_in_two_batches_equals_the_loop() -> None:
    policy, _ = policy_of("nemotron_h")
    row = row_of((70, 5, 7), (2, 20, 12), (1, 1, 1))
    expected = differentiated(policy, row, "spans")
    for module in policy.backbone.modules():
        if isinstance(getattr(module, "forward", None), recurrent.RowForward):
            module.forward.way = row_scan.BATCH
    logp, gradient = farthest(differentiated(policy, row, "spans"), expected)
    assert logp <= 3e-5 and gradient <= 3e-5


def test_a_mamba_kernel_that_knows_cu_seqlens_gets_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """mamba-ssm from 2.0 on takes `cu_seqlens` for states that it returns, and mixes the sequences all the same."""
    plain = modeling_nemotron_h.mamba2_chunk_scan.__wrapped__

    def mamba_chunk_scan_combined(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        return_varlen_states: bool = False,
    ) -> Any:
        assert z is None and seq_idx is None and not return_varlen_states
        assert initial_states is None or len(initial_states) == len(x)
        return plain(x, dt, A, B, C, chunk_size, D, dt_bias, initial_states, dt_softplus, dt_limit, return_final_states)

    package = types.ModuleType("mamba_ssm")
    package.mamba_chunk_scan_combined = mamba_chunk_scan_combined  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mamba_ssm", package)
    chosen = use_kernel_func_from_hub_with_fallback("mamba_chunk_scan_combined", "mamba_ssm")(plain)
    monkeypatch.setattr(modeling_nemotron_h, "mamba2_chunk_scan", chosen)
    assert recurrent.kernel_of(chosen) is mamba_chunk_scan_combined
    policy, said = policy_of("nemotron_h")
    assert policy.shared and row_scan.BATCH in said, said
    row = row_of((70, 5, 7), (2, 20, 12), (1, 1, 1))
    logp, gradient = farthest(differentiated(policy, row), differentiated(policy, row, "separate"))
    assert logp <= 3e-5 and gradient <= 3e-5


def test_what_a_block_keeps_does_not_grow_with_its_chunks() -> None:
    """Of a recurrent layer stay its arguments and a state a block; the scan's own tensors are computed again."""
    policy, _ = policy_of("qwen3_5 (text)", kept_layers="all")
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.dim())
        return tensor

    layer = next(
        one for one in policy.backbone.modules() if isinstance(getattr(one, "forward", None), recurrent.RowForward)
    )
    row = row_of((600, 8, 8))
    x = torch.randn(1, 616, TINY.hidden, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        layer.forward(x, pair_spans=PairSpans(row.spans))
    assert saved and max(saved) <= 4  # matrices of chunks have five dimensions


@pytest.mark.parametrize("name", KINDS)
def test_a_recomputed_layer_holds_its_input_alone(name: str) -> None:
    """Nothing that a scan was given lives on behind the checkpoint, where no hook would see it."""
    policy, _ = policy_of(name, kept_layers=0)
    row = row_of((600, 8, 8))
    held: list[weakref.ref[Tensor]] = []
    right = row_scan.convolution

    def watched(*args: Any, **others: Any) -> Tensor:
        found = right(*args, **others)
        held.append(weakref.ref(found))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_scan, "convolution", watched)
        logp = scores(policy, row, "spans")
    assert held and logp.requires_grad and not any(one() is not None for one in held)


def test_the_probe_of_a_pair_shorter_than_the_convolution_is_exact() -> None:
    policy, _ = policy_of("lfm2")
    row = row_of((1, 1, 1))
    truth = probe.separate_logps(policy, row)
    policy.layout = "spans"
    assert probe.fault(policy, row, truth, PairSpans(row.spans)) is None


class _Ends:
    """What `complete` reads of a tokenizer."""

    eos_token_id, pad_token_id = 2, 0


@pytest.mark.parametrize("name", KINDS)
def test_generation_uses_the_models_own_cache(name: str) -> None:
    """Prompts of several lengths in one padded batch, adapter on and off: as token by token without a cache."""
    policy, _ = policy_of(name, kept_layers="all")
    prompts = [[5, 9, 17], [40, 3, 88, 21, 60, 77, 13], [9]]

    def uncached(prompt: list[int]) -> list[int]:
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                logits = policy.peft(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] == _Ends.eos_token_id:
                break
        return ids[len(prompt) :]

    def answers() -> list[list[int]]:
        found = complete(policy.peft, _Ends(), prompts, max_new_tokens=6)
        assert found == [uncached(prompt) for prompt in prompts]
        return found

    with_adapter = answers()
    with policy.reference():
        assert answers() != with_adapter
