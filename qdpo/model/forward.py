"""From token ids of one row to the scores of its response tokens: the one path of policy and reference.

Letters: T tokens of the row · N response tokens · D hidden width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qdpo.model.adapter import Policy
from qdpo.model.attention import PairSpans, SpanLike
from qdpo.model.logps import TokenScores, response_logps


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
    """Scores of a row's response tokens, with the adapter as it is switched; token n is predicted from `source_N[n]`.

    Only hidden states of response positions reach the head.
    """
    if policy.shared:
        hidden_TD = _shared_hidden(policy, token_T, position_T, spans)
    else:
        hidden_TD = _separate_hidden(policy, token_T, spans)
        source_N = _separate_sources(spans, token_T.device)
    return response_logps(
        hidden_TD[source_N], label_N, policy.head, tile_mib=policy.tile_mib, metrics=metrics, squares=squares
    )


def _shared_hidden(policy: Policy, token_T: Tensor, position_T: Tensor, spans: Sequence[SpanLike]) -> Tensor:
    # A 4D mask is handed through unread by transformers; without one it would build a mask from the positions'
    # restarts, and take the rejected answer for a document of its own.
    placeholder = torch.zeros(1, 1, 1, 1, device=token_T.device)
    output = policy.backbone(
        input_ids=token_T[None],
        position_ids=position_T[None],
        attention_mask=placeholder,
        pair_spans=PairSpans(spans),
        use_cache=False,
    )
    hidden_TD: Tensor = output.last_hidden_state[0]
    return hidden_TD


def _separate_hidden(policy: Policy, token_T: Tensor, spans: Sequence[SpanLike]) -> Tensor:
    """Hidden states of prompt + answer, one sequence after the other, each computed alone."""
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
