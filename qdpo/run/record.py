"""run.json as a typed record: a run's settings and the values found at its start. Imports nothing heavy."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

from qdpo.errors import ConfigError, DiskError
from qdpo.run import disk, seal, typed
from qdpo.run.folder import RunDir
from qdpo.run.seal import damaged as damaged
from qdpo.settings.layered import Values

# 1: qdpo 0.1.0, which wrote no version. 2: the same keys, with the version. 3: with the record's own sha256.
VERSION = 3
SEALED = 3
"""The first version whose records have a digest."""
MOST_STEPS = 10**9


class Part:
    """A part of a JSON file as a dataclass. Fields that a newer version added are kept in `more`.

    A field that has another name in the file (`model.dtype`) keeps that name in its metadata.
    """

    more: dict[str, object]

    @classmethod
    def of_json(cls, values: Mapping[str, Any]) -> Self:
        """Raises: KeyError, TypeError or AttributeError where a value is missing or has the wrong type."""
        known: dict[str, Any] = {}
        names: dict[str, dataclasses.Field[Any]] = {_key(one): one for one in _fields(cls)}
        for key, one in names.items():
            if key in values:
                known[one.name] = one.metadata.get("read", _same)(values[key])
            elif one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
                raise KeyError(key)
        typed.check_fields(cls, known)
        known["more"] = {key: value for key, value in values.items() if key not in names}
        return cls(**known)

    def to_json(self) -> dict[str, object]:
        """The fields under their names in the file, without optional fields that are not set."""
        found: dict[str, object] = {}
        for one in _fields(type(self)):
            value = getattr(self, one.name)
            if value is None and one.default is None:
                continue
            found[_key(one)] = _plain(value)
        return {**found, **self.more}


@dataclass(frozen=True, kw_only=True)
class FileRecord(Part):
    """Size, time and sha256 of a file, to detect a change."""

    bytes: int
    mtime_ns: int
    sha256: str
    more: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BaseRecord(Part):
    """The base model's folder on this machine and where it came from; see `BaseFolder` of model/base/fetch."""

    folder: str
    source: str
    name: str
    commit: str | None
    license: str | None
    revision: str | None
    more: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DataRecord(Part):
    """Sources and numbers of pairs. `dropped` counts rows that could not be used."""

    source: str
    revision: str | None
    license: str | None
    train_pairs: int
    held_out_pairs: int
    dropped: int
    held_out_source: str | None = None
    held_out_revision: str | None = None
    ends: list[int] | None = None
    """Ids of the special tokens with which uncut answers end, the most frequent first; None in runs before 0.2."""
    more: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FourBitMark(Part):
    """The proof that a 4-bit weight was reproduced exactly: see `mark` in model/base/quant."""

    sha256: str
    offset: float | None
    experts: list[str] | None = None  # of a stack: the digest of each one's matrix
    more: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class MemoryChoice:
    """The memory.* settings with every `auto` replaced by a value."""

    tokens_per_row: int
    kept_layers: int | str
    offload: bool
    embeddings: str


def _named(name: str, **more: Any) -> Any:
    return field(**more, metadata={"key": name})


@dataclass(frozen=True, kw_only=True)
class FoundValues(Part):
    """Values chosen at the first start and kept on resume, since other values would change the numbers."""

    dtype: str = _named("model.dtype")
    optimizer: str = _named("train.optimizer")
    tokens_per_row: int = _named("memory.tokens_per_row")
    kept_layers: int | str = _named("memory.kept_layers")
    offload: bool = _named("memory.offload")
    embeddings: str = _named("memory.embeddings")
    revision: str | None = _named("model.revision", default=None)
    steps: int | None = _named("train.steps", default=None)
    total_pairs: int | None = None
    warmup_steps: int | None = _named("train.warmup_steps", default=None)
    adapted: list[str] | None = None
    """The layers of a new adapter; None with adapter.start, and in runs of 0.1, which left all-linear to PEFT."""
    row_splits: dict[str, int] | None = None
    """By step: the number of parts into which its rows were split after running out of memory."""
    more: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises: ValueError for a length that no run can have."""
        for name, value, least in (
            ("train.steps", self.steps, 1),
            ("total_pairs", self.total_pairs, 1),
            ("train.warmup_steps", self.warmup_steps, 0),
        ):
            if value is not None and not least <= value <= MOST_STEPS:
                raise ValueError(f"{name} is {value}")

    @property
    def memory(self) -> MemoryChoice:
        """The values of [memory]."""
        return MemoryChoice(
            tokens_per_row=self.tokens_per_row, kept_layers=self.kept_layers, offload=self.offload,
            embeddings=self.embeddings,
        )  # fmt: skip

    def settings(self) -> Values:
        """The found values that replace settings, by full name."""
        return {name: value for name, value in self.to_json().items() if "." in name}  # type: ignore[misc]


def _files(values: Mapping[str, Any]) -> dict[str, FileRecord]:
    return {name: FileRecord.of_json(one) for name, one in values.items()}


def _marks(values: Mapping[str, Any]) -> dict[str, FourBitMark]:
    return {name: FourBitMark.of_json(one) for name, one in values.items()}


@dataclass(frozen=True, kw_only=True)
class RunRecord(Part):
    """The whole of run.json."""

    settings: Values
    """As given, by full name."""
    preset: str | None
    found: FoundValues = field(metadata={"read": FoundValues.of_json})
    base: BaseRecord = field(metadata={"read": BaseRecord.of_json})
    data: DataRecord = field(metadata={"read": DataRecord.of_json})
    files: dict[str, FileRecord] = field(metadata={"read": _files})
    """Data and model files, by absolute path."""
    weights: str | None = None
    """Checksum of the loaded base."""
    four_bit: dict[str, FourBitMark] | None = field(default=None, metadata={"read": _marks})
    """By module name."""
    before: dict[str, float] | None = None
    """The evaluation before the first step."""
    prepared: dict[str, str] | None = None
    """SHA-256 of each file in prepared/, by name; None in records of version 2 and earlier."""
    version: int = 1
    more: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Environment(Part):
    """environment.json: versions and the device of the first start."""

    packages: dict[str, str]
    python: str
    platform: str
    device: str
    threads: int
    more: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AnswerLengths(Part):
    """Median lengths in tokens of the sampled answers to `count` prompts, end token included."""

    count: int
    median_tokens_before: float
    median_tokens_after: float
    more: dict[str, object] = field(default_factory=dict)


def _lengths(values: Mapping[str, Any] | None) -> AnswerLengths | None:
    return None if values is None else AnswerLengths.of_json(values)


@dataclass(frozen=True, kw_only=True)
class Result(Part):
    """result.json, the last file of a run: held-out metrics before and after, and the cost of training."""

    steps: int
    pairs: int
    before: dict[str, float]
    after: dict[str, float]
    samples: AnswerLengths | None = field(metadata={"read": _lengths})
    seconds: float
    training_seconds: float
    peak_gib: float
    overflows: int
    adapter: str
    adapter_weights: str | None = None  # as `run.finished` makes them; None in runs of before
    adapter_settings: str | None = None
    more: dict[str, object] = field(default_factory=dict)


def read_record(run: RunDir) -> RunRecord:
    """Raises: ConfigError if the folder has no run.json; DiskError if run.json is damaged or was changed."""
    if not disk.is_there(run.record):
        raise ConfigError(f"{run.path} is not a run: it has no {run.record.name}. `qdpo runs` lists the runs.")
    record = _read(RunRecord, run.record, _is_due)
    if record.version < SEALED and _has_seal(run.environment):
        raise damaged(run.record, "its sha256 is missing")
    return record


def read_environment(run: RunDir) -> Environment:
    """Raises: DiskError if environment.json is missing or damaged."""
    return _read(Environment, run.environment)


def read_result(run: RunDir) -> Result:
    """Raises: DiskError if result.json is missing or damaged."""
    return _read(Result, run.result)


def write_record(run: RunDir, record: RunRecord) -> None:
    """Replaces run.json, with its new digest, atomically."""
    write_sealed(run.record, dataclasses.replace(record, version=max(record.version, VERSION)))


def write_sealed(path: Path, part: Part) -> None:
    """Replaces the file by the record and its digest, atomically. Raises: DiskError."""
    disk.write_json(path, seal.sealed(part.to_json()))


def file_record(path: Path) -> FileRecord:
    """The file's size, time and sha256 as they are now."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    status = path.stat()
    return FileRecord(bytes=status.st_size, mtime_ns=status.st_mtime_ns, sha256=digest)


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that determine what is loaded."""
    patterns = ("*.safetensors", "*.json", "*.model", "*.jinja", "additional_chat_templates/*.jinja")
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())


P = TypeVar("P", bound=Part)


def _read(kind: type[P], path: Path, is_due: Callable[[Mapping[str, Any]], bool] = lambda content: False) -> P:
    try:
        content = disk.read_json(path)
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, not an object")
        return kind.of_json(seal.opened(content, due=is_due(content)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, f"it has no {error}" if isinstance(error, KeyError) else str(error)) from error


def _is_due(content: Mapping[str, Any]) -> bool:
    version = content.get("version", 1)
    return not isinstance(version, int) or version >= SEALED


def _has_seal(path: Path) -> bool:
    try:
        content = disk.read_json(path)
    except (OSError, ValueError, DiskError):
        return False
    return isinstance(content, dict) and seal.KEY in content


def _fields(kind: type[Part]) -> list[dataclasses.Field[Any]]:
    return [one for one in dataclasses.fields(kind) if one.name != "more"]  # type: ignore[arg-type]


def _key(one: "dataclasses.Field[Any]") -> str:
    return str(one.metadata.get("key", one.name))


def _same(value: Any) -> Any:
    return value


def _plain(value: Any) -> Any:
    """Nested records as JSON."""
    if isinstance(value, Part):
        return value.to_json()
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value
