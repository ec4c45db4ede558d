"""Reopens a finished run: its settings, its base as it was loaded, and its trained adapter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qdpo.data import stored
from qdpo.errors import ConfigError
from qdpo.model.base import fetch
from qdpo.model.base.experts import left_dense
from qdpo.model.base.fetch import BaseFolder
from qdpo.model.base.load import model_config
from qdpo.model.device import choose_device
from qdpo.model.generate.generate import stop_at
from qdpo.model.policy.adapter import Policy
from qdpo.model.policy.lora_fit import check_part
from qdpo.run.finished import FinishedRun, finished_run
from qdpo.run.folder import RunDir
from qdpo.run.watcher import Watcher
from qdpo.settings.schema import RunConfig
from qdpo.train.policy.build import Loaded, load_policy, probe_pairs
from qdpo.train.start.open_run import cache_folder
from qdpo.train.start.tokenizer import tokenizer_of

# Settings that may differ from the run's: the device, memory settings, and the cache folder.
PLACES = ("model.device", "memory.", "cache.dir")


@dataclass(frozen=True, kw_only=True)
class Reopened:
    """A finished run, its settings with overrides, and the folder of its base."""

    finished: FinishedRun
    config: RunConfig
    device: torch.device
    place: BaseFolder

    @property
    def run(self) -> RunDir:
        return self.finished.run

    @property
    def tokens_per_row(self) -> int:
        """Token budget of a forward row."""
        rows = self.config.memory.tokens_per_row
        assert rows != "auto"
        return rows


def reopen(folder: Path, arguments: list[str], watcher: Watcher, *, may_change: tuple[str, ...] = PLACES) -> Reopened:
    """Read a finished run; `arguments` may only contain settings that begin with one of `may_change`.

    Raises: ConfigError if `folder` is not a finished run, or a setting is given that would change the model.
    """
    finished = finished_run(folder)
    record = finished.record
    config = _settings(finished, arguments, may_change)
    if not any(argument.removeprefix("--").startswith("memory.tokens_per_row") for argument in arguments):
        settled = {"tokens_per_row": record.found.tokens_per_row, "embeddings": record.found.embeddings}
        config = config.model_copy(update={"memory": config.memory.model_copy(update=settled)})
    if config.memory.tokens_per_row == "auto":
        raise ConfigError("memory.tokens_per_row=auto works only in training. Give a number, or leave it out.")
    device = choose_device(config.model.device, watcher.say)
    revision = record.base.commit or config.model.revision
    finished.check_base()
    place = fetch.locate_base(
        str(config.model.path), revision=revision, cache_dir=cache_folder(config), announce=watcher.say
    )
    finished.check_base_files(place.folder)
    check_part(model_config(place.folder), finished.run.adapter)
    return Reopened(finished=finished, config=config, device=device, place=place)


def load_reopened(opened: Reopened, config: RunConfig, probe_with: Any, watcher: Watcher) -> Loaded:
    """Load the run's base with the adapter in `config`; warn if the base's weights differ from the training's."""
    watcher.begin("loading the model", 1, "model")
    record = opened.finished.record
    loaded = load_policy(
        config, opened.place.folder, device=opened.device, dtype=record.found.dtype, probe_with=probe_with,
        say=watcher.say, layers=record.found.adapted, of_0_1=record.found.adapted is None,
        dense_experts=left_dense(record),
    )  # fmt: skip
    watcher.finish()
    if loaded.weights != record.weights:
        watcher.say("warning: the base's weights as loaded here are not those of the training run")
    return loaded


def tuned(opened: Reopened, watcher: Watcher) -> tuple[Policy, Any]:
    """The policy with the run's trained adapter, which `policy.reference()` turns off, and the run's tokenizer.

    The adapter comes from the run folder alone: a run that continued another adapter no longer needs that adapter.
    """
    found = tokenizer_of(opened.finished, opened.place.folder)
    adapter = opened.config.adapter.model_copy(update={"start": str(opened.run.adapter), "reference": "base"})
    config = opened.config.model_copy(update={"adapter": adapter})
    loaded = load_reopened(opened, config, probe_pairs(stored.load(opened.run)[1]), watcher)
    stop_at(loaded.policy.peft, found.ends.trained)
    return loaded.policy, found.tokenizer


def _settings(finished: FinishedRun, arguments: list[str], may_change: tuple[str, ...]) -> RunConfig:
    """The run's settings, overridden by `arguments`."""
    given = {argument.removeprefix("--").partition("=")[0] for argument in arguments}
    fixed = [name for name in sorted(given) if not name.startswith(may_change)]
    if fixed:
        raise ConfigError(
            f"{', '.join(fixed)} cannot differ from the trained run. Only "
            f"{', '.join(name + '*' * name.endswith('.') for name in may_change)} can. Leave it out."
        )
    return finished.config(arguments)
