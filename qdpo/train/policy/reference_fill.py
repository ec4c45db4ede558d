"""The reference of a run: finds cached log-probs, computes the missing ones, and looks them up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from qdpo.data.tokens.pack import PairRow, pack_rows
from qdpo.data.tokens.sieve import TokenPair
from qdpo.errors import Interrupted, VerificationError
from qdpo.run.watcher import Watcher
from qdpo.settings.loss_rules import needs_reference
from qdpo.settings.schema import LossConfig
from qdpo.train.keep.stop import StopRequest
from qdpo.train.policy.build import Loaded
from qdpo.train.policy.reference_cache import ReferenceCache
from qdpo.train.step.feed import Reference
from qdpo.train.step.step import score

# Cached pairs that every run recomputes as a check.
CHECKED_PAIRS = 3
# The same from an earlier version's file, half of them its longest: there another window or scaling shows most.
CHECKED_OLDER_PAIRS = 16
# Largest rms difference of a pair's tokens, in nats, between two computations of one reference. Every run packs its
# rows again, and a GPU selects its matrix kernels by the row's length; CPUs gave equal bits, however rows were packed.
# 16-bit compute was seen to be off by 0.03 nats rms a token in all, other shapes by up to 0.23 nats a sequence: four
# times the former. fp32 rounds 2^16 times finer, which makes 2e-6: ten times that.
LARGEST_ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 0.12, torch.float16: 0.12}


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Scores pairs with the reference, through the cache. The adapter must stay untouched until `fill` has returned.

    Values that `fill` found or computed stay in memory (no more than the pairs' ids take), so later changes to the file
    cannot affect the run.
    """

    loaded: Loaded
    cache: ReferenceCache
    tokens_per_row: int
    watcher: Watcher
    stop: StopRequest
    loss: LossConfig
    seed: int
    known: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Reference log-probs of chosen and rejected tokens by the pair's digest."""

    @property
    def for_loss(self) -> Reference | None:
        """`reference`, or None if the loss needs no reference."""
        return self.reference if needs_reference(self.loss.name) else None

    def fill(self, *groups: Sequence[TokenPair]) -> None:
        """Computes the pairs missing from the cache, and rechecks a few cached ones. A stop loses at most one row.

        Rows hold pairs of one group, so that held-out pairs are packed here as in their evaluation.
        Raises: VerificationError if a cached pair differs from this model's result; Interrupted.
        """
        if self.for_loss is None:
            self.watcher.say(f"reference: not needed (loss.name={'+'.join(self.loss.name)})")
            return
        cached: list[TokenPair] = []
        missing = [self._look_up(group, cached) for group in groups]
        taken = self._take_over([pair for group in missing for pair in group])
        missing = [[pair for pair in group if pair.digest not in taken] for group in missing]
        absent = sum(map(len, missing))
        distinct = len(cached) + len(taken) + absent
        if not absent:
            self.watcher.say(f"reference: no pass needed (all {distinct} pairs are in the cache)")
        elif cached or taken:
            self.watcher.say(f"reference: {distinct - absent} of {distinct} pairs are in the cache")
        if cached:
            self._check(cached)
        if not absent:
            return
        self.watcher.begin("reference log-probs", absent, "pair")
        for row in [row for group in missing for row in pack_rows(group, self.tokens_per_row)]:
            scored = self._score(row)
            self.cache.put(scored)
            self.known.update({pair.digest: (chosen, rejected) for pair, chosen, rejected in scored})
            self.watcher.advance(len(row.pairs))
            if self.stop.number is not None:
                raise Interrupted(
                    "Stopped while scoring the reference; all finished pairs are in the cache. Run the same command "
                    "to continue.",
                    self.stop.number,
                )
        self.watcher.finish()

    def reference(self, pair: TokenPair) -> tuple[np.ndarray, np.ndarray]:
        """Log-probs of the tokens of a pair that was passed to `fill`."""
        return self.known[pair.digest]

    def _look_up(self, group: Sequence[TokenPair], cached: list[TokenPair]) -> list[TokenPair]:
        """The group's distinct pairs without a usable row; the other pairs are loaded and added to `cached`."""
        missing = []
        for digest, pair in {pair.digest: pair for pair in group}.items():
            if digest in self.known:
                continue
            found = self.cache.get(pair)
            if found is None:
                missing.append(pair)
            else:
                self.known[digest] = found
                cached.append(pair)
        return missing

    def _take_over(self, missing: Sequence[TokenPair]) -> set[str]:
        """Copies the pairs that an earlier version's file has, if they are this model's; returns their digests.

        Only the weights named that file, so a model with the same weights and another window may have filled it: some
        pairs are recomputed, the longest among them. If they differ, the file is left to the model that it belongs to.
        """
        older = self.cache.older()
        if older is None or not missing:
            return set()
        found = {pair: values for pair in missing if (values := older.get(pair)) is not None}
        older.close()
        if not found:
            return set()
        by_length = sorted(found, key=lambda pair: len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)))
        places = self._drawn(len(by_length), CHECKED_OLDER_PAIRS // 2) | {
            len(by_length) - 1 - place for place in range(min(CHECKED_OLDER_PAIRS // 2, len(by_length)))
        }
        checked = [by_length[place] for place in sorted(places)]
        _worst, largest, bound = self._farthest(checked, {pair.digest: values for pair, values in found.items()})
        if not largest <= bound:
            self.watcher.say(
                f"reference: {older.path.name}, which an earlier version named by the weights alone, is of a model "
                f"with another config (a pair differs by {largest:.2g} nats a token), so its values are not used"
            )
            return set()
        self.cache.put((pair, *values) for pair, values in found.items())
        self.known.update({pair.digest: values for pair, values in found.items()})
        self.watcher.say(
            f"reference: {len(found)} pairs taken over from {older.path.name}, which an earlier version named by the "
            f"weights alone; {len(checked)} of them recomputed, largest difference {largest:.2g} nats a token"
        )
        return {pair.digest for pair in found}

    def _drawn(self, count: int, wanted: int) -> set[int]:
        """Random places of a list of pairs to recompute."""
        draw = np.random.default_rng([self.seed, count])
        return {int(place) for place in draw.choice(count, size=min(wanted, count), replace=False)}

    def _farthest(
        self, pairs: Sequence[TokenPair], stored: Mapping[str, tuple[np.ndarray, np.ndarray]]
    ) -> tuple[TokenPair, float, float]:
        """Recomputes pairs: that which is farthest from its stored values, by how much, and what rounding explains."""
        apart = {
            pair: rms(np.concatenate(stored[pair.digest]) - np.concatenate([chosen, rejected]))
            for row in pack_rows(pairs, self.tokens_per_row)
            for pair, chosen, rejected in self._score(row)
        }
        worst = max(apart, key=lambda pair: apart[pair])
        return worst, apart[worst], LARGEST_ROUNDING[self.loaded.policy.head.weight_VD.dtype]

    def _check(self, cached: Sequence[TokenPair]) -> None:
        """Recomputes some cached pairs. Raises: VerificationError if a pair differs by more than rounding."""
        places = self._drawn(len(cached), CHECKED_PAIRS)
        worst, largest, bound = self._farthest([cached[place] for place in sorted(places)], self.known)
        if not largest <= bound:
            raise VerificationError(
                f"The cached reference does not belong to this model: data row {worst.row}, recomputed, differs by "
                f"{largest:.3g} nats a token (rms; rounding explains {bound:g}) from {self.cache.path}. "
                f"{self.cache.way_out}"
            )
        self.watcher.say(
            f"reference: {len(places)} cached pairs recomputed, largest difference {largest:.2g} nats a token"
        )

    def _score(self, row: PairRow) -> list[tuple[TokenPair, np.ndarray, np.ndarray]]:
        """The reference's log-probs of a row, by the function that scores the policy, with the adapter off."""
        with torch.no_grad():
            if self.loaded.reference_is_start:
                logp_N = score(self.loaded.policy, row, metrics=False).logp
            else:
                with self.loaded.policy.reference():
                    logp_N = score(self.loaded.policy, row, metrics=False).logp
        parts = np.split(logp_N.cpu().numpy(), np.cumsum(row.lengths)[:-1])
        return [(pair, parts[2 * place], parts[2 * place + 1]) for place, pair in enumerate(row.pairs)]


def rms(difference_N: np.ndarray) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(np.square(difference_N, dtype=np.float64))))
