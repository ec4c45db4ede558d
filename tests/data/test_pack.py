"""Rows hold every pair once, in the layout that attention relies on; order is a function of seed and epoch."""

import numpy as np
import pytest

from qdpo.data.tokens.pack import PairRow, epoch_order, pack_rows, step_indices
from qdpo.data.tokens.sieve import TokenPair


def pair(row: int, prompt: int, chosen: int, rejected: int) -> TokenPair:
    ids = np.arange(1000 * row, 1000 * row + prompt + chosen + rejected, dtype=np.int32)
    return TokenPair(ids[:prompt], ids[prompt : prompt + chosen], ids[prompt + chosen :], row)


def test_each_response_token_is_predicted_from_the_token_before_it() -> None:
    row = PairRow([pair(1, 3, 2, 4), pair(2, 2, 1, 1)])
    for source, label, sequence in zip(row.source_N, row.label_N, row.sequence_N, strict=True):
        member = row.pairs[sequence // 2]
        answer = member.chosen if sequence % 2 == 0 else member.rejected
        whole = np.concatenate([member.prompt, answer]).tolist()
        before = whole[whole.index(label) - 1]
        assert row.token_T[source] == before
        assert row.position_T[source] == whole.index(before)
    assert row.lengths == [2, 4, 1, 1] and row.tokens == 13 == len(row.token_T)


def test_first_fit_decreasing_keeps_every_pair_once_within_the_budget() -> None:
    rng = np.random.default_rng(0)
    pairs = [pair(n, *rng.integers(1, 40, 3)) for n in range(1, 60)] + [pair(99, 300, 5, 5)]
    rows = pack_rows(pairs, 128)
    assert sorted(p.row for r in rows for p in r.pairs) == sorted(p.row for p in pairs)
    assert all(r.tokens <= 128 or len(r.pairs) == 1 for r in rows)
    # First-fit-decreasing needs at most 11/9 of the best packing (Johnson 1973), besides the pair that is too long.
    assert len(rows) <= 11 / 9 * np.ceil(sum(p.tokens for p in pairs[:-1]) / 128) + 2
    assert [len(r.pairs) for r in pack_rows(pairs, 0)] == [1] * 60


@pytest.mark.parametrize(("pairs", "per_step", "total"), [(10, 4, 25), (7, 16, 50), (5, 5, 5), (3, 2, 3)])
def test_steps_walk_through_epochs_without_a_gap(pairs: int, per_step: int, total: int) -> None:
    steps = -(-total // per_step)
    walked = [
        index
        for step in range(steps)
        for index in step_indices(step, pairs=pairs, pairs_per_step=per_step, total_pairs=total, seed=3)
    ]
    expected = np.concatenate([epoch_order(epoch, pairs=pairs, seed=3) for epoch in range(-(-total // pairs))])[:total]
    assert walked == expected.tolist()


def test_order_depends_on_seed_and_epoch() -> None:
    orders = {tuple(epoch_order(e, pairs=20, seed=s)) for e in range(2) for s in range(2)}
    assert len(orders) == 4
