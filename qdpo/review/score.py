"""Scores a trained run again, on its own held-out pairs or on other pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qdpo.data import prepare
from qdpo.data.tokens.pack import pack_rows
from qdpo.data.tokens.sieve import TokenPair
from qdpo.model.base.load import model_config
from qdpo.model.policy import adapter
from qdpo.review.open import PLACES, Reopened, load_reopened, reopen
from qdpo.run.watcher import Watcher
from qdpo.train.keep.stop import catch_signals
from qdpo.train.policy.build import probe_pairs
from qdpo.train.policy.reference_cache import ReferenceCache
from qdpo.train.policy.reference_fill import Scorer
from qdpo.train.start.open_run import cache_folder
from qdpo.train.start.tokenizer import tokenizer_of
from qdpo.train.watch.evaluate import Evaluation, evaluate


@dataclass(frozen=True)
class Rescored:
    """Metrics of the run's adapter on `pairs` pairs of `source`."""

    run: str
    source: str
    pairs: int
    evaluation: Evaluation


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
    loaded = load_reopened(opened, config, probe_pairs(pairs), watcher)
    with catch_signals(watcher.say) as stop:
        cache = ReferenceCache(cache_folder(config), loaded.reference_name, base=opened.place.name, say=watcher.say)
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
        evaluation = evaluate(loaded.policy, rows, scorer.for_loss, config.loss, watcher.advance)
        watcher.finish()
        cache.close()
    return Rescored(str(folder), chosen.source, len(pairs), evaluation)


def choose(folder: Path, arguments: list[str], watcher: Watcher) -> Chosen:
    """The finished run in `folder`, and its held-out pairs or those of data.path. Raises: ConfigError, DataError."""
    opened = reopen(folder, arguments, watcher, may_change=("data.", *PLACES))
    if not any(argument.removeprefix("--").startswith("data.") for argument in arguments):
        return Chosen(opened, "the run's held-out pairs", prepare.load(opened.run)[1])
    tokenizer = tokenizer_of(opened.finished, opened.place.folder).tokenizer
    data = opened.config.data
    if data.template == opened.finished.config().data.template != "plain":
        data = data.model_copy(update={"template": "auto"})  # the run's tokenizer has it; its file may be gone
    source, pairs = prepare.read_pairs(data, tokenizer, watcher)
    prepare.check_ids(pairs, model_config(opened.place.folder).get_text_config().vocab_size, tokenizer)
    return Chosen(opened, source, pairs)
