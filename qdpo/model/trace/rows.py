"""Rows without data: the sizes of a row as tensors, for a trace."""

from dataclasses import dataclass

import torch

from qdpo.model.fast.attention import PairSpans
from qdpo.model.policy.row import RowTensors


@dataclass(frozen=True)
class EvenSpan:
    """A pair's position in its row."""

    start: int
    prompt: int
    chosen: int
    rejected: int


def even_row(tokens: int, prompts: int, pairs: int, device: torch.device) -> RowTensors:
    """A row of this many tokens, of which `prompts` are in prompts, divided evenly over the pairs."""
    spans, start = [], 0
    for number in range(pairs):
        prompt, answers = (_share(total, pairs, number) for total in (prompts, tokens - prompts))
        spans.append(EvenSpan(start, prompt, answers - answers // 2, answers // 2))
        start += prompt + answers
    places = [torch.ones(size, dtype=torch.int64, device=device) for size in (tokens, tokens)]
    answers_N = [torch.ones(tokens - prompts, dtype=torch.int64, device=device) for _ in range(2)]
    return RowTensors(places[0], places[1], answers_N[0], answers_N[1], PairSpans(spans))


def _share(total: int, parts: int, number: int) -> int:
    return total * (number + 1) // parts - total * number // parts
