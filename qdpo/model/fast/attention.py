"""Attention over rows of [prompt chosen rejected | …] in which each answer attends only to its prompt and itself.

A pair is two sequences: [prompt chosen] with its own keys, and [rejected] with the keys of [prompt rejected]. Keys and
values are gathered once, the prompt's twice. Then one varlen call computes every sequence of the row; without that
kernel, one call per sequence. The function is registered with transformers as `qdpo_shared`. A call without
`pair_spans` is plain attention, so the same loaded model also scores single sequences and generates.

Letters: B = 1 row · H query heads · K key heads · T tokens · G gathered keys · Q queries of a sequence · D head width.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qdpo.model.fast.scored_attention import scored_attention
from qdpo.model.fast.transfer import to_device

NAME = "qdpo_shared"
# Values of `path_name` and `PairSpans.paths`.
VARLEN = "one varlen call a layer"
PAIRWISE = "two SDPA calls a pair"
SCORED = "plain products in blocks, because its scores are soft-capped or have sinks"
# torch 2.11 has no enable_gqa.
VARLEN_TAKES = frozenset(inspect.signature(varlen_attn).parameters)


class SpanLike(Protocol):
    """One pair's position in the row: start, and the numbers of prompt, chosen and rejected tokens."""

    @property
    def start(self) -> int: ...
    @property
    def prompt(self) -> int: ...
    @property
    def chosen(self) -> int: ...
    @property
    def rejected(self) -> int: ...


@dataclass(frozen=True)
class Sequences:
    """A row's sequences, in row order: lengths on the host; gather indices and boundaries on the device."""

    queries: list[int]
    keys: list[int]
    key_G: Tensor
    query_starts: Tensor
    key_starts: Tensor


class PairSpans(list[SpanLike]):
    """The spans of one row, without gaps, and the tensors its layers share; records the paths and windows they use."""

    def __init__(self, spans: Sequence[SpanLike]):
        super().__init__(spans)
        self.paths: set[str] = set()
        self.windows: set[int | None] = set()
        self._masks: dict[tuple[int, int, int | None, torch.device], Tensor] = {}
        self._sequences: dict[torch.device, Sequences] = {}

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """Bottom-right causal mask (queries, keys), True if visible; `window` is the number of keys a query may see."""
        place = (queries, keys, window, device)
        if place not in self._masks:
            self._masks[place] = causal_mask(queries, keys, window, device)
        return self._masks[place]

    def sequences(self, device: torch.device) -> Sequences:
        if device not in self._sequences:
            queries = [length for span in self for length in (span.prompt + span.chosen, span.rejected)]
            keys = [length for span in self for length in (span.prompt + span.chosen, span.prompt + span.rejected)]
            parts = []
            for span in self:
                middle = span.start + span.prompt + span.chosen
                parts += [torch.arange(span.start, middle), torch.arange(span.start, span.start + span.prompt)]
                parts.append(torch.arange(middle, middle + span.rejected))
            starts = torch.tensor([[0, *accumulate(queries)], [0, *accumulate(keys)]], dtype=torch.int32)
            starts, key_G = to_device(starts, device), to_device(torch.cat(parts), device)
            self._sequences[device] = Sequences(queries, keys, key_G, starts[0], starts[1])
        return self._sequences[device]


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Bottom-right causal mask: the last query sees the last key."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None, :]
    visible = key <= query
    return visible if window is None else visible & (key > query - window)


def register(*, compiled: bool = False) -> None:
    """Registers `qdpo_shared` with transformers; may be called again.

    `compiled`: the layers around it are compiled; this function is not, as every row's spans would recompile it.
    """
    function: Any = shared_prompt_attention
    if compiled:
        function = torch.compiler.disable(shared_prompt_attention)  # type: ignore[no-untyped-call]
    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@cache
def path_name(device: torch.device, dtype: torch.dtype, head_width: int) -> str:
    """The path for shared rows of plain softmax attention: `VARLEN` or `PAIRWISE`, on CUDA with the reason."""
    if device.type != "cuda":
        return PAIRWISE
    if torch.version.hip is not None:
        return f"{PAIRWISE} (no varlen on ROCm)"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"{PAIRWISE} (varlen needs compute capability 8.0, this card has {major}.{minor})"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{PAIRWISE} (varlen needs bf16 or fp16)"
    return VARLEN if is_varlen_width(head_width) else f"{PAIRWISE} (varlen does not take heads of {head_width})"


def is_varlen_width(head_width: int) -> bool:
    """True for heads that the varlen kernel takes on every card that has it."""
    # Widths from 200 to 224 have no backward kernel on consumer cards (sm86, sm89, sm120).
    return head_width % 8 == 0 and head_width <= 256 and not 192 < head_width <= 224


def shared_prompt_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    pair_spans: PairSpans | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention output (B, T, H, D) for query (B, H, T, D), key and value (B, K, T, D).

    With `pair_spans` the spans determine what each token sees, and `attention_mask` is a placeholder of one element. A
    sliding window counts logical distance, so the rejected answer's window reaches into its prompt as if the chosen
    answer were not there. `softcap` bounds scores as cap · tanh(score / cap); `s_aux` holds one sink score per head.

    Raises: NotImplementedError if the model adds a bias, or changes the mask.
    """
    if position_bias is not None:
        raise NotImplementedError("the model adds a position bias to its scores")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_plain = softcap is None and s_aux is None
    if pair_spans is None and is_plain:
        kwargs.pop("is_causal", None)
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output
    if pair_spans is None:
        key, value = _repeat(query, key, value)
        if attention_mask is None:
            attention_mask = causal_mask(query.shape[2], key.shape[2], None, query.device)
        return _scored(query, key, value, attention_mask, scale, softcap, s_aux).transpose(1, 2), None
    if attention_mask is not None and attention_mask.numel() != 1:
        raise NotImplementedError("the model changes the attention mask")
    path = SCORED
    if is_plain:
        same_width = value.shape[-1] == key.shape[-1]
        path = path_name(query.device, query.dtype, query.shape[-1]) if same_width else PAIRWISE
    pair_spans.paths.add(path)
    pair_spans.windows.add(sliding_window)
    sequences = pair_spans.sequences(query.device)
    key, value = key.index_select(2, sequences.key_G), value.index_select(2, sequences.key_G)
    if path == VARLEN:
        return _varlen(query, key, value, sequences, scale, sliding_window), None
    key, value = _repeat(query, key, value)
    outputs = []
    parts = [(query, sequences.queries), (key, sequences.keys), (value, sequences.keys)]
    for query_Q, key_G, value_G in zip(*(torch.split(whole, lengths, 2) for whole, lengths in parts), strict=True):
        if is_plain:
            outputs.append(_causal(query_Q, key_G, value_G, scale, sliding_window, pair_spans))
        else:
            outputs.append(
                scored_attention(
                    query_Q, key_G, value_G, scale=scale, window=sliding_window, softcap=softcap, sink_H=s_aux
                )
            )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float, window: int | None
) -> Tensor:
    """Output (B, T, H, D) of all sequences at once; the kernel's causal mask and window are bottom-right aligned."""
    extra: dict[str, Any] = {}
    if "scale" in VARLEN_TAKES:
        extra["scale"] = scale
    else:
        query = query * (scale * query.shape[-1] ** 0.5)
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in VARLEN_TAKES:
            extra["enable_gqa"] = True
        else:
            key, value = _repeat(query, key, value)
    longest_q, longest_k = max(sequences.queries), max(sequences.keys)
    # `window` counts the query's own key; the kernel's left width does not.
    left = -1 if window is None or window >= longest_k else window - 1
    output = varlen_attn(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1),
        sequences.query_starts, sequences.key_starts, longest_q, longest_k,
        window_size=(left, 0), **extra,
    )  # fmt: skip
    assert isinstance(output, Tensor)
    return output[None]


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None, spans: PairSpans) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys and (window is None or window >= keys):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    mask = spans.mask(queries, keys, window, query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _scored(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, softcap: float | None, sink_H: Tensor | None
) -> Tensor:
    """Attention from explicit scores in float32; a sink is an extra key without a value."""
    score = (query @ key.mT).float() * scale
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    # Not -inf: a padding token that sees nothing would become NaN, and spread through the values of the next layer.
    score = score.masked_fill(~mask, torch.finfo(score.dtype).min)
    if sink_H is not None:
        sink = sink_H.float().view(1, -1, 1, 1).expand(*score.shape[:3], 1)
        score = torch.cat([score, sink], dim=-1)
    prob = score.softmax(-1)[..., : key.shape[2]]
    return prob.to(value.dtype) @ value


def _repeat(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """One key head for each query head."""
    groups = query.shape[1] // key.shape[1]
    if groups == 1:
        return key, value
    return key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
