"""Scores a trained run again: its own held-out pairs, or any other pairs."""

from dataclasses import dataclass
from pathlib import Path

from qdpo.data.pack import pack_rows
from qdpo.model import adapter, base
from qdpo.train import prepare, signals
from qdpo.train.evaluate import Evaluation, evaluate
from qdpo.train.meters import Watcher
from qdpo.train.policy import probe_pairs
from qdpo.train.reference import ReferenceCache
from qdpo.train.reopen import PLACES, load_reopened, reopen
from qdpo.train.scoring import Scorer
from qdpo.train.start import cache_folder


@dataclass(frozen=True)
class Rescored:
    """Metrics of the run's adapter on `pairs` pairs of `source`."""

    run: str
    source: str
    pairs: int
    evaluation: Evaluation


def rescore(folder: Path, arguments: list[str], watcher: Watcher) -> Rescored:
    """Evaluates the run's adapter. Without data.path its own held-out pairs are scored, else every usable pair given.

    Raises: ConfigError if `folder` is not a finished run, or a setting is given that would make it another model.
    """
    opened = reopen(folder, arguments, watcher, may_change=("data.", *PLACES))
    run, config = opened.run, opened.config
    if any(argument.removeprefix("--").startswith("data.") for argument in arguments):
        tokenizer = base.load_tokenizer(opened.place.folder)
        source, pairs = prepare.read_pairs(config.data, tokenizer, watcher)
    else:
        source, pairs = "the run's held-out pairs", prepare.load(run)[1]
    loaded = load_reopened(opened, config, probe_pairs(pairs), watcher)
    with signals.listen(watcher.say) as stop:
        cache = ReferenceCache(cache_folder(config), loaded.reference_name, base=opened.place.name, say=watcher.say)
        scorer = Scorer(loaded, cache, opened.tokens_per_row, watcher, stop, config.loss, config.train.seed)
        scorer.fill(pairs)
        adapter.load_adapter_folder(loaded.policy, run.adapter)
        watcher.begin("scoring", len(pairs), "pair")
        rows = pack_rows(pairs, opened.tokens_per_row)
        evaluation = evaluate(loaded.policy, rows, scorer.for_loss, config.loss, watcher.advance)
        watcher.finish()
        cache.close()
    return Rescored(str(folder), source, len(pairs), evaluation)
