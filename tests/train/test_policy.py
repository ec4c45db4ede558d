"""What the policy's checks at the start are made with."""

import numpy as np

from qdpo.data.tokens.sieve import TokenPair
from qdpo.train.policy.build import probe_pairs


def test_long_pairs_are_cut_for_the_probe() -> None:
    ids = np.arange(3000, dtype=np.int32)
    long, short = TokenPair(ids, ids[:900], ids[:40], 1), TokenPair(ids[:30], ids[:40], ids[:20], 2)
    first, second = probe_pairs([long, short, long])
    assert (first.row, first.tokens) == (2, short.tokens)
    # Answers must still follow the end of their prompt.
    assert second.prompt.tolist() == ids[-64:].tolist() and second.chosen.tolist() == ids[:64].tolist()
    assert len(second.rejected) == 40
