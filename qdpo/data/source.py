"""Rows of preference data from the Hub, a file, a folder, or the data that ships with qdpo.

The only importer of `datasets`.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from qdpo.data.files import READERS, data_files, missing_file, read_rows, sha256_of
from qdpo.errors import ConfigError, DataError

BUNDLED = "bundled:"
HUB_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)"
    r"(?::(?P<config>[\w.-]+))?"
    r"(?:@(?P<revision>refs/(?:pr/\d+|convert/\w+)|[\w.-]+))?"
    r"(?:/(?P<split>[\w.-]+))?"
)


@dataclass(frozen=True)
class Source:
    """Rows with their origin; `rows` may be lazy, but has a length and random access."""

    name: str
    rows: Sequence[dict[str, Any]]
    columns: list[str]
    fingerprint: str
    """Changes when the rows do: the commit of a Hub data set, else SHA-256 over the contents of the files."""
    files: dict[str, str] = field(default_factory=dict)
    """Absolute path to SHA-256, for local data; empty for the Hub."""
    revision: str | None = None
    license: str | None = None


def open_source(
    path: str, *, split: str | None = None, revision: str | None = None, shipped: Path, limit: int | None = None
) -> Source:
    """The rows that `data.path` names; `limit` reads no more than that many, from the first.

    `bundled:NAME` is a file in `shipped`. What exists on disk is local; else `owner/name` is a data set on the Hub,
    with `:config`, `@revision` and `/split` after it if wanted.
    Raises: DataError if the data cannot be reached or read; ConfigError if the settings contradict each other.
    """
    local = shipped / path.removeprefix(BUNDLED) if path.startswith(BUNDLED) else Path(path).expanduser()
    hub = HUB_NAME.fullmatch(path)
    if path.startswith(BUNDLED) or local.exists() or hub is None or _looks_local(path):
        if not local.exists():
            raise missing_file(local, f"data.path={path}")
        _refuse_hub_settings(path, split, revision)
        return _open_local(path, local, limit)
    for setting, given, inside in (("split", split, hub["split"]), ("revision", revision, hub["revision"])):
        if given and inside and given != inside:
            raise ConfigError(f"data.{setting}={given}, but data.path={path} names {inside!r}. Keep one of the two.")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")  # datasets reports each load to a counter; read at import
    wanted = _HubName(hub["repo"], hub["config"], hub["revision"] or revision, hub["split"] or split, path)
    return _open_hub(wanted, limit)


def _looks_local(path: str) -> bool:
    return path.startswith((".", "~", "/")) or Path(path.removesuffix(".gz")).suffix in READERS


def _refuse_hub_settings(path: str, split: str | None, revision: str | None) -> None:
    if split not in (None, "train"):
        raise ConfigError(
            f"data.split={split} means nothing for the local data {path}: name the file of that split instead."
        )
    if revision is not None:
        raise ConfigError(f"data.revision={revision} means nothing for the local data {path}. Leave it out.")


def _open_local(name: str, path: Path, limit: int | None) -> Source:
    rows: list[dict[str, Any]] = []
    files = data_files(path)
    for file in files:
        left = None if limit is None else limit - len(rows)
        if left is None or left > 0:
            rows += read_rows(file, left)
    digests = {str(file.resolve()): sha256_of(file) for file in files}
    fingerprint = sha256("\n".join(digests.values()).encode()).hexdigest()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    return Source(name, rows, columns, fingerprint, digests)


@dataclass(frozen=True)
class _HubName:
    repo: str
    config: str | None
    revision: str | None
    split: str | None
    path: str


def _open_hub(wanted: _HubName, limit: int | None) -> Source:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_OFFLINE

    repo = wanted.repo
    with _explained(wanted):
        info = None if HF_HUB_OFFLINE else HfApi().dataset_info(repo, revision=wanted.revision)
    with _explained(wanted, gated=bool(info and info.gated)):
        builder = datasets.load_dataset_builder(repo, wanted.config, revision=info and info.sha)
        _check_commit(builder.hash, info.sha if info else wanted.revision, repo)
        if builder.info.splits:
            _choose_split(list(builder.info.splits), wanted)  # before the download, where the card lists the splits
        builder.download_and_prepare()
        split = _choose_split(list(builder.info.splits or []), wanted)
        rows = builder.as_dataset(split=split if limit is None else f"{split}[:{limit}]")
    _refuse_media(rows.features, repo)
    stated = info.card_data.get("license") if info and info.card_data else None
    return Source(
        name=f"{repo}{f':{wanted.config}' if wanted.config else ''}@{builder.hash[:12]}/{split}",
        rows=cast(Sequence[dict[str, Any]], rows),
        columns=rows.column_names,
        fingerprint=builder.hash,
        revision=builder.hash,
        license=", ".join(stated) if isinstance(stated, list) else stated,
    )


def _check_commit(loaded: str, wanted: str | None, repo: str) -> None:
    # Where anything goes wrong on the way to the Hub, datasets falls back to whatever version it has in its cache.
    if wanted is not None and loaded != wanted:
        raise DataError(
            f"{repo} is wanted at revision {wanted}, but only {loaded} is in the local cache. Connect to the Hub, or "
            f"set data.revision={loaded} to use that one."
        )


def _choose_split(found: list[str], wanted: _HubName) -> str:
    if wanted.split is not None and wanted.split in found:
        return wanted.split
    if wanted.split is None and ("train" in found or len(found) == 1):
        return "train" if "train" in found else found[0]
    problem = "has several splits, none of them 'train'" if wanted.split is None else f"has no split {wanted.split!r}"
    raise DataError(f"{wanted.repo} {problem}. Choose one with data.split=…: {', '.join(sorted(found))}.")


def _refuse_media(features: Mapping[str, Any], repo: str) -> None:
    import datasets

    media = (datasets.Image, datasets.Audio, datasets.Video)
    for column, feature in features.items():
        inner = feature.feature if isinstance(feature, datasets.List) else feature
        if isinstance(inner, media):
            raise DataError(
                f"{repo} has pictures or sound in column {column!r}. qdpo trains on text only; use a text data set."
            )


@contextmanager
def _explained(wanted: _HubName, *, gated: bool = False) -> Iterator[None]:
    """Turns what can go wrong on the way to the Hub into a DataError that says what to do."""
    from datasets import exceptions as found
    from huggingface_hub import errors as hub
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # exported for just this: httpx or httpx2

    repo, origin = wanted.repo, f"(from data.path={wanted.path})"
    try:
        yield
    except (hub.GatedRepoError, hub.RepositoryNotFoundError, hub.RevisionNotFoundError) as error:
        raise _no_access(repo, origin, error) from error
    except (hub.OfflineModeIsEnabled, httpx.TransportError, ConnectionError, hub.LocalEntryNotFoundError) as error:
        raise _not_reached(repo, origin, error) from error
    except hub.HfHubHTTPError as error:
        raise DataError(
            f"The Hub refused {repo} {origin}: {_first_line(error)}. Try again later, or use files."
        ) from error
    except (found.DatasetsError, ValueError, RuntimeError, FileNotFoundError) as error:
        if gated and isinstance(error, FileNotFoundError):  # datasets hides the refusal behind "not found"
            raise _is_gated(repo, origin) from error
        # ValueError: unknown config, with the list of known ones. RuntimeError: the data set is a Python script.
        raise DataError(
            f"{repo} {origin} cannot be loaded: {_first_line(error)}. A configuration is chosen with "
            f"data.path={repo}:CONFIG; data sets that are scripts are not run: use their Parquet version "
            "(@refs/convert/parquet)."
        ) from error


def _is_gated(repo: str, origin: str) -> DataError:
    return DataError(
        f"{repo} {origin} is gated: accept its terms at https://huggingface.co/datasets/{repo}, then run "
        "`hf auth login`."
    )


def _not_reached(repo: str, origin: str, error: Exception) -> DataError:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return DataError(
            f"{repo} {origin} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it. Unset it once, or "
            "download the files elsewhere and give data.path=FOLDER."
        )
    return DataError(
        f"{repo} {origin} cannot be reached: {_first_line(error)}. Check the network. If it was used on this machine "
        "before, HF_HUB_OFFLINE=1 takes it from the local cache; else download its files and give data.path=FOLDER."
    )


def _no_access(repo: str, origin: str, error: Exception) -> DataError:
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        return _is_gated(repo, origin)
    if isinstance(error, hub.RevisionNotFoundError):
        return DataError(
            f"{repo} {origin} has no such revision. Look at https://huggingface.co/datasets/{repo}/commits/main."
        )
    return DataError(
        f"{repo} {origin} is not a file or folder here, and there is no such data set on the Hub, or it is private. "
        "Check the spelling; for a private one, `hf auth login`."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
