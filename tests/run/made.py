"""The records of a finished run that was never trained, written by the types that training writes."""

from pathlib import Path
from typing import Any

from qdpo.run import disk, seal
from qdpo.run.folder import RunDir
from qdpo.run.record import (
    VERSION,
    BaseRecord,
    DataRecord,
    Environment,
    FileRecord,
    FoundValues,
    FourBitMark,
    Result,
    RunRecord,
    write_record,
    write_sealed,
)
from qdpo.settings import layered

METRICS = ("loss", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")


def write_records(
    run: RunDir, base: Path, words: list[str], *, dtype: str = "fp32", files: dict[str, FileRecord] | None = None,
    marks: dict[str, FourBitMark] | None = None, data: str = "pairs.jsonl", source: str | None = None,
) -> None:  # fmt: skip
    """run.json, environment.json and result.json; `words` are settings as key=value, `source` what model.path named."""
    resolved = layered.resolve([f"model.path={base}", *words])
    found = FoundValues(
        dtype=dtype, optimizer="adamw", tokens_per_row=0, kept_layers=0, offload=False, embeddings="device", steps=1,
        total_pairs=1, warmup_steps=0,
    )  # fmt: skip
    where = BaseRecord(
        folder=str(base), source=source or str(base), name=str(base), commit=None, license=None, revision=None
    )  # fmt: skip
    about = DataRecord(source=data, revision=None, license=None, train_pairs=1, held_out_pairs=1, dropped=0)
    record = RunRecord(
        settings=layered.flat(resolved.config), preset=None, found=found, base=where, data=about, files=files or {},
        four_bit=marks, version=VERSION,
    )  # fmt: skip
    environment = Environment(packages={"qdpo": "0"}, python="3", platform="here", device="cpu: x86_64", threads=1)
    values = dict.fromkeys(METRICS, 0.5)
    result = Result(
        steps=1, pairs=1, before=values, after=values, samples=None, seconds=1.0, training_seconds=1.0, peak_gib=1.0,
        overflows=0, adapter=str(run.adapter),
    )  # fmt: skip
    write_record(run, record)
    write_sealed(run.environment, environment)
    write_sealed(run.result, result)


def finished_without_model(folder: Path) -> RunDir:
    """A finished run's records in `folder`, with an adapter folder and nothing of a model."""
    made = RunDir(folder)
    made.adapter.mkdir(parents=True)
    (made.adapter / "adapter_config.json").write_text("{}")
    write_records(made, folder.parent.parent / "base", ["data.path=pairs.jsonl"])
    return made


def rewrite_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the record of a run with a digest that is right again."""
    disk.write_json(path, seal.sealed(content))
