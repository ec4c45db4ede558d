"""All that a run folder holds about a run, finished or not, read without torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qdpo.data.tokens.sieve import TokenPair, load_pairs
from qdpo.diagnose.course import Record, Terms
from qdpo.diagnose.rules import Seen, follow
from qdpo.errors import ConfigError
from qdpo.run import disk
from qdpo.run.folder import RunDir


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
    """One run."""

    run: RunDir
    name: str
    record: dict[str, Any]
    result: dict[str, Any] | None
    """None while the run is unfinished."""
    steps: list[Record]
    evaluations: list[Record]
    samples: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    """Log-probs of held-out pairs, before and after."""
    environment: dict[str, Any]
    data_report: list[dict[str, Any]]

    @property
    def settings(self) -> dict[str, Any]:
        """By full name, with the values that were found in the place of `auto`."""
        known: dict[str, Any] = self.record["settings"]
        return {**known, **{name: value for name, value in self.record["found"].items() if name in known}}

    @property
    def planned(self) -> int:
        return int(self.record["found"].get("train.steps") or 0)

    @property
    def done(self) -> int:
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def terms(self) -> Terms:
        settings, held_out = self.settings, int(self.record["data"]["held_out_pairs"])
        return Terms(self.planned, int(settings["train.pairs_per_step"]), held_out, float(settings["loss.beta"]))

    @cached_property
    def seen(self) -> list[Seen]:
        """What the rules found, at the end or on the way."""
        return follow(disk.read_lines(self.run.metrics), self.terms)

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
        """(what was done, reason, rows) of the data report, most frequent first."""
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
        return load_pairs(self.run.held_out_pairs)

    def tokenizer(self) -> Tokenizer | None:
        """To turn prepared ids into text: saved beside the adapter, or in the base's folder; None if in neither."""
        for folder in (self.run.adapter, Path(self.record["base"]["folder"])):
            if (folder / "tokenizer.json").is_file():
                return Tokenizer.from_file(str(folder / "tokenizer.json"))
        return None


def read_facts(folder: Path) -> Facts:
    """Raises: ConfigError if the folder is not a run."""
    run = RunDir(folder)
    if not run.record.is_file():
        raise ConfigError(f"{folder} is no run folder: it has no {run.record.name}. `qdpo runs` lists the runs.")
    records = disk.read_lines(run.metrics)
    return Facts(
        run=run,
        name=folder.resolve().name,
        record=disk.read_json(run.record),
        result=disk.read_json(run.result) if run.result.is_file() else None,
        steps=[record for record in records if "loss" in record],
        evaluations=[record for record in records if "eval_loss" in record],
        samples=disk.read_lines(run.samples),
        pairs=disk.read_lines(run.eval_pairs),
        environment=disk.read_json(run.environment),
        data_report=disk.read_lines(run.data_report),
    )
