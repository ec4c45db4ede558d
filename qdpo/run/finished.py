"""Opens a run on disk: any run, or only a finished one that can be used."""

import json
from dataclasses import dataclass
from pathlib import Path

from qdpo.errors import ConfigError, VerificationError
from qdpo.run import disk, places, seal
from qdpo.run.folder import RunDir
from qdpo.run.identity import check_files
from qdpo.run.record import Environment, Result, RunRecord, file_record, read_environment, read_record, read_result
from qdpo.settings import layered
from qdpo.settings.schema import RunConfig

# Of adapter_config.json: where the base lies, which people write anew before they share an adapter.
BASE_NAMES = ("base_model_name_or_path", "revision")


@dataclass(frozen=True, kw_only=True)
class KnownRun:
    """A run's folder and the contents of its files, finished or not."""

    run: RunDir
    record: RunRecord
    environment: Environment

    @property
    def name(self) -> str:
        return self.run.path.resolve().name

    @property
    def cache(self) -> Path:
        """The cache folder that the run used."""
        given = self.record.settings.get("cache.dir")
        return disk.cache_folder(None if given is None else str(given))

    def config(self, arguments: list[str] | None = None) -> RunConfig:
        """The run's settings, overridden by `key=value` arguments. Raises: ConfigError."""
        return layered.resolve_over(self.record.settings, "the run", arguments or []).config

    @property
    def saved_step(self) -> int:
        """The step of the newest checkpoint; 0 before there is one."""
        names = [path.name.removeprefix("step-") for path in self.run.checkpoints.glob("step-*")]
        return max((int(name) for name in names if name.isdecimal()), default=0)


@dataclass(frozen=True, kw_only=True)
class FinishedRun(KnownRun):
    """A run that has ended: it has a result and an adapter."""

    result: Result

    def check_base(self) -> None:
        """Raises: ConfigError if the base was a folder of this machine and is gone; the hub has no part in it."""
        base, given = self.record.base, self.record.base.source
        is_local = base.commit is None and base.name == base.folder and not given.startswith("pypi:")
        if is_local and not Path(base.folder).is_dir() and not Path(given).expanduser().exists():
            raise ConfigError(
                f"The base of {self.run.path} is not there: it was trained over the folder {base.folder} (from "
                "model.path). Put the folder back, or a link to the place where it is now."
            )

    def check_base_files(self, folder: Path) -> None:
        """Raises: ConfigError if `folder` is the trained base's and one of its files is missing or has changed."""
        check_files({name: file for name, file in self.record.files.items() if Path(name).parent == folder}, self.run)


def is_finished(run: RunDir) -> bool:
    """True if the run has its result, which is written last, and still has its adapter."""
    return run.result.is_file() and (run.adapter / "adapter_config.json").is_file()


def any_run(folder: Path) -> KnownRun:
    """The run in `folder`: a FinishedRun if it is finished.

    Raises: ConfigError if the folder is not a run; DiskError if one of its files is damaged, or of another kind.
    """
    run = RunDir(folder)
    places.check_places(run)
    record, environment = read_record(run), read_environment(run)
    if not is_finished(run):
        return KnownRun(run=run, record=record, environment=environment)
    return FinishedRun(run=run, record=record, environment=environment, result=read_result(run))


def finished_run(folder: Path) -> FinishedRun:
    """The finished run in `folder`, with the adapter that it trained.

    Raises: ConfigError if `folder` is not a run, or the run is not finished; VerificationError if its adapter was
    changed since.
    """
    found = any_run(folder)
    if isinstance(found, FinishedRun):
        _check_adapter(found)
        return found
    if found.run.result.is_file():
        raise ConfigError(
            f"The run {folder} is finished, but its adapter is missing: {found.run.adapter} has no "
            "adapter_config.json. Put the folder back, or train again with `--fresh`."
        )
    of = f" of {found.record.found.steps}" if found.record.found.steps else ""
    saved = f"saved after step {found.saved_step}{of}" if found.saved_step else "nothing is saved yet"
    raise ConfigError(
        f"The run {folder} is not finished: it has no {found.run.result.name} yet ({saved}). The `qdpo run` "
        "command that started it continues it."
    )


def adapter_weights(folder: Path) -> str:
    """sha256 of the adapter's tensors."""
    return file_record(folder / "adapter_model.safetensors").sha256


def adapter_settings(folder: Path) -> str:
    """sha256 of the adapter's settings without the name of its base, which may be written again."""
    content = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return seal.digest({name: value for name, value in content.items() if name not in BASE_NAMES})


def _check_adapter(found: FinishedRun) -> None:
    result, folder = found.result, found.run.adapter
    for name, stated, digest in (
        ("adapter_model.safetensors", result.adapter_weights, adapter_weights),
        ("adapter_config.json", result.adapter_settings, adapter_settings),
    ):
        if stated is None:
            continue
        try:
            same = digest(folder) == stated
        except (OSError, ValueError, AttributeError, RecursionError):
            continue  # who opens the adapter says what is wrong with it
        if not same:
            raise VerificationError(
                f"{folder / name} is not the one that the run {found.run.path} wrote at its end: its sha256 differs "
                "from the one in result.json. Put the file back from a copy, or remove the folder adapter/, and the "
                "command that started the run writes it again from the last checkpoint."
            )
