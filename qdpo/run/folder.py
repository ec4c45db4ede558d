"""The name of every file in a run folder."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. Reading a path creates nothing."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.toml"

    @property
    def record(self) -> Path:
        """Values found at the first start and kept on resume: commits, hashes, values of `auto` settings."""
        return self.path / "run.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def data_report(self) -> Path:
        return self.path / "data_report.jsonl"

    @property
    def prepared(self) -> Path:
        return self.path / "prepared"

    @property
    def train_pairs(self) -> Path:
        return self.prepared / "train.safetensors"

    @property
    def held_out_pairs(self) -> Path:
        return self.prepared / "held_out.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tracked(self) -> Path:
        """The records sent to a tracker (track.to)."""
        return self.path / "track.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def eval_pairs(self) -> Path:
        """Every held-out pair's log-probs before the first step and at the newest evaluation."""
        return self.path / "eval_pairs.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def result(self) -> Path:
        """Written last: a run that has it is finished."""
        return self.path / "result.json"

    @property
    def card(self) -> Path:
        return self.path / "README.md"

    @property
    def lock(self) -> Path:
        return self.path.with_name(f".{self.path.name}.lock")
