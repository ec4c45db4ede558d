"""Evaluations between steps: scores held-out pairs and samples answers, for their files and the run's metrics."""

import json
from functools import partial
from typing import Any

from qdpo.data.tokens.pack import pack_rows
from qdpo.diagnose.course import Record
from qdpo.run import disk
from qdpo.run.lines import is_scored, mend_lines
from qdpo.run.record import AnswerLengths
from qdpo.run.watcher import PAIRS, Watcher
from qdpo.train.keep.disk_full import Saver
from qdpo.train.keep.stop import StoppableWatcher
from qdpo.train.start.open_run import Job
from qdpo.train.watch.alarm import Alarm
from qdpo.train.watch.evaluate import Evaluation, evaluate
from qdpo.train.watch.metrics_file import Metrics
from qdpo.train.watch.samples import Samples


class Checkup:
    """Evaluates a run whose records up to step `keep_through` are kept."""

    def __init__(self, job: Job, metrics: Metrics, alarm: Alarm, saver: Saver, *, steps: int, keep_through: int):
        self._job, self._metrics, self._alarm, self._saver, self._steps = job, metrics, alarm, saver, steps
        self._samples = Samples(
            job.run.samples, job.loaded.policy, job.tokenizer, job.prompts, job.config.samples, job.watcher,
            keep_through=keep_through,
        )  # fmt: skip
        pairs = mend_lines(job.run.eval_pairs, is_scored, job.watcher.say, due=keep_through > 0)
        self._pairs = _kept(pairs, keep_through)
        self._is_ahead = False

    def evaluate(self, step: int) -> Evaluation:
        """Scores the held-out pairs and completes the prompts. A full disk delays the files until `save_for_good`."""
        job, look = self._job, None
        watcher: Watcher = job.watcher
        if step == 0:  # nothing is lost; after a step, its checkpoint waits for its evaluation
            where = "in the evaluation before step 1"
            watcher, look = StoppableWatcher(job.watcher, job.stop, where), partial(job.stop.check, where)
        watcher.begin("evaluating on held-out pairs", len(job.held_out), "pair")
        pairs = list(job.held_out)
        rows = pack_rows(pairs, job.scorer.tokens_per_row)
        evaluation = evaluate(job.loaded.policy, rows, job.scorer.for_loss, job.config.loss, watcher.advance)
        watcher.finish()
        place_of = {id(pair): place for place, pair in enumerate(pairs)}
        places = [place_of[id(pair)] for row in rows for pair in row.pairs]
        self._pairs = _with(self._pairs, evaluation, places, step)
        values = dict(evaluation.values)
        if job.config.samples.every_eval or step in (0, self._steps):
            values |= self._samples.complete(step, look)
        line: Record = {"step": step, **{f"eval_{name}": value for name, value in values.items()}}
        if step not in self._metrics.evaluated:
            self._metrics.write(line)
            self._alarm.check(line)
        job.watcher.step({**line, PAIRS: len(pairs)})
        self._is_ahead = True
        self._saver.try_save(self.write)
        return evaluation

    def save_for_good(self) -> AnswerLengths | None:
        """Writes the files for good; the summary of the samples."""
        self._is_ahead = True
        self._saver.save_or_wait(self.write)
        return self._samples.summary()

    def write(self) -> None:
        """Writes what an evaluation found, as a checkpoint must not be ahead of it. Raises: DiskError."""
        if not self._is_ahead:
            return
        self._samples.write()
        disk.write_text(self._job.run.eval_pairs, "".join(json.dumps(line) + "\n" for line in self._pairs))
        self._is_ahead = False


def _with(lines: list[dict[str, Any]], evaluation: Evaluation, places: list[int], step: int) -> list[dict[str, Any]]:
    """The lines of eval_pairs.jsonl with this evaluation's values; `places` are indices into the held-out pairs.

    The index identifies a pair: several pairs may come from one row, or from equally numbered rows of several sources.
    """
    known = {line["pair"]: line for line in lines}
    found = []
    for place, row, (chosen, rejected), margin in zip(
        places, evaluation.rows, evaluation.logps, evaluation.margins, strict=True
    ):
        now = {"step": step, "logps/chosen": chosen, "logps/rejected": rejected, "margin": margin}
        found.append({"pair": place, "row": row, **known.get(place, {}), "before" if step == 0 else "after": now})
    return sorted(found, key=lambda line: int(line["pair"]))


def _kept(lines: list[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    if step < 0:
        return []
    return [{name: part for name, part in line.items() if name != "after" or part["step"] <= step} for line in lines]
