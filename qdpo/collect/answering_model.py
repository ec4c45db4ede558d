"""The model that generates answers: the one that training would start from, or a finished run's."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qdpo.data.layouts.origin import Origin
from qdpo.data.tokens.templates import settle_template
from qdpo.model.base import fetch, quant
from qdpo.model.base.load import load_tokenizer
from qdpo.model.base.text_model import check_text_model
from qdpo.model.device import choose_device, choose_dtype
from qdpo.model.generate.generate import stop_at
from qdpo.model.policy.adapter import WEIGHTS, check_adapter_folder, start_adapter
from qdpo.model.policy.adapter_source import check_adapter
from qdpo.review.open import reopen, tuned
from qdpo.run.disk import cache_folder
from qdpo.run.record import file_record
from qdpo.run.watcher import Watcher
from qdpo.settings import layered
from qdpo.settings.schema import DataConfig
from qdpo.train.policy.build import base_of, check_base_unchanged
from qdpo.train.start.tokenizer import start_ends, take_start


@dataclass(frozen=True)
class Sampler:
    """A loaded model, the settings that render prompts for it, and the origin recorded for its answers."""

    model: Any
    tokenizer: Any
    data: DataConfig
    device: torch.device
    origin: Origin


def base_sampler(arguments: list[str], watcher: Watcher) -> Sampler:
    """Load the base that the settings name (4-bit by default), with adapter.start on top if given.

    Raises: ConfigError for unusable settings, model or adapter; OutOfMemoryError if the model does not fit.
    """
    given = any(argument.removeprefix("--").startswith("data.path=") for argument in arguments)
    config = layered.resolve(arguments if given else [*arguments, "data.path=none-needed"]).config
    settings, say = config.model, watcher.say
    if config.adapter.start is not None:
        check_adapter_folder(Path(config.adapter.start))
    device = choose_device(settings.device, say)
    place = fetch.locate_base(
        str(settings.path), revision=settings.revision, cache_dir=cache_folder(config.cache.dir), announce=say,
        refuse=lambda found: check_text_model(found, str(settings.path)),
    )  # fmt: skip
    check_adapter(config.adapter.start, config.adapter.targets, place, say)
    tokenizer = load_tokenizer(place.folder)
    take_start(tokenizer, config.adapter.start, config.data.template, say)
    if note := settle_template(tokenizer, config.data.template):
        say(note)
    watcher.begin("loading the model", 1, "model")
    model = base_of(config, place.folder, device, choose_dtype(settings.dtype, device, say), say)
    weights = quant.weights_checksum(model)
    origin = Origin(str(settings.path), weights)
    if config.adapter.start is not None:
        folder = Path(config.adapter.start)
        model = start_adapter(model, folder)
        check_base_unchanged(model, weights)
        name = "/".join(folder.resolve().parts[-2:])
        origin = replace(origin, run=name, adapter=file_record(folder / WEIGHTS).sha256)
    watcher.finish()
    stop_at(model, start_ends(tokenizer, config.adapter.start, config.data))
    return Sampler(model, tokenizer, config.data, device, origin)


def run_sampler(run: Path, arguments: list[str], watcher: Watcher) -> Sampler:
    """Load the model that a finished run has trained. Raises: ConfigError if `run` is not a finished run."""
    opened = reopen(run, arguments, watcher)
    policy, tokenizer = tuned(opened, watcher)
    adapter = file_record(opened.run.adapter / WEIGHTS).sha256
    origin = Origin(str(opened.config.model.path), opened.finished.record.weights, run.resolve().name, adapter)
    return Sampler(policy.peft, tokenizer, opened.config.data, opened.device, origin)
