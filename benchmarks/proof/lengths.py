"""Pairs of random ids with lengths like those of two kinds of data sets."""

from dataclasses import dataclass

import numpy as np

from qdpo.data.tokens.sieve import TokenPair
from qdpo.measure.steps import random_pair


@dataclass(frozen=True)
class Profile:
    """Median tokens of prompt, chosen and rejected; log-normal with this spread, each part at most `most` tokens."""

    medians: tuple[int, int, int]
    spread: float
    most: int
    pairs_per_step: int
    """So many that a step fills rows of 8k."""


# Medians as counted on 2,307 pairs of HH and 257 of general chat; the spread is an assumption.
PROFILES = {
    "HH-like": Profile((122, 29, 37), 0.7, 700, 64),
    "chat-like": Profile((139, 242, 251), 0.7, 1400, 24),
}


def lengths_of(profile: Profile, number: int) -> list[tuple[int, int, int]]:
    """The same for the same arguments; the first ones do not depend on how many there are."""
    found = []
    for row in range(number):
        drawn = np.random.default_rng([7, row]).lognormal(np.log(profile.medians), profile.spread)
        prompt, chosen, rejected = (int(tokens) for tokens in np.clip(drawn, 4, profile.most))
        found.append((prompt, chosen, rejected))
    return found


def pairs_of(profile: Profile, number: int, vocabulary: int) -> list[TokenPair]:
    generator = np.random.default_rng(0)
    sizes = lengths_of(profile, number)
    return [random_pair(*size, row, generator, vocabulary) for row, size in enumerate(sizes, 1)]


def tiny(profile: Profile) -> Profile:
    """The same with short parts and few pairs, to try a script out."""
    medians = tuple(max(4, tokens // 20) for tokens in profile.medians)
    return Profile((medians[0], medians[1], medians[2]), profile.spread, 40, 4)
