"""The training loop of a run: prepare, load, score the reference, then step, log, evaluate, save."""

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qdpo.diagnose.course import Record
from qdpo.diagnose.rules import Finding
from qdpo.errors import Interrupted, OutOfMemoryError, StoppedByFinding, VerificationError
from qdpo.model.device import peak_gib, release_memory
from qdpo.model.policy import adapter
from qdpo.run import disk, identity, lock, places
from qdpo.run.finished import adapter_settings, adapter_weights
from qdpo.run.folder import RunDir
from qdpo.run.record import Result, damaged, read_record, write_record, write_sealed
from qdpo.run.watcher import PAIRS, Watcher
from qdpo.settings.layered import Resolved
from qdpo.train.between_steps import Checkup
from qdpo.train.keep import checkpoint
from qdpo.train.keep.checkpoint import TrainedObjects
from qdpo.train.keep.disk_full import Saver
from qdpo.train.keep.progress import Progress
from qdpo.train.keep.stop import StopRequest, catch_signals
from qdpo.train.start import auto_memory
from qdpo.train.start.length import RunLength
from qdpo.train.start.open_run import Job, open_run, plan_run, try_worst_row
from qdpo.train.start.tokenizer import save_tokenizer
from qdpo.train.step import reach
from qdpo.train.step.feed import Feed, ReadyRow
from qdpo.train.step.optimizer import learning_rate, make_optimizer
from qdpo.train.step.out_of_memory import Recovery
from qdpo.train.step.step import StepReport, train_step
from qdpo.train.watch.alarm import Alarm, terms
from qdpo.train.watch.evaluate import Evaluation, reference_offset
from qdpo.train.watch.metrics_file import Metrics


def run_training(resolved: Resolved, watcher: Watcher) -> Result:
    """Starts or continues the run that `resolved` describes; returns the contents of result.json.

    Raises: QdpoError. After Interrupted, and most other errors, the run folder holds everything needed to continue.
    """
    run = identity.run_folder(resolved)
    try:
        with lock.exclusive(run), catch_signals(watcher.say) as stop:
            return _run(resolved, run, watcher, stop)
    except torch.cuda.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"The card is out of memory: {str(error).splitlines()[0]} The last checkpoint is intact. Lower "
            "`data.max_tokens`, `memory.kept_layers` or `memory.head_tile_mib`, or choose a preset for a smaller card."
        ) from error


def _run(resolved: Resolved, run: RunDir, watcher: Watcher, stop: StopRequest) -> Result:
    places.check_places(run)
    lock.clear_leftovers(run)
    job = open_run(resolved, run, watcher, stop)
    try:
        try_worst_row(job)
        plan = plan_run(job)
        used = {index for step in range(plan.steps) for index in plan.indices(step, job.config.train, len(job.train))}
        stop.check("before the reference was scored")
        job.scorer.fill([job.train[index] for index in sorted(used)], job.held_out)
        parameters = list(job.loaded.policy.adapter_parameters().values())
        stop.check("before training")
        optimizer = make_optimizer(job.found.optimizer, parameters, weight_decay=job.config.train.weight_decay)
        # fp16 gradients underflow without a loss scale; other types need none, and a disabled scaler does nothing.
        scaler = torch.amp.GradScaler(
            job.loaded.policy.device.type, enabled=job.found.dtype == "fp16", init_scale=2.0**14
        )
        feed = Feed(
            lambda step: [job.train[index] for index in plan.indices(step, job.config.train, len(job.train))],
            job.scorer.for_loss,
            tokens_per_row=job.scorer.tokens_per_row,
            device=job.loaded.policy.device,
        )
        with contextlib.closing(feed):
            outcome = _train(job, plan, TrainedObjects(job.loaded.policy, optimizer, scaler), feed)
        return _finish(job, plan, outcome)
    finally:
        job.tracker.close()
        job.scorer.cache.close()


@dataclass(frozen=True)
class TrainingOutcome:
    """The outcome of training: held-out metrics before and after, the progress made, and the run's evaluations."""

    before: dict[str, float]
    after: Evaluation
    progress: Progress
    checkup: Checkup


def _train(job: Job, plan: RunLength, trained: TrainedObjects, feed: Feed) -> TrainingOutcome:
    """Steps from the newest checkpoint (or 0) to the end."""
    config = job.config
    progress, metrics, alarm, checkup, saver = _resume_or_evaluate(job, plan, trained)
    parameters = list(trained.policy.adapter_parameters().values())
    recovery = Recovery(
        job.found.row_splits or {}, trained.policy.device, job.watcher.say,
        lambda splits: job.keep(row_splits=splits),
    )  # fmt: skip

    def save() -> None:
        metrics.flush()  # a checkpoint must not be ahead of its steps and samples: they would be lost
        checkup.write()
        checkpoint.save_checkpoint(job.run.checkpoints, trained, progress, keep=config.train.keep_checkpoints)

    last: Evaluation | None = None
    tokens = metrics.last_tokens
    job.watcher.begin("training", plan.steps, "step")
    job.watcher.advance(progress.step)
    for step in range(progress.step, plan.steps):
        begun = time.monotonic()
        rate = learning_rate(
            step,
            steps=plan.steps,
            warmup_steps=plan.warmup_steps,
            peak=config.train.learning_rate,
            schedule=config.train.schedule,
        )
        for group in trained.optimizer.param_groups:
            group["lr"] = rate
        rows = feed.rows(step, last=plan.steps - 1)

        def compute(rows: Sequence[ReadyRow], sided: bool) -> StepReport:
            return train_step(
                trained.policy, parameters, trained.optimizer, trained.scaler, rows, config.loss,
                max_grad_norm=config.train.max_grad_norm, sided=sided,
            )  # fmt: skip

        try:
            report = recovery.run_step(step, rows, compute)
        except OutOfMemoryError as error:
            save()
            raise OutOfMemoryError(f"{error} {auto_memory.after_failure(job.config, job.train, progress)}") from None
        tokens += report.tokens
        seconds = time.monotonic() - begun
        progress = _after_step(job, progress, step, report, seconds, last=step + 1 == plan.steps)
        line = _step_record(job, progress, report, rate, seconds, tokens)
        metrics.write(line)
        job.watcher.step({**line, PAIRS: report.pairs})
        job.watcher.advance(1)
        alarm.check(line)
        done = step + 1
        if done == plan.steps or done % config.train.eval_every == 0:
            last = checkup.evaluate(done)
            job.watcher.begin("training", plan.steps, "step")
            job.watcher.advance(done)
        if done == plan.steps:
            saver.save_or_wait(save)
        elif job.stop.number is not None or alarm.stops_on is not None:
            save()
        elif done % config.train.save_every == 0:
            saver.try_save(save)
        if job.stop.number is not None and done < plan.steps:
            raise Interrupted(
                f"Stopped after step {done} of {plan.steps}, which is saved. The same command continues.",
                job.stop.number,
            )
        if alarm.stops_on is not None and done < plan.steps:
            raise _stopped(alarm.stops_on, done, plan)
    job.watcher.finish()
    before = read_record(job.run).before
    if before is None:
        raise damaged(job.run.record, "it has no 'before', although steps are done")
    return TrainingOutcome(before, last or checkup.evaluate(plan.steps), progress, checkup)


def _resume_or_evaluate(
    job: Job, plan: RunLength, trained: TrainedObjects
) -> tuple[Progress, Metrics, Alarm, Checkup, Saver]:
    """Resumes the run from its newest checkpoint, or evaluates it before its first step."""
    config = job.config
    progress = Progress()
    newest = (
        checkpoint.newest_checkpoint(job.run.checkpoints, job.watcher.say) if job.run.checkpoints.is_dir() else None
    )
    if newest is None:
        keep_through = -1
    else:
        progress = checkpoint.load_checkpoint(newest, trained)
        if progress.step > plan.steps:
            raise damaged(newest, f"it is of step {progress.step}, but the run has {plan.steps}")
        checkpoint.prune(job.run.checkpoints, keep=config.train.keep_checkpoints)
        job.watcher.say(f"resuming after step {progress.step} of {plan.steps}")
        keep_through = progress.step
    metrics = Metrics(job.run.metrics, keep_through=keep_through, tracker=job.tracker, say=job.watcher.say)
    saver = Saver(job.watcher.say, job.stop, config.output.on_disk_full)
    alarm = Alarm(
        terms(config, steps=plan.steps, held_out=len(job.held_out)), config.train.stop_when or [], job.watcher.say
    )
    alarm.replay(metrics.kept)
    checkup = Checkup(job, metrics, alarm, saver, steps=plan.steps, keep_through=keep_through)
    if newest is None:
        before = checkup.evaluate(0)
        _check_offset(job, before)
        write_record(job.run, replace(read_record(job.run), before=before.values))
    elif alarm.stops_on is not None and progress.step < plan.steps:
        raise _stopped(alarm.stops_on, progress.step, plan)
    return progress, metrics, alarm, checkup, saver


def _stopped(finding: Finding, step: int, plan: RunLength) -> StoppedByFinding:
    return StoppedByFinding(
        f"Stopped by train.stop_when={finding.rule} after step {step} of {plan.steps}, which is saved: "
        f"{finding.evidence}. {finding.advice} To continue, add `train.stop_when=none` to the same command."
    )


def _check_offset(job: Job, before: Evaluation) -> None:
    """Checks that an untouched adapter equals its reference. Raises: VerificationError if it does not."""
    untouched_is_reference = job.config.adapter.start is None or job.loaded.reference_is_start
    if not untouched_is_reference or job.scorer.for_loss is None:
        return
    mean, largest = reference_offset(before, job.config.loss.beta)
    longest = max(len(pair.chosen) + len(pair.rejected) for pair in job.held_out)
    job.watcher.say(f"reference offset of the untouched adapter: mean {mean:.3g}, largest {largest:.3g} nats")
    # 16-bit rounding grows with the square root of the tokens; wrong weights or tokens give tens of nats.
    bound = 0.05 + 0.05 * math.sqrt(longest)
    if largest > bound:
        raise VerificationError(
            "The cached reference does not belong to this model: an untouched adapter differs by "
            f"{largest:.3g} nats (bound {bound:.2g}). {job.scorer.cache.way_out}"
        )


def _after_step(job: Job, progress: Progress, step: int, report: StepReport, seconds: float, *, last: bool) -> Progress:
    if report.overflow:
        job.watcher.say(f"step {step + 1}: update skipped, loss scale lowered (fp16 overflow)")
    elif step == 0 and report.grad_norm == 0:
        raise VerificationError(
            "The gradient of the first step is exactly 0, so the adapter would learn nothing. Chosen and rejected "
            "answers may be identical after truncation, or `adapter.targets` may match no layer that is used."
        )
    else:
        _check_reach(job, step - progress.overflows, report, last=last)
    return Progress(
        step=step + 1,
        overflows=progress.overflows + report.overflow,
        seconds=progress.seconds + seconds,
        peak_gib=max(progress.peak_gib, peak_gib(job.loaded.policy.device)),
    )


def _check_reach(job: Job, steps_before: int, report: StepReport, *, last: bool) -> None:
    """Checks in the first two steps that every adapted layer learns; runs of 0.1 go on with the layers they have."""
    is_of_0_1 = job.config.adapter.start is None and job.found.adapted is None
    if steps_before > 1 or report.grad_norm == 0 or is_of_0_1:
        return
    parameters = job.loaded.policy.adapter_parameters()
    if zero := reach.check_reach(parameters, steps_before=steps_before, last=last):
        job.watcher.say(
            f"step {steps_before + 1}: the gradient of {len(zero)} adapted layers, such as {zero[0]}, is exactly 0; "
            "the next step decides if they learn"
        )


def _step_record(job: Job, progress: Progress, report: StepReport, rate: float, seconds: float, tokens: int) -> Record:
    return {
        "step": progress.step,
        "epoch": round(progress.step * job.config.train.pairs_per_step / len(job.train), 4),
        **report.values,
        "grad_norm": report.grad_norm,
        "learning_rate": rate,
        "tokens_per_s": report.tokens / seconds,
        "pairs_per_s": report.pairs / seconds,
        "peak_gib": progress.peak_gib,
        "num_tokens": tokens,
        "overflows": progress.overflows,
    }


def _finish(job: Job, plan: RunLength, outcome: TrainingOutcome) -> Result:
    """Writes adapter/, samples.jsonl and result.json, in this order: a run that has result.json is complete."""
    policy = job.loaded.policy
    release_memory(policy.device)

    def fill(path: Path) -> None:
        adapter.save_adapter(policy, path, base_name=job.base.name, revision=job.base.commit)
        save_tokenizer(job.tokenizer, path, job.run, read_record(job.run), job.config.data, job.base.folder)

    saver = Saver(job.watcher.say, job.stop, job.config.output.on_disk_full)
    saver.save_or_wait(lambda: disk.write_folder(job.run.adapter, fill))
    shown = outcome.checkup.save_for_good()
    result = Result(
        steps=plan.steps,
        pairs=plan.total_pairs,
        before=outcome.before,
        after=outcome.after.values,
        samples=shown,
        seconds=time.monotonic() - job.started,
        training_seconds=outcome.progress.seconds,
        peak_gib=peak_gib(policy.device),
        overflows=outcome.progress.overflows,
        adapter=str(job.run.adapter),
        adapter_weights=adapter_weights(job.run.adapter),
        adapter_settings=adapter_settings(job.run.adapter),
    )
    saver.save_or_wait(lambda: write_sealed(job.run.result, result))
    return result
