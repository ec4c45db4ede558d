"""From settings to a loaded, checked policy and prepared pairs: a new run folder, or the one to continue."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qdpo.data import prepare, stored
from qdpo.data.positions import within_positions
from qdpo.data.tokens.store import PairStore, TokenPair
from qdpo.data.tokens.templates import settle_template
from qdpo.errors import ConfigError, DiskError
from qdpo.families.config_fields import positions
from qdpo.model.base import fetch
from qdpo.model.base.experts import left_dense
from qdpo.model.base.fetch import BaseFolder
from qdpo.model.base.load import load_tokenizer
from qdpo.model.base.text_model import TextModel, check_text_model, text_model
from qdpo.model.base.tokenizer_files import tokenizer_files
from qdpo.model.device import choose_device, choose_dtype, use_deterministic_kernels
from qdpo.model.generate.generate import stop_at
from qdpo.model.policy import adapter, adapter_source
from qdpo.run import disk, identity, places, record
from qdpo.run.folder import RunDir
from qdpo.run.record import (
    BaseRecord,
    FoundValues,
    RunRecord,
    read_environment,
    read_record,
    write_record,
    write_sealed,
)
from qdpo.run.watcher import Say, Watcher
from qdpo.settings import layered
from qdpo.settings.layered import Resolved
from qdpo.settings.loss_rules import couples_pairs, needs_reference
from qdpo.settings.schema import RunConfig
from qdpo.train.keep.stop import StoppableWatcher, StopRequest
from qdpo.train.policy.build import Loaded, load_policy, probe_pairs
from qdpo.train.policy.reference_cache import ReferenceCache
from qdpo.train.policy.reference_fill import Scorer
from qdpo.train.start import auto_memory
from qdpo.train.start.environment import environment
from qdpo.train.start.length import Passes, RunLength, few_held_out, measure_speed, plan_steps, within_hours
from qdpo.train.start.tokenizer import check_no_new_files, take_start, trained_ends
from qdpo.train.start.ways_out import WaysOut
from qdpo.train.step.optimizer import choose_optimizer
from qdpo.train.watch.prompts import SamplePrompt, held_out_prompts, prompts_of_file
from qdpo.train.watch.tracker import Tracker, check_package


@dataclass(frozen=True, kw_only=True)
class Job:
    """State that every phase of a run needs. `started` is a monotonic clock reading."""

    config: RunConfig
    """The settings, including the memory values that were found."""
    given: RunConfig
    run: RunDir
    watcher: Watcher
    stop: StopRequest
    started: float
    train: PairStore
    held_out: PairStore
    prompts: list[SamplePrompt]
    """Prompts that are completed at evaluations, for reading."""
    tokenizer: Any
    base: BaseFolder
    loaded: Loaded
    scorer: Scorer
    tracker: Tracker

    @property
    def found(self) -> FoundValues:
        """Values chosen at the first start: compute type, optimizer, steps."""
        return read_record(self.run).found

    def keep(self, **found: Any) -> None:
        """Records found values."""
        kept = read_record(self.run)
        write_record(self.run, replace(kept, found=replace(kept.found, **found)))


def open_run(resolved: Resolved, run: RunDir, watcher: Watcher, stop: StopRequest) -> Job:
    """Opens a run, up to a loaded policy; creates the run folder once data and settings are known to be usable."""
    config, say, started = resolved.config, watcher.say, time.monotonic()
    if disk.is_there(run.record):
        identity.check_unchanged(run, resolved)
        check_no_new_files(run, read_record(run))
        say(f"continuing {run.path}")
    check_package(config.track.to)
    if config.adapter.start is not None:
        adapter.check_adapter_folder(Path(config.adapter.start))
    device = choose_device(config.model.device, say)
    if config.train.deterministic and device.type == "cuda":
        use_deterministic_kernels()
    cache_dir = cache_folder(config)
    first = not disk.is_there(run.record)
    pinned = None if first else read_record(run).base.commit
    ways = WaysOut(config.adapter.start, say if first else lambda line: None)
    folder = fetch.locate_base(
        str(config.model.path), revision=pinned or config.model.revision, cache_dir=cache_dir, announce=say,
        refuse=lambda found: _refuse_before_download(config, found, device, say), look=ways.look,
    )  # fmt: skip
    stop.check("before the data was prepared")
    text = text_model(folder.folder)
    if text.is_part:
        say(f"model: the text model of {folder.name} ({text.cls.__name__}); its other parts are not loaded")
    layers = adapter_source.check_adapter(
        config.adapter.start, config.adapter.targets, folder, say, rank=config.adapter.rank, first=first
    )
    if first:
        ways.check(folder.folder, layers)
    tokenizer, shape = load_tokenizer(folder.folder), text.config
    config = within_positions(resolved, positions(shape), say)
    take_start(tokenizer, config.adapter.start, config.data.template, say)
    prompts = prompts_of_file(config.samples, config.data, tokenizer)
    if not disk.is_there(run.record):
        _first_start(resolved, config, run, folder, device, tokenizer, watcher, stop, layers)
    train, held_out = stored.load_or_prepare(
        run, config.data, tokenizer, seed=config.train.seed, watcher=_while_preparing(watcher, stop), scratch=cache_dir
    )
    for part in (train, held_out):
        prepare.check_ids(part, shape.get_text_config().vocab_size, tokenizer)
    settle_template(tokenizer, config.data.template)  # what samples and the saved tokenizer use
    identity.take_neutral(run, config)
    _mend(run, resolved, device, say)
    prompts = held_out_prompts(held_out, config.samples.count) if prompts is None else prompts
    found = read_record(run).found
    config = auto_memory.settled(config, found.memory)
    stop.check("before the model was loaded")
    watcher.begin("loading the model", 1, "model")
    loaded = load_policy(
        config, folder.folder, device=device, dtype=found.dtype, probe_with=probe_pairs(train), say=say,
        layers=found.adapted, of_0_1=found.adapted is None, dense_experts=left_dense(read_record(run)),
    )  # fmt: skip
    watcher.finish()
    stop.check("after the model was loaded")
    _check_weights(run, folder, loaded, text)
    stop_at(loaded.policy.peft, trained_ends(run, read_record(run), tokenizer, config.data))
    names = {"name": loaded.reference_name, "older": loaded.older_name}
    cache = ReferenceCache(cache_dir, **names, base=folder.name, say=say)
    assert isinstance(config.memory.tokens_per_row, int)
    scorer = Scorer(
        loaded=loaded,
        cache=cache,
        tokens_per_row=config.memory.tokens_per_row,
        watcher=watcher,
        stop=stop,
        loss=config.loss,
        seed=config.train.seed,
    )
    tracker = Tracker(config.track.to, run, identity.trajectory_settings(resolved), say)
    return Job(
        config=config, given=resolved.config, run=run, watcher=watcher, stop=stop, started=started, train=train,
        held_out=held_out, prompts=prompts, tokenizer=tokenizer, base=folder, loaded=loaded, scorer=scorer,
        tracker=tracker,
    )  # fmt: skip


def _refuse_before_download(config: RunConfig, found: dict[str, Any], device: torch.device, say: Say) -> None:
    check_text_model(found, str(config.model.path))
    auto_memory.refuse_hopeless(config, found, device, say)


def cache_folder(config: RunConfig) -> Path:
    """The folder that holds reference log-probs and converted bases."""
    return disk.cache_folder(config.cache.dir)


def try_worst_row(job: Job) -> None:
    """Tries the longest possible row, so that a lack of memory shows now. Records memory.kept_layers if lowered."""
    device = job.loaded.policy.device
    parameters = job.loaded.policy.adapter_parameters().values()
    state_bytes = 8 if job.found.optimizer == "adamw" else 2
    kept = job.config.memory.kept_layers
    assert kept != "auto"
    fits = auto_memory.try_worst_row(
        job.loaded,
        [*job.train, *job.held_out],
        tokens_per_row=job.scorer.tokens_per_row,
        kept_layers=kept,
        may_lower=device.type == "cuda" and job.given.memory.kept_layers == "auto",
        optimizer_bytes=state_bytes * sum(parameter.numel() for parameter in parameters),
        say=job.watcher.say,
    )
    if fits != kept:
        job.keep(kept_layers=fits)


def plan_run(job: Job) -> RunLength:
    """Steps and warm-up: as recorded; at the first start computed from epochs, steps or hours, and recorded."""
    found, train = job.found, job.config.train
    if found.steps is None:
        plan = plan_steps(train, len(job.train))
        if train.hours is not None:
            speed = measure_speed(
                job.loaded.policy, job.train, tokens_per_row=job.scorer.tokens_per_row, seed=train.seed
            )
            passes = Passes(
                reference=needs_reference(job.config.loss.name), coupled=couples_pairs(job.config.loss.name)
            )
            spent_s = time.monotonic() - job.started
            shorter = within_hours(train, len(job.train), len(job.held_out), speed, passes, spent_s)
            job.watcher.say(
                f"train.hours={train.hours:g}: {1 / passes.pair_s(speed):.2f} pairs/s measured, all passes included; "
                f"{min(shorter.steps, plan.steps)} of {plan.steps} steps fit"
            )
            plan = min(plan, shorter, key=lambda candidate: candidate.steps)
        job.keep(steps=plan.steps, total_pairs=plan.total_pairs, warmup_steps=plan.warmup_steps)
    else:
        if found.total_pairs is None or found.warmup_steps is None:
            raise record.damaged(job.run.record, "it has the number of steps, but not of pairs or warm-up steps")
        plan = RunLength(found.steps, found.total_pairs, found.warmup_steps)
    job.watcher.say(f"plan: {plan.steps} steps of {train.pairs_per_step} pairs, {plan.warmup_steps} of them warm-up")
    return plan


def _check_weights(run: RunDir, folder: BaseFolder, loaded: Loaded, text: TextModel) -> None:
    kept = read_record(run)
    if kept.weights not in (None, loaded.weights):
        why = "Put the model back, or start again with `--fresh`."
        if text.is_part and kept.found.adapted is None:
            why = (
                f"qdpo 0.1 loaded the whole checkpoint ({text.whole.__name__}), with LoRA in its other parts too; this "
            )
            why += f"version trains {text.cls.__name__} alone. Start again with `--fresh`, or finish it with qdpo 0.1."
        raise ConfigError(
            f"The weights loaded from {folder.folder} are not those that {run.path} was started with. {why}"
        )
    write_record(run, replace(kept, weights=loaded.weights, four_bit=loaded.marks))


def _first_start(
    resolved: Resolved,
    config: RunConfig,
    run: RunDir,
    folder: BaseFolder,
    device: torch.device,
    tokenizer: Any,
    watcher: Watcher,
    stop: StopRequest,
    layers: list[str] | None,
) -> None:
    """Prepares the data, then writes the run folder with all found values, whole or not at all.

    `config` holds the settings as they are used, `resolved` as they were given; `layers` get LoRA.
    """
    if disk.is_there(run.path) and (not places.is_folder(run.path) or any(run.path.iterdir())):
        raise ConfigError(
            f"{run.path} exists but is not a qdpo run: it has no {run.record.name}. Put that file back if it was one, "
            "choose another `output.name`, or start again with `--fresh` (what is there is kept aside)."
        )
    say, shape = watcher.say, text_model(folder.folder).config
    dtype = choose_dtype(config.model.dtype, device, say)
    cache = cache_folder(config)
    data = prepare.prepare_data(
        config.data, tokenizer, seed=config.train.seed, watcher=_while_preparing(watcher, stop), scratch=cache
    )
    if few := few_held_out(config.data, len(data.train), len(data.held_out)):
        say(few)
    pairs = [*data.train, *data.held_out]  # an index: the ids stay on disk
    prepare.check_ids(pairs, shape.get_text_config().vocab_size, tokenizer)
    _check_space(run, cache, pairs)
    files = [*data.files, *(record.model_files(folder.folder) if folder.commit is None else [])]
    if (start := config.adapter.start) is not None:
        files += [Path(start) / adapter.WEIGHTS, Path(start) / adapter.CONFIG, *tokenizer_files(Path(start))]
    optimizer = choose_optimizer(config.train.optimizer, device, say)
    stop.check("before the memory was planned")  # an unknown model is traced for that, which takes a minute
    memory = auto_memory.choose_memory(
        config, folder.folder, pairs, device=device, dtype=dtype, optimizer=optimizer, say=say
    )
    found = FoundValues(
        dtype=dtype, optimizer=optimizer, revision=folder.commit, adapted=layers, **dataclasses.asdict(memory)
    )

    def fill(path: Path) -> None:
        new = RunDir(path)
        digests = stored.store(new, data)
        disk.write_text(new.config, identity.config_toml(resolved, found))
        write_sealed(new.environment, environment(device))
        content = RunRecord(
            settings=layered.flat(resolved.config),
            preset=resolved.preset,
            found=found,
            base=BaseRecord(**{**dataclasses.asdict(folder), "folder": str(folder.folder)}),
            data=data.about,
            files={str(file.absolute()): record.file_record(file) for file in files},
            prepared=digests,
            version=record.VERSION,
        )
        write_record(new, content)

    disk.write_folder(run.path, fill)
    say(f"run folder: {run.path}")


def _while_preparing(watcher: Watcher, stop: StopRequest) -> StoppableWatcher:
    return StoppableWatcher(watcher, stop, "while the data was prepared")


def _mend(run: RunDir, resolved: Resolved, device: torch.device, say: Callable[[str], None]) -> None:
    """Writes config.toml and environment.json again if they are missing or damaged, and says so."""
    try:
        read_environment(run)
    except DiskError as error:
        write_sealed(run.environment, environment(device))
        say(f"warning: {error}")
        say(f"{run.environment.name} is written again, with today's versions")
    if not identity.is_config(run.config):
        disk.write_text(run.config, identity.config_toml(resolved, read_record(run).found))
        say(f"warning: {run.config} was missing or damaged; it is written again")


def _check_space(run: RunDir, cache: Path, pairs: Sequence[TokenPair]) -> None:
    """Checks for room for ids (4 bytes a token), the cache (4 bytes a response token, plus keys) and checkpoints."""
    tokens = sum(pair.tokens for pair in pairs)
    disk.need_space(run.path.parent, 500 * 2**20 + 8 * tokens, "A run (checkpoints, adapter, token ids)")
    disk.need_space(cache, 20 * 2**20 + 8 * tokens, "The reference cache")
