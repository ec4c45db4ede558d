"""One varlen call, two SDPA calls a pair and products written out are the same attention as one dense mask."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdpo.data.tokens.pack import Span
from qdpo.model.fast import attention, scored_attention
from qdpo.model.fast.attention import PAIRWISE, SCORED, VARLEN, PairSpans, path_name, shared_prompt_attention
from qdpo.model.policy.forward import visible_keys
from tests.model.families import SCORED as SCORED_FAMILIES
from tests.model.families import build

# The last pairs have answers of one token; the first prompt is longer than most windows.
SPANS = [Span(0, 9, 4, 7), Span(20, 3, 8, 2), Span(33, 12, 1, 5), Span(51, 1, 1, 1)]
POSITIONS = [
    torch.cat([torch.arange(s.prompt + s.chosen), torch.arange(s.prompt, s.prompt + s.rejected)]) for s in SPANS
]
POSITION_T = torch.cat(POSITIONS)
WINDOWS = [None, 1, 5, 12, 13, 100]


def inputs(key_heads: int, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    tokens = len(POSITION_T)
    heads = (4, key_heads, key_heads)
    return tuple(torch.randn(1, h, tokens, width, dtype=torch.float64, requires_grad=True) for h in heads)  # type: ignore[return-value]


def dense(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float, **more: Any) -> Tensor:
    """The oracle: softmax over a mask of T×T; `softcap` and `s_aux` (one sink a head) as in the papers."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    score = query @ key.mT * scale
    if (cap := more.get("softcap")) is not None:
        score = cap * torch.tanh(score / cap)
    score = score.masked_fill(~visible_keys(POSITION_T.to(score.device), SPANS, window), -math.inf)
    top = score.exp()
    below = top.sum(-1, keepdim=True)
    if (sink := more.get("s_aux")) is not None:
        below = below + sink.exp().view(1, -1, 1, 1)
    return (top / below @ value).transpose(1, 2)


def emulated(query: Tensor, key: Tensor, value: Tensor, start_q: Tensor, start_k: Tensor, **options: Any) -> Tensor:
    """What the flash kernel is documented to do: sequences one by one, causal and window aligned bottom right."""
    (left, right), groups = options["window_size"], query.shape[1] // key.shape[1]
    assert right == 0 and start_q.dtype == start_k.dtype == torch.int32
    assert groups == 1 or options["enable_gqa"]
    outputs = []
    for begin_q, end_q, begin_k, end_k in zip(start_q[:-1], start_q[1:], start_k[:-1], start_k[1:], strict=True):
        query_HQD = query[begin_q:end_q].transpose(0, 1)
        key_HGD = key[begin_k:end_k].transpose(0, 1).repeat_interleave(groups, 0)
        value_HGD = value[begin_k:end_k].transpose(0, 1).repeat_interleave(groups, 0)
        place_Q1 = torch.arange(len(query_HQD[0]))[:, None] + len(key_HGD[0]) - len(query_HQD[0])
        place_G = torch.arange(len(key_HGD[0]))
        hidden = place_G > place_Q1 if left < 0 else (place_G > place_Q1) | (place_G < place_Q1 - left)
        scale = options.get("scale") or query.shape[-1] ** -0.5
        prob = (query_HQD @ key_HGD.mT * scale).masked_fill(hidden, -math.inf).softmax(-1)
        outputs.append((prob @ value_HGD).transpose(0, 1))
    return torch.cat(outputs)


def newest(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):  # type: ignore[no-untyped-def]
    """The signature of torch 2.13."""
    assert (max_q, max_k) == (20, 20) or max_q <= max_k
    return emulated(q, k, v, cu_seq_q, cu_seq_k, scale=scale, window_size=window_size, enable_gqa=enable_gqa)


def without_gqa(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    """The signature of torch 2.11."""
    return emulated(q, k, v, cu_seq_q, cu_seq_k, scale=scale, window_size=window_size, enable_gqa=False)


def without_scale(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    return emulated(q, k, v, cu_seq_q, cu_seq_k, window_size=window_size, enable_gqa=False)


def use_kernel(monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor]) -> None:
    monkeypatch.setattr(attention, "varlen_attn", kernel)
    monkeypatch.setattr(attention, "VARLEN_TAKES", frozenset(inspect.signature(kernel).parameters))
    monkeypatch.setattr(attention, "path_name", lambda *_: VARLEN)


def assert_dense(key_heads: int, window: int | None, path: str, **more: Any) -> None:
    tensors, spans, scale = inputs(key_heads), PairSpans(SPANS), 0.3
    placeholder = torch.zeros(1, 1, 1, 1)
    found, _ = shared_prompt_attention(
        nn.Module(), *tensors, placeholder, scaling=scale, sliding_window=window, pair_spans=spans, **more
    )
    expected = dense(*tensors, window, scale, **more)
    assert spans.paths == {path} and spans.windows == {window}
    # Written-out scores are float32.
    tolerance = 1e-5 if path == SCORED else 1e-12
    assert torch.allclose(found, expected, atol=tolerance)
    slope = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, tensors, slope), torch.autograd.grad(expected, tensors, slope), strict=True
    ):
        assert torch.allclose(one, other, atol=tolerance)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("window", WINDOWS)
def test_two_sdpa_calls_a_pair_equal_a_dense_mask(key_heads: int, window: int | None) -> None:
    assert_dense(key_heads, window, PAIRWISE)


@pytest.mark.parametrize("kernel", [newest, without_gqa, without_scale])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("window", WINDOWS)
def test_one_varlen_call_equals_a_dense_mask(
    kernel: Callable[..., Tensor], key_heads: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kernel(monkeypatch, kernel)
    assert_dense(key_heads, window, VARLEN)


@pytest.mark.parametrize("block", [scored_attention.BLOCK, 150, 1])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    "more", [{"softcap": 1.5}, {"s_aux": torch.randn(4)}, {"softcap": 0.7, "s_aux": torch.randn(4)}]
)
def test_soft_caps_and_sinks_equal_a_dense_mask(
    more: dict[str, Any], window: int | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block of queries, in several, and query by query."""
    monkeypatch.setattr(scored_attention, "BLOCK", block)
    assert_dense(2, window, SCORED, **more)


def test_scores_exist_for_one_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scored_attention, "BLOCK", 150)
    query, key, value = inputs(4)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        scored_attention.scored_attention(query, key, value, scale=1.0, window=None, softcap=2.0, sink_H=None)
    assert max(tensor.numel() for tensor in kept) == query.numel()


def test_torchs_varlen_takes_what_we_hand_it() -> None:
    assert {"window_size", "scale"} <= attention.VARLEN_TAKES


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "reason"),
    [
        ((8, 6), torch.bfloat16, 128, None),
        ((9, 0), torch.float16, 256, None),
        ((12, 0), torch.bfloat16, 64, None),
        ((7, 5), torch.float16, 128, "this card has 7.5"),
        ((8, 9), torch.float32, 128, "needs bf16 or fp16"),
        ((8, 9), torch.bfloat16, 100, "heads of 100"),
        ((8, 9), torch.bfloat16, 320, "heads of 320"),
        ((8, 9), torch.bfloat16, 208, "heads of 208"),
    ],
)
def test_a_cuda_card_takes_varlen_or_says_why_not(
    capability: tuple[int, int], dtype: torch.dtype, width: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    path_name.cache_clear()
    found = path_name(torch.device("cuda", 0), dtype, width)
    path_name.cache_clear()
    assert found == VARLEN if reason is None else found.startswith(PAIRWISE) and reason in found


def test_a_mask_or_bias_of_the_models_own_is_refused() -> None:
    tensors, spans = inputs(4), PairSpans(SPANS)
    tokens = len(POSITION_T)
    with pytest.raises(NotImplementedError, match="changes the attention mask"):
        shared_prompt_attention(nn.Module(), *tensors, torch.zeros(1, 1, tokens, tokens), pair_spans=spans)
    with pytest.raises(NotImplementedError, match="position bias"):
        shared_prompt_attention(nn.Module(), *tensors, None, position_bias=torch.zeros(1), pair_spans=spans)


@pytest.mark.parametrize("family", SCORED_FAMILIES)
def test_without_spans_it_is_the_models_own_attention(family: str) -> None:
    """As generation needs it: prompts padded on the left, whose padding must not spread NaN."""
    own, plain = (build(SCORED_FAMILIES[family](), name) for name in (attention.NAME, "eager"))
    token_BT = torch.randint(3, 160, (2, 9), generator=torch.manual_seed(3))
    mask_BT = torch.ones_like(token_BT)
    mask_BT[1, :4] = 0
    for mask in (None, mask_BT):
        found = own(input_ids=token_BT, attention_mask=mask, use_cache=False).logits
        expected = plain(input_ids=token_BT, attention_mask=mask, use_cache=False).logits
        seen = mask_BT.bool() if mask is not None else torch.ones_like(token_BT, dtype=torch.bool)
        assert torch.allclose(found[seen], expected[seen], atol=2e-5)
