"""Reads everything that a run folder says about a run, finished or not, without torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qdpo.data.tokens.store import TokenPair, load_checked
from qdpo.diagnose.course import Record, Terms
from qdpo.diagnose.rules import Seen, follow
from qdpo.run.finished import FinishedRun, KnownRun, any_run
from qdpo.run.folder import RunDir
from qdpo.run.lines import is_row_note, is_sampled, is_scored, read_lines
from qdpo.run.metrics import read_metrics
from qdpo.run.record import Result, RunRecord
from qdpo.settings.layered import Values


@dataclass(frozen=True)
class Setting:
    """A setting as the run used it."""

    name: str
    value: Any
    origin: str

    @property
    def is_default(self) -> bool:
        return self.origin == "default"


@dataclass(frozen=True)
class Facts:
    """Everything that is known about one run."""

    known: KnownRun
    steps: list[Record]
    evaluations: list[Record]
    samples: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    """Log-probs of held-out pairs, before and after."""
    data_report: list[dict[str, Any]]

    @property
    def run(self) -> RunDir:
        return self.known.run

    @property
    def name(self) -> str:
        return self.known.name

    @property
    def record(self) -> RunRecord:
        return self.known.record

    @property
    def result(self) -> Result | None:
        """None while the run is unfinished."""
        return self.known.result if isinstance(self.known, FinishedRun) else None

    @property
    def settings(self) -> Values:
        """Settings by full name, with `auto` replaced by the values that were found."""
        known = self.record.settings
        return {**known, **{name: value for name, value in self.record.found.settings().items() if name in known}}

    @property
    def planned(self) -> int:
        return self.record.found.steps or 0

    @property
    def done(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def terms(self) -> Terms:
        config, held_out = self.known.config(), self.record.data.held_out_pairs
        return Terms(self.planned, config.train.pairs_per_step, held_out, config.loss.beta)

    @cached_property
    def seen(self) -> list[Seen]:
        """Findings of the rules, at the end or during the run."""
        return follow(read_metrics(self.run.metrics), self.terms)

    @property
    def first(self) -> Record | None:
        """The evaluation before the first step."""
        return next((record for record in self.evaluations if record["step"] == 0), None)

    @property
    def latest(self) -> Record | None:
        """The newest evaluation after step 0."""
        return next((record for record in reversed(self.evaluations) if record["step"] > 0), None)

    @property
    def dropped(self) -> list[tuple[str, str, int]]:
        """(action, reason, rows) of the data report, most frequent first."""
        counted = Counter((line["action"], line["reason"]) for line in self.data_report)
        return [(action, reason, rows) for (action, reason), rows in counted.most_common()]

    def with_origins(self) -> list[Setting]:
        """Every setting that is set, in the order of config.toml, which has the origins as comments."""
        found, table, values = [], "", self.settings
        for line in self.run.config.read_text(encoding="utf-8").splitlines():
            if line.startswith("["):
                table = line.strip("[]")
            elif " = " in line and not line.startswith("#"):
                name = f"{table}.{line.partition(' = ')[0]}"
                found.append(Setting(name, values.get(name), line.rpartition("  # ")[2]))
        return found

    def held_out(self) -> Sequence[TokenPair]:
        """The prepared held-out pairs, in the order that `pair` in eval_pairs.jsonl counts."""
        digests = self.record.prepared or {}
        return load_checked(self.run.held_out_pairs, digests.get(self.run.held_out_pairs.name))

    def tokenizer(self) -> Tokenizer | None:
        """Tokenizer for decoding prepared ids: saved with the adapter, or in the base's folder; None if in neither."""
        for folder in (self.run.adapter, Path(self.record.base.folder)):
            if (folder / "tokenizer.json").is_file():
                return Tokenizer.from_file(str(folder / "tokenizer.json"))
        return None


def read_facts(folder: Path) -> Facts:
    """Read a run folder. Raises: ConfigError if it is not a run; DiskError if one of its files is damaged."""
    known = any_run(folder)
    run, records = known.run, read_metrics(known.run.metrics)
    held_out = known.record.data.held_out_pairs
    return Facts(
        known=known,
        steps=[record for record in records if "loss" in record],
        evaluations=[record for record in records if "eval_loss" in record],
        samples=read_lines(run.samples, is_sampled),
        pairs=[line for line in read_lines(run.eval_pairs, is_scored) if line["pair"] < held_out],
        data_report=read_lines(run.data_report, is_row_note),
    )
