"""Attention over rows of [prompt chosen rejected | …] in which each answer sees its prompt and itself, nothing else.

The function is registered with transformers under the name `qdpo_shared`; a call without `pair_spans` is plain SDPA,
so the same loaded model also scores single sequences and generates.

Letters: B = 1 row · H query heads · K key heads · T tokens · D head width.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "qdpo_shared"


class SpanLike(Protocol):
    """One pair's place in the row: start, and the numbers of prompt, chosen and rejected tokens."""

    @property
    def start(self) -> int: ...
    @property
    def prompt(self) -> int: ...
    @property
    def chosen(self) -> int: ...
    @property
    def rejected(self) -> int: ...


class PairSpans:
    """The spans of one row, with the masks that its layers share."""

    def __init__(self, spans: Sequence[SpanLike]):
        self.spans = spans
        self._masks: dict[tuple[int, int, int | None, torch.device], Tensor] = {}

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """Bottom-right causal mask (queries, keys), True where visible; `window` counts the keys a query may see."""
        place = (queries, keys, window, device)
        if place not in self._masks:
            query = torch.arange(keys - queries, keys, device=device)[:, None]
            key = torch.arange(keys, device=device)[None, :]
            visible = key <= query
            self._masks[place] = visible if window is None else visible & (key > query - window)
        return self._masks[place]


def register() -> None:
    """Makes `qdpo_shared` known to transformers; harmless when called again."""
    AttentionInterface.register(NAME, shared_prompt_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


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
    pair_spans: PairSpans | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention output (B, T, H, D) for query (B, H, T, D), key and value (B, K, T, D).

    With `pair_spans`, `attention_mask` is ignored: the spans say what each token sees. A sliding window counts
    logical distance, so the rejected answer's window reaches into its prompt as if the chosen one were not there.

    Raises: NotImplementedError for soft-capped and sink attention, which SDPA cannot compute.
    """
    if softcap is not None or s_aux is not None:
        raise NotImplementedError("SDPA has neither soft-capped scores nor attention sinks")
    if pair_spans is None:
        kwargs.pop("is_causal", None)
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return output
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    outputs = []
    for span in pair_spans.spans:
        middle = span.start + span.prompt + span.chosen
        end = middle + span.rejected
        prompt, first, second = (
            slice(span.start, span.start + span.prompt),
            slice(span.start, middle),
            slice(middle, end),
        )
        outputs.append(
            _causal(query[:, :, first], key[:, :, first], value[:, :, first], scaling, sliding_window, pair_spans)
        )
        seen_key = torch.cat([key[:, :, prompt], key[:, :, second]], dim=2)
        seen_value = torch.cat([value[:, :, prompt], value[:, :, second]], dim=2)
        outputs.append(_causal(query[:, :, second], seen_key, seen_value, scaling, sliding_window, pair_spans))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None, spans: PairSpans
) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    if queries == keys and (window is None or window >= keys):
        return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    mask = spans.mask(queries, keys, window, query.device)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
