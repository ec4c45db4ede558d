"""Packs pairs into rows of [prompt chosen rejected | prompt chosen rejected | …], and orders pairs over epochs.

Letters: T tokens of a row · N response tokens of a row · P pairs of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qdpo.data.tokens.sieve import TokenPair


@dataclass(frozen=True)
class Span:
    """Position of a pair in its row: tokens [start, start + prompt + chosen + rejected)."""

    start: int
    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class PairRow:
    """One forward pass: the pairs, their tokens, and the position that predicts each response token.

    Positions restart after the prompt, so that the rejected answer follows its prompt as the chosen answer does.
    """

    pairs: list[TokenPair]

    @cached_property
    def spans(self) -> list[Span]:
        spans, start = [], 0
        for pair in self.pairs:
            spans.append(Span(start, len(pair.prompt), len(pair.chosen), len(pair.rejected)))
            start += pair.tokens
        return spans

    @property
    def tokens(self) -> int:
        """T: the tokens computed for this row, each prompt once."""
        return sum(pair.tokens for pair in self.pairs)

    @cached_property
    def token_T(self) -> np.ndarray:
        return np.concatenate([part for pair in self.pairs for part in (pair.prompt, pair.chosen, pair.rejected)])

    @cached_property
    def position_T(self) -> np.ndarray:
        parts = []
        for span in self.spans:
            parts += [np.arange(span.prompt + span.chosen), np.arange(span.prompt, span.prompt + span.rejected)]
        return np.concatenate(parts)

    @cached_property
    def source_N(self) -> np.ndarray:
        """Index in T whose hidden state predicts response token n; both answers start from the prompt's last token."""
        parts = []
        for span in self.spans:
            last_prompt = span.start + span.prompt - 1
            rejected_start = span.start + span.prompt + span.chosen
            parts.append(np.arange(last_prompt, last_prompt + span.chosen))
            parts.append(np.concatenate([[last_prompt], np.arange(rejected_start, rejected_start + span.rejected - 1)]))
        return np.concatenate(parts)

    @cached_property
    def label_N(self) -> np.ndarray:
        return np.concatenate([part for pair in self.pairs for part in (pair.chosen, pair.rejected)])

    @cached_property
    def sequence_N(self) -> np.ndarray:
        """The answer that token n belongs to: 2i is the chosen answer of pair i, 2i + 1 its rejected answer."""
        return np.repeat(np.arange(2 * len(self.pairs)), self.lengths)

    @property
    def lengths(self) -> list[int]:
        """Response tokens of each answer, in the order of `sequence_N`; shape (2P,)."""
        return [length for span in self.spans for length in (span.chosen, span.rejected)]


def pack_rows(pairs: Sequence[TokenPair], tokens_per_row: int) -> list[PairRow]:
    """Pack pairs into rows of at most `tokens_per_row` tokens, first-fit decreasing; 0: one pair a row.

    A pair longer than the budget gets a row of its own. The result depends on the pairs' order only through ties.
    """
    if tokens_per_row == 0:
        return [PairRow([pair]) for pair in pairs]
    bins: list[list[TokenPair]] = []
    room: list[int] = []
    for pair in sorted(pairs, key=lambda pair: -pair.tokens):
        slot = next((index for index, free in enumerate(room) if free >= pair.tokens), None)
        if slot is None:
            bins.append([pair])
            room.append(tokens_per_row - pair.tokens)
        else:
            bins[slot].append(pair)
            room[slot] -= pair.tokens
    return [PairRow(members) for members in bins]


def step_indices(step: int, *, pairs: int, pairs_per_step: int, total_pairs: int, seed: int) -> list[int]:
    """Indices of the pairs of optimizer step `step` (from 0), a pure function of its arguments.

    Each epoch is a permutation drawn from (seed, epoch). An epoch's leftovers open the next epoch; only the run's
    last step may be smaller, when `total_pairs` (over all epochs) runs out.
    """
    first = step * pairs_per_step
    last = min(first + pairs_per_step, total_pairs)
    epochs = range(first // pairs, (last - 1) // pairs + 1)
    orders = {epoch: epoch_order(epoch, pairs=pairs, seed=seed) for epoch in epochs}
    return [int(orders[place // pairs][place % pairs]) for place in range(first, last)]


def epoch_order(epoch: int, *, pairs: int, seed: int) -> np.ndarray:
    """Permutation of the pairs in epoch `epoch`, from (seed, epoch) alone."""
    return np.random.default_rng([seed, epoch]).permutation(pairs)
