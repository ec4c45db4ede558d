"""The length rule: which pairs fit whole, which lose the end of an answer, and which are too long."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from qdpo.data.layouts.notes import RowNote, Where
from qdpo.data.tokens.encode import IdLists
from qdpo.data.tokens.store import TokenPair

MIN_KEPT_SHARE = 0.5
MIN_KEPT_TOKENS = 32
"""A cut answer must keep at least this much; with less, it is a different answer, and the preference may not hold."""

CutOutcome = Literal["whole", "cut", "prompt_too_long", "response_cut_too_much"]


@dataclass(frozen=True)
class Limits:
    """The length rule. `max_tokens` bounds prompt + longer response, `max_prompt_tokens` the prompt."""

    max_tokens: int
    max_prompt_tokens: int
    long_prompt: Literal["drop", "drop_oldest_turns"] = "drop"

    def outcome(self, prompt: int, chosen: int, rejected: int) -> CutOutcome:
        """The outcome for a pair of these lengths."""
        if prompt > self.max_prompt_tokens or prompt >= self.max_tokens:
            return "prompt_too_long"
        room, longer = self.max_tokens - prompt, max(chosen, rejected)
        if longer <= room:
            return "whole"
        return "cut" if room >= max(MIN_KEPT_SHARE * longer, MIN_KEPT_TOKENS) else "response_cut_too_much"


def fit(where: Where, ids: IdLists, limits: Limits) -> tuple[TokenPair | None, list[RowNote]]:
    """Apply the length rule: the pair, or None, and notes. A prompt is never cut, and a response only at its end.

    A cut response has no end token: the model must not learn to stop there.
    """
    prompt, *responses = ids
    outcome = limits.outcome(*map(len, ids))
    if outcome == "prompt_too_long":
        allowed = min(limits.max_prompt_tokens, limits.max_tokens - 1)
        detail = f"the prompt has {len(prompt)} tokens, {allowed} are allowed"
        return None, [where.note("dropped", outcome, detail)]
    room = limits.max_tokens - len(prompt)
    cuts = [
        f"{side} from {len(response)} to {room} tokens"
        for side, response in zip(("chosen", "rejected"), responses, strict=True)
        if len(response) > room
    ]
    if outcome == "response_cut_too_much":
        return None, [where.note("dropped", outcome, f"would cut {'; '.join(cuts)}")]
    chosen, rejected = (response[:room] for response in responses)
    if chosen == rejected:
        reason = "identical_after_cut" if cuts else "identical_tokens"
        return None, [where.note("dropped", reason, f"chosen and rejected are the same {len(chosen)} tokens")]
    if not (prompt and chosen and rejected):
        reason = "empty_response" if prompt else "empty_prompt"
        return None, [where.note("dropped", reason, "the tokenizer makes no tokens of it")]
    arrays = [np.array(part, np.int32) for part in (prompt, chosen, rejected)]
    pair = TokenPair(arrays[0], arrays[1], arrays[2], where.row)
    return pair, [where.note("cut", "response_cut", "; ".join(cuts))] if cuts else []
