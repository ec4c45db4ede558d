"""The reference of a run: which log-probs are cached, which are still to be computed, and looking them up."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from qdpo.config import LossConfig
from qdpo.data.pack import PairRow, pack_rows
from qdpo.data.tokens import TokenPair
from qdpo.errors import Interrupted, VerificationError
from qdpo.loss_rules import needs_reference
from qdpo.train.feed import Reference
from qdpo.train.meters import Watcher
from qdpo.train.policy import Loaded
from qdpo.train.reference import ReferenceCache
from qdpo.train.signals import StopRequest
from qdpo.train.step import score


@dataclass(frozen=True)
class Scorer:
    """Scores pairs with the reference, through the cache. The adapter must still be untouched while it fills."""

    loaded: Loaded
    cache: ReferenceCache
    tokens_per_row: int
    watcher: Watcher
    stop: StopRequest
    loss: LossConfig

    @property
    def for_loss(self) -> Reference | None:
        """`reference`, or None if the loss compares with none."""
        return self.reference if needs_reference(self.loss.name) else None

    def fill(self, *groups: Sequence[TokenPair]) -> None:
        """Computes what the cache lacks; an interruption loses at most one row.

        Rows hold pairs of one group, so that held-out pairs are packed here as they are when they are evaluated.
        """
        if self.for_loss is None:
            self.watcher.say(f"reference: {'+'.join(self.loss.name)} compares with none; no reference pass")
            return
        missing = [self.cache.missing(group) for group in groups]
        absent, distinct = sum(map(len, missing)), len({pair.digest for group in groups for pair in group})
        if not absent:
            self.watcher.say(f"reference: all {distinct} pairs are in the cache; no reference pass")
            return
        if absent < distinct:
            self.watcher.say(f"reference: {distinct - absent} of {distinct} pairs are in the cache")
        self.watcher.begin("reference log-probs", absent, "pair")
        for row in [row for group in missing for row in pack_rows(group, self.tokens_per_row)]:
            self.cache.put(self._score(row))
            self.watcher.advance(len(row.pairs))
            if self.stop.number is not None:
                raise Interrupted(
                    "Stopped while scoring the reference; all finished pairs are in the cache. The same "
                    "command continues.",
                    self.stop.number,
                )
        self.watcher.finish()

    def reference(self, pair: TokenPair) -> tuple[np.ndarray, np.ndarray]:
        """Cached log-probs of the pair's tokens. Raises: VerificationError if they went missing under the run."""
        found = self.cache.get(pair)
        if found is None:
            raise VerificationError(
                f"The reference log-probs of data row {pair.row} are gone from {self.cache.path}. Run the same command "
                "again: they are computed anew."
            )
        return found

    def _score(self, row: PairRow) -> list[tuple[TokenPair, np.ndarray, np.ndarray]]:
        """The reference's log-probs of a row: the very function that scores the policy, with the adapter off."""
        with torch.no_grad():
            if self.loaded.reference_is_start:
                logp_N = score(self.loaded.policy, row, metrics=False).logp
            else:
                with self.loaded.policy.reference():
                    logp_N = score(self.loaded.policy, row, metrics=False).logp
        parts = np.split(logp_N.cpu().numpy(), np.cumsum(row.lengths)[:-1])
        return [(pair, parts[2 * place], parts[2 * place + 1]) for place, pair in enumerate(row.pairs)]
