"""Uploads an adapter or a merged model with its card to the hub, without any trace of this machine."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo import __version__
from qdpo.errors import ConfigError
from qdpo.export.privacy import Privacy
from qdpo.export.trained import TrainedRun
from qdpo.model.base.expected import check_folder
from qdpo.report.card import card_text, public_name
from qdpo.run.record import BaseRecord
from qdpo.run.watcher import Say
from qdpo.train.start.tokenizer import shipped_otherwise

# Files of a model's or an adapter's folder that go to the hub; all others are left out.
SUFFIXES = (".safetensors", ".json", ".jinja", ".model", ".txt")
CARD = "README.md"


@dataclass(frozen=True)
class Parcel:
    """Files by their name in the repository: a path, or bytes that replace the file on disk."""

    repo: str
    public: bool
    files: dict[str, Path | bytes]

    def listing(self) -> Iterator[str]:
        """The files that would be uploaded, one line per file, with sizes."""
        sizes = {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size for name, file in self.files.items()
        }
        width = max(map(len, sizes))
        for name, size in sizes.items():
            yield f"  {name.ljust(width)}  {size:>14,} bytes"
        yield f"  {len(sizes)} files, {sum(sizes.values()) / 2**20:,.1f} MiB → {self.repo}"

    def send(self) -> str:
        """Creates the repository if needed and uploads everything in one commit; returns its address.

        Raises: ConfigError if the hub refuses or cannot be reached, or the repository is public without --public.
        """
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi(library_name="qdpo", library_version=__version__)
        with hub_errors(self.repo):
            api.create_repo(self.repo, private=not self.public, exist_ok=True)
            if not self.public and not api.repo_info(self.repo).private:
                raise ConfigError(
                    f"{self.repo} exists and is public. Nothing was uploaded. Add `--public`, or choose another name."
                )
            operations = [CommitOperationAdd(name, file) for name, file in self.files.items()]
            message = f"Upload with qdpo {__version__}"
            return str(api.create_commit(self.repo, operations, commit_message=message).commit_url)


def pack(trained: TrainedRun, repo: str, *, merged: bool, public: bool, say: Say) -> Parcel:
    """The files of the run's adapter, or of its merged model, cleaned and searched for local paths.

    Raises: ConfigError without a token, a finished run or a merged model; VerificationError if a local path remains.
    """
    repo = _full_name(repo)
    folder = trained.merged(None) if merged else trained.run.adapter
    if merged:
        check_folder(folder)
        if differing := shipped_otherwise(trained.tokenizer(folder), folder):
            raise ConfigError(
                f"The {' and '.join(differing)} in {folder} are not what the run trained: the folder was merged by an "
                f"earlier version of qdpo, or changed. Remove it, and run `qdpo merge {trained.run.path}` again."
            )
    base = trained.record.base
    privacy = Privacy.of(trained)
    files: dict[str, Path | bytes] = {CARD: _card(trained, repo, merged).encode()}
    for path in sorted(folder.iterdir()):
        if path.suffix in SUFFIXES and path.is_file() and not path.name.startswith("."):
            files[path.name] = _cleaned(path, privacy, base)
        elif path.name != CARD:
            say(f"left out: {path.name}")
    for name, file in files.items():
        privacy.require_none(name, file)
    return Parcel(repo, public, files)


def _full_name(repo: str) -> str:
    from huggingface_hub import HfApi, get_token, is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{repo!r} is not a repository name: {error}") from error
    if is_offline_mode():
        raise ConfigError("HF_HUB_OFFLINE=1 is set, so nothing can be uploaded. Unset it for this command.")
    if get_token() is None:
        raise ConfigError("No token for the Hugging Face hub. Run `hf auth login` with a write token, or set HF_TOKEN.")
    if "/" in repo:
        return repo
    with hub_errors(repo):
        return f"{HfApi().whoami()['name']}/{repo}"


def _card(trained: TrainedRun, repo: str, merged: bool) -> str:
    return card_text(trained.finished, repo=repo, is_merged=merged)


def _cleaned(path: Path, privacy: Privacy, base: BaseRecord) -> Path | bytes:
    """The file, or its JSON without local paths. tokenizer.json stays unchanged: it is large, and searched later."""
    if path.suffix != ".json" or path.name == "tokenizer.json":
        return path
    content = json.loads(path.read_text(encoding="utf-8"))
    if path.name == "adapter_config.json":
        content["base_model_name_or_path"] = public_name(base.name, base.source, hide=True)
    cleaned = privacy.cleaned(content)
    return path if cleaned == content and path.name != "adapter_config.json" else _json(cleaned)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turns each refusal of an upload by the hub into a ConfigError."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # its stable name for httpx or httpx2

    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        hint = {
            401: "The token is not valid. Set a new token with `hf auth login`.",
            403: "The token may not write there. See its account with `hf auth whoami`.",
            404: "There is no such account or organisation, or the token may not see it.",
        }.get(status, "The upload may be incomplete; try again.")
        raise ConfigError(f"{constants.ENDPOINT} refused {repo} (error {status}): {error}. {hint}") from error
    except (httpx.TransportError, OSError) as error:
        raise ConfigError(
            f"{constants.ENDPOINT} could not be reached ({type(error).__name__}: {error}). Try again with a network."
        ) from error
