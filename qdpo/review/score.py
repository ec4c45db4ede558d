"""Scores a trained run again, on its own held-out pairs or on other pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qdpo.data import prepare, stored
from qdpo.data.positions import shortened
from qdpo.data.tokens.pack import pack_rows
from qdpo.data.tokens.sieve import TokenPair
from qdpo.families.config_fields import positions
from qdpo.model.base.load import model_config
from qdpo.model.policy import adapter
from qdpo.review.open import PLACES, Reopened, load_reopened, reopen
from qdpo.run.watcher import Watcher
from qdpo.settings.schema import DataConfig
from qdpo.train.keep.stop import StoppableWatcher, catch_signals
from qdpo.train.policy.build import probe_pairs
from qdpo.train.policy.reference_cache import ReferenceCache
from qdpo.train.policy.reference_fill import Scorer
from qdpo.train.start.open_run import cache_folder
from qdpo.train.start.tokenizer import tokenizer_of
from qdpo.train.watch.evaluate import Evaluation, evaluate


@dataclass(frozen=True)
class TrainedBefore:
    """Of the pairs to score, those that the run was trained on, and those with a prompt that it was trained on."""

    pairs: int
    prompts: int
    """Pairs, whatever their answers."""

    def sentence(self, of: int) -> str:
        """The warning that the figures show what the run remembers, with its counts."""
        return (
            f"this run was trained on {self.pairs:,} of these {of:,} pairs, and on the prompts of {self.prompts:,}: "
            "the figures show what it remembers, not what it has learned. Score pairs whose prompts it has not seen."
        )


@dataclass(frozen=True)
class Rescored:
    """Metrics of the run's adapter on `pairs` pairs of `source`."""

    run: str
    source: str
    pairs: int
    evaluation: Evaluation
    trained: TrainedBefore


@dataclass(frozen=True)
class Chosen:
    """A finished run, and the pairs of `source` to score it on."""

    opened: Reopened
    source: str
    pairs: Sequence[TokenPair]


def rescore(folder: Path, arguments: list[str], watcher: Watcher) -> Rescored:
    """Evaluate the run's adapter on all usable pairs of data.path, or without it on the run's own held-out pairs.

    Raises: ConfigError if `folder` is not a finished run, or a setting is given that would change the model.
    """
    chosen = choose(folder, arguments, watcher)
    opened, pairs = chosen.opened, chosen.pairs
    run, config = opened.run, opened.config
    trained = trained_before(pairs, stored.load(run)[0])
    if trained.prompts:
        watcher.say(f"warning: {trained.sentence(len(pairs))}")
    loaded = load_reopened(opened, config, probe_pairs(pairs), watcher)
    with catch_signals(watcher.say) as stop:
        cache = ReferenceCache(
            cache_folder(config),
            loaded.reference_name,
            older=loaded.older_name,
            base=opened.place.name,
            say=watcher.say,
        )
        scorer = Scorer(
            loaded=loaded,
            cache=cache,
            tokens_per_row=opened.tokens_per_row,
            watcher=watcher,
            stop=stop,
            loss=config.loss,
            seed=config.train.seed,
        )
        scorer.fill(pairs)
        adapter.load_adapter_folder(loaded.policy, run.adapter)
        watcher.begin("scoring", len(pairs), "pair")
        rows = pack_rows(pairs, opened.tokens_per_row)
        heeding = StoppableWatcher(watcher, stop, "while scoring")
        evaluation = evaluate(loaded.policy, rows, scorer.for_loss, config.loss, heeding.advance)
        watcher.finish()
        cache.close()
    return Rescored(str(folder), chosen.source, len(pairs), evaluation, trained)


def trained_before(pairs: Sequence[TokenPair], trained: Sequence[TokenPair]) -> TrainedBefore:
    """Compare by token ids: prompts, and whole pairs whichever answer was the better one."""
    prompts, known = set[bytes](), set[tuple[bytes, frozenset[bytes]]]()
    for pair in trained:
        prompts.add(_ids(pair.prompt))
        known.add(_whole(pair))
    return TrainedBefore(
        sum(_whole(pair) in known for pair in pairs), sum(_ids(pair.prompt) in prompts for pair in pairs)
    )


def _ids(ids: Any) -> bytes:
    return np.asarray(ids, dtype=np.int64).tobytes()


def _whole(pair: TokenPair) -> tuple[bytes, frozenset[bytes]]:
    return _ids(pair.prompt), frozenset((_ids(pair.chosen), _ids(pair.rejected)))


def choose(folder: Path, arguments: list[str], watcher: Watcher) -> Chosen:
    """The finished run in `folder`, and its held-out pairs or those of data.path. Raises: ConfigError, DataError."""
    opened = reopen(folder, arguments, watcher, may_change=("data.", *PLACES))
    if not any(argument.removeprefix("--").startswith("data.") for argument in arguments):
        return Chosen(opened, "the run's held-out pairs", stored.load(opened.run)[1])
    tokenizer, shape = tokenizer_of(opened.finished, opened.place.folder).tokenizer, model_config(opened.place.folder)
    data, limit = opened.config.data, positions(shape)
    if data.template == opened.finished.config().data.template != "plain":
        data = data.model_copy(update={"template": "auto"})  # the run's tokenizer has it; its file may be gone
    if limit is not None and data.max_tokens > limit.count and (limit.has_table or not _is_set(data)):
        watcher.say(f"data.max_tokens: {limit.count:,}, the model's positions; longer pairs are cut or dropped")
        data = shortened(data, limit.count)
    source, pairs = prepare.read_pairs(data, tokenizer, watcher)
    prepare.check_ids(pairs, shape.get_text_config().vocab_size, tokenizer)
    return Chosen(opened, source, pairs)


def _is_set(data: DataConfig) -> bool:
    return data.max_tokens != DataConfig().max_tokens
