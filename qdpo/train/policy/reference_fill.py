"""The reference of a run: finds cached log-probs, computes the missing ones, and looks them up."""

from collections.abc import Sequence
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
        absent = sum(map(len, missing))
        distinct = len(cached) + absent
        if not absent:
            self.watcher.say(f"reference: no pass needed (all {distinct} pairs are in the cache)")
        elif cached:
            self.watcher.say(f"reference: {len(cached)} of {distinct} pairs are in the cache")
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

    def _check(self, cached: Sequence[TokenPair]) -> None:
        """Recomputes some cached pairs. Raises: VerificationError if a pair differs by more than rounding."""
        draw = np.random.default_rng([self.seed, len(cached)])
        places = draw.choice(len(cached), size=min(CHECKED_PAIRS, len(cached)), replace=False)
        rows = pack_rows([cached[place] for place in sorted(places)], self.tokens_per_row)
        apart = {
            pair: rms(np.concatenate(self.known[pair.digest]) - np.concatenate([chosen, rejected]))
            for row in rows
            for pair, chosen, rejected in self._score(row)
        }
        worst = max(apart, key=lambda pair: apart[pair])
        largest, bound = apart[worst], LARGEST_ROUNDING[self.loaded.policy.head.weight_VD.dtype]
        if not largest <= bound:
            raise VerificationError(
                f"The cached reference does not belong to this model: data row {worst.row}, recomputed, differs by "
                f"{largest:.3g} nats a token (rms; rounding explains {bound:g}) from {self.cache.path}. "
                f"{self.cache.way_out}"
            )
        self.watcher.say(
            f"reference: {len(apart)} cached pairs recomputed, largest difference {largest:.2g} nats a token"
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
