"""Computes the scores of a row's response tokens from its token ids: the one path of policy and reference.

Letters: T tokens of the row · N response tokens · D hidden width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qdpo.families.config_fields import layer_windows
from qdpo.model.fast.attention import PairSpans, SpanLike
from qdpo.model.fast.logps import TokenScores, response_logps
from qdpo.model.policy.adapter import Policy

# transformers' names for the kinds of layers whose attention is known exactly.


def row_scores(
    policy: Policy,
    token_T: Tensor,
    position_T: Tensor,
    source_N: Tensor,
    label_N: Tensor,
    spans: Sequence[SpanLike],
    *,
    metrics: bool,
    squares: bool = False,
) -> TokenScores:
    """Scores of a row's response tokens, adapter on or off as set; token n is predicted from `source_N[n]`.

    Only hidden states of response positions reach the head.
    """
    hidden_ND = response_hidden(policy, token_T, position_T, source_N, spans)
    return response_logps(hidden_ND, label_N, policy.head, tile_mib=policy.tile_mib, metrics=metrics, squares=squares)


def response_hidden(
    policy: Policy, token_T: Tensor, position_T: Tensor, source_N: Tensor, spans: Sequence[SpanLike]
) -> Tensor:
    """Hidden states (N, D) that predict the row's response tokens, adapter on or off as set."""
    if policy.shared:
        return _shared_hidden(policy, token_T, position_T, spans)[source_N]
    return _separate_hidden(policy, token_T, spans)[_separate_sources(spans, token_T.device)]


def _shared_hidden(policy: Policy, token_T: Tensor, position_T: Tensor, spans: Sequence[SpanLike]) -> Tensor:
    # transformers passes a 4D mask through unread; without one it would build a mask from the restarts of the
    # positions, and treat the rejected answer as a separate document.
    if policy.layout == "spans":
        placeholder = torch.zeros(1, 1, 1, 1, device=token_T.device)
        pair_spans = spans if isinstance(spans, PairSpans) else PairSpans(spans)
        layout: dict[str, Any] = {"attention_mask": placeholder, "pair_spans": pair_spans}
    else:
        layout = {"attention_mask": _masks(policy, position_T, spans)}
    output = policy.backbone(input_ids=token_T[None], position_ids=position_T[None], use_cache=False, **layout)
    hidden_TD: Tensor = output.last_hidden_state[0]
    return hidden_TD


def _masks(policy: Policy, position_T: Tensor, spans: Sequence[SpanLike]) -> Tensor | dict[str, Tensor]:
    """The row's mask (1, 1, T, T); for a model that mixes windows and full attention, one mask per kind of layer."""
    config = policy.backbone.config.get_text_config()
    is_eager = config._attn_implementation == "eager"
    masks = {}
    for kind, window in layer_windows(config).items():
        mask = visible_keys(position_T, spans, window)[None, None]
        if is_eager:
            dtype = policy.head.weight_VD.dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        masks[kind] = mask
    return masks if len(masks) > 1 else masks.popitem()[1]


def visible_keys(position_T: Tensor, spans: Sequence[SpanLike], window: int | None) -> Tensor:
    """(T, T), True if a query sees a key: earlier in its own prompt and answer, and inside the window."""
    lengths = torch.tensor([[span.prompt, span.chosen, span.rejected] for span in spans])
    pair_T = torch.arange(len(spans)).repeat_interleave(lengths.sum(1)).to(position_T.device)
    part_T = torch.arange(3).repeat(len(spans)).repeat_interleave(lengths.flatten()).to(position_T.device)
    same_pair = pair_T[:, None] == pair_T
    prompt_or_own = (part_T == 0) | (part_T[:, None] == part_T)
    distance = position_T[:, None] - position_T
    visible = same_pair & prompt_or_own & (distance >= 0)
    return visible if window is None else visible & (distance < window)


def _separate_hidden(policy: Policy, token_T: Tensor, spans: Sequence[SpanLike]) -> Tensor:
    """Hidden states of prompt + answer, one sequence after another, each computed alone."""
    hidden = []
    for span in spans:
        prompt = token_T[span.start : span.start + span.prompt]
        middle = span.start + span.prompt + span.chosen
        for answer in (token_T[span.start + span.prompt : middle], token_T[middle : middle + span.rejected]):
            sequence = torch.cat([prompt, answer])[None]
            hidden.append(policy.backbone(input_ids=sequence, use_cache=False).last_hidden_state[0])
    return torch.cat(hidden)


def _separate_sources(spans: Sequence[SpanLike], device: torch.device) -> Tensor:
    sources, offset = [], 0
    for span in spans:
        for answer in (span.chosen, span.rejected):
            sources.append(torch.arange(offset + span.prompt - 1, offset + span.prompt + answer - 1, device=device))
            offset += span.prompt + answer
    return torch.cat(sources)
