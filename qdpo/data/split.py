"""Splits pairs into training and held-out by prompt, so that no prompt leaks; and applies the sources' weights."""

from collections import Counter
from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from qdpo.data.tokens.store import TokenPair
from qdpo.errors import DataError


def held_out_places(pairs: Sequence[TokenPair], fraction: float, limit: int | None, seed: int) -> list[int]:
    """Places of the pairs to hold out, in order; no prompt is on both sides.

    Prompts are ranked by a hash of seed and ids, and the first of them are held out: up to `fraction` of the pairs and
    up to `limit`. The order of the pairs does not matter, and a data set that grows keeps most of its split.
    Raises: DataError if one side would be empty.
    """
    keys = [_rank(pair, seed) for pair in pairs]
    held = chosen_prompts(keys, fraction, limit)
    if not held:
        bound = "" if limit is None else f", at most {limit} of them held out"
        raise DataError(
            f"{len(keys)} pairs with {len(set(keys))} different prompts cannot be split into training and held-out "
            f"pairs (data.eval_fraction={fraction}{bound}): all pairs of a prompt stay on one side. Give more prompts, "
            "or a separate data.eval_path."
        )
    return [place for place, key in enumerate(keys) if key in held]


def chosen_prompts(keys: Sequence[bytes], fraction: float, limit: int | None) -> set[bytes]:
    """Keys of the prompts to hold out, smallest first, given each pair's key; empty if one side would be empty."""
    sizes = Counter(keys)
    most = len(keys) - 1 if limit is None else min(limit, len(keys) - 1)
    target = min(max(1, round(fraction * len(keys))), most)
    held_out, held_pairs = set[bytes](), 0
    for key in sorted(sizes):
        if held_pairs + sizes[key] <= target:
            held_out.add(key)
            held_pairs += sizes[key]
    if not held_out:  # every prompt has more pairs than the target: take the prompt with the fewest
        held_out = {key for key in sorted(sorted(sizes), key=sizes.__getitem__)[:1] if sizes[key] <= most}
    return held_out


def weighted_places(
    pairs: Sequence[TokenPair], source_of: np.ndarray, weights: Sequence[float], seed: int
) -> list[int]:
    """Places of the pairs, repeated by the weight of their source: 2 is twice, 0.5 is half of the prompts."""
    places = []
    for place, pair in enumerate(pairs):
        weight = weights[int(source_of[place])]
        share = int.from_bytes(_rank(pair, seed)[-8:], "big") / 2**64
        places += [place] * (int(weight) + (share < weight % 1))
    return places


def _rank(pair: TokenPair, seed: int) -> bytes:
    return sha256(b"%d:" % seed + pair.prompt.astype("<i4").tobytes()).digest()
