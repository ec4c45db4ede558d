"""Scores a trained run again: its own held-out pairs, or any other pairs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo import presets, rundir
from qdpo.config import RunConfig
from qdpo.data.pack import pack_rows
from qdpo.data.tokens import TokenPair
from qdpo.errors import ConfigError
from qdpo.model import adapter, base, fetch
from qdpo.model.fetch import BaseFolder
from qdpo.rundir import RunDir
from qdpo.train import fit, prepare, signals
from qdpo.train.evaluate import Evaluation, evaluate
from qdpo.train.meters import Watcher
from qdpo.train.policy import load_policy, probe_pairs
from qdpo.train.reference import ReferenceCache
from qdpo.train.scoring import Scorer
from qdpo.train.start import cache_folder

# Settings that may differ from the run's: which pairs, where to compute, where to keep the cache.
MAY_CHANGE = ("data.", "model.device", "memory.", "cache.dir")


@dataclass(frozen=True)
class Rescored:
    """Metrics of the run's adapter on `pairs` pairs of `source`."""

    run: str
    source: str
    pairs: int
    evaluation: Evaluation


@dataclass(frozen=True)
class Chosen:
    """A finished run, and the pairs to score it on."""

    run: RunDir
    config: RunConfig
    kept: dict[str, Any]
    """run.json."""
    base: BaseFolder
    source: str
    pairs: Sequence[TokenPair]


def rescore(folder: Path, arguments: list[str], watcher: Watcher) -> Rescored:
    """Evaluates the run's adapter. Without data.path its own held-out pairs are scored, else every usable pair given.

    Raises: ConfigError if `folder` is not a finished run, or a setting is given that would make it another model.
    """
    chosen = choose(folder, arguments, watcher)
    config, kept, pairs = chosen.config, chosen.kept, chosen.pairs
    tokens_per_row = config.memory.tokens_per_row
    assert isinstance(tokens_per_row, int)
    device = base.choose_device(config.model.device, watcher.say)
    watcher.begin("loading the model", 1, "model")
    dtype = kept["found"]["model.dtype"]
    loaded = load_policy(
        config, chosen.base.folder, device=device, dtype=dtype, probe_with=probe_pairs(pairs), say=watcher.say
    )
    watcher.finish()
    if loaded.weights != kept["weights"]:
        watcher.say("warning: the base's weights as loaded here are not those of the training run")
    with signals.listen(watcher.say) as stop:
        cache = ReferenceCache(cache_folder(config), loaded.reference_name, base=chosen.base.name, say=watcher.say)
        scorer = Scorer(loaded, cache, tokens_per_row, watcher, stop, config.loss, config.train.seed)
        scorer.fill(pairs)
        adapter.load_adapter_folder(loaded.policy, chosen.run.adapter)
        watcher.begin("scoring", len(pairs), "pair")
        rows = pack_rows(pairs, tokens_per_row)
        evaluation = evaluate(loaded.policy, rows, scorer.for_loss, config.loss, watcher.advance)
        watcher.finish()
        cache.close()
    return Rescored(str(folder), chosen.source, len(pairs), evaluation)


def choose(folder: Path, arguments: list[str], watcher: Watcher) -> Chosen:
    """The finished run in `folder`, its base, and its held-out pairs or those of data.path. Raises: ConfigError."""
    run = RunDir(folder)
    if not run.result.is_file():
        raise ConfigError(f"{folder} is not a finished run: it has no {run.result.name}. `qdpo runs` lists the runs.")
    kept = rundir.read_json(run.record)
    config, given = _settings(kept["settings"], arguments)
    if not any(argument.removeprefix("--").startswith("memory.tokens_per_row") for argument in arguments):
        found = kept["found"]
        names = {"memory.tokens_per_row": 0, "memory.embeddings": "device"}
        config = fit.settled(config, {name: found.get(name, value) for name, value in names.items()})
    if config.memory.tokens_per_row == "auto":
        raise ConfigError("memory.tokens_per_row=auto belongs to training. Give a number, or leave it out.")
    revision = kept["base"]["commit"] or config.model.revision
    place = fetch.locate_base(
        str(config.model.path), revision=revision, cache_dir=cache_folder(config), announce=watcher.say
    )
    if given:
        tokenizer = base.load_tokenizer(place.folder)
        source, pairs = prepare.read_pairs(config.data, tokenizer, watcher)
        prepare.check_ids(pairs, base.model_config(place.folder).get_text_config().vocab_size, tokenizer)
    else:
        source, pairs = "the run's held-out pairs", prepare.load(run)[1]
    return Chosen(run, config, kept, place, source, pairs)


def _settings(kept: dict[str, Any], arguments: list[str]) -> tuple[RunConfig, bool]:
    """The run's settings with `arguments` above them, and whether other pairs were asked for."""
    given = {argument.removeprefix("--").partition("=")[0] for argument in arguments}
    fixed = [name for name in sorted(given) if not name.startswith(MAY_CHANGE)]
    if fixed:
        raise ConfigError(
            f"{', '.join(fixed)} cannot differ from the trained run. Only {', '.join(MAY_CHANGE)} settings can."
        )
    config = presets.resolve_over(kept, "the run", arguments).config
    return config, any(name.startswith("data.") for name in given)
