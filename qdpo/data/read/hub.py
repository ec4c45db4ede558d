"""Loads preference data from the Hub: the right commit, config and split, or an error that says what to do.

The only importer of `datasets`.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from qdpo.data.read.files import SAMPLED_ROWS, Advance, Place, Sample
from qdpo.data.read.progress import BadLine, Row
from qdpo.data.read.table_rows import written
from qdpo.errors import DataError

HUB_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)"
    r"(?::(?P<config>[\w.-]+))?"
    r"(?:@(?P<revision>refs/(?:pr/\d+|convert/\w+)|[\w.-]+))?"
    r"(?:/(?P<split>[\w.-]+))?"
)


@dataclass(frozen=True)
class HubName:
    """A data set on the Hub, and `path` as the user wrote it."""

    repo: str
    config: str | None
    revision: str | None
    split: str | None
    path: str


class TableRows:
    """The rows of a data set that `datasets` keeps as Arrow files in its cache."""

    def __init__(self, rows: Any, name: str):
        self._rows, self._name = rows, name

    def __iter__(self) -> Iterator[Row]:
        return ({name: written(cell) for name, cell in row.items()} for row in self._rows)

    def located(self, advance: Advance | None = None) -> Iterator[tuple[Place, Row | BadLine]]:
        """Every row with its number."""
        for number, row in enumerate(self, 1):
            yield Place(self._name, number), row

    @property
    def bytes(self) -> int:
        """0: the rows are known without reading them all."""
        return 0

    def read_sample(self, advance: Advance | None = None) -> Sample:
        """Number and columns of the rows, and 200 rows, evenly spread."""
        last, count = len(self._rows) - 1, min(len(self._rows), SAMPLED_ROWS)
        indices = sorted({round(step * last / max(count - 1, 1)) for step in range(count)})
        rows = {index + 1: {name: written(cell) for name, cell in self._rows[index].items()} for index in indices}
        return Sample(len(self._rows), self._rows.column_names, rows)


@dataclass(frozen=True)
class HubData:
    """Data from the Hub: rows, name with commit and split, commit, and the licence in the data set's card."""

    name: str
    rows: TableRows
    commit: str
    license: str | None


def open_hub(wanted: HubName, limit: int | None) -> HubData:
    """The rows of a data set on the Hub. Raises: DataError if it cannot be reached or read."""
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
    name = f"{repo}{f':{wanted.config}' if wanted.config else ''}@{builder.hash[:12]}/{split}"
    named = ", ".join(stated) if isinstance(stated, list) else stated
    return HubData(name, TableRows(rows, name), builder.hash, named)


def _check_commit(loaded: str, wanted: str | None, repo: str) -> None:
    # If the Hub cannot be reached, datasets falls back to whatever version is in its cache.
    if wanted is not None and loaded != wanted:
        raise DataError(
            f"{repo} is needed at revision {wanted}, but only {loaded} is in the local cache. Connect to the Hub, or "
            f"use the cached revision with data.revision={loaded}."
        )


def _choose_split(found: list[str], wanted: HubName) -> str:
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
                f"{repo} has pictures or sound in column {column!r}. qdpo trains on text only today (image pairs are "
                "planned). Use a text data set."
            )


@contextmanager
def _explained(wanted: HubName, *, gated: bool = False) -> Iterator[None]:
    """Convert the Hub's and datasets' errors into a DataError that says what to do."""
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
        if gated and isinstance(error, FileNotFoundError):  # datasets reports the refusal as "not found"
            raise _is_gated(repo, origin) from error
        # ValueError: unknown config, with the list of known ones. RuntimeError: the data set is a Python script.
        raise DataError(
            f"{repo} {origin} cannot be loaded: {_first_line(error)}. Choose a configuration with "
            f"data.path={repo}:CONFIG. Data sets that are Python scripts are not run; use their Parquet version "
            "(@refs/convert/parquet)."
        ) from error


def _is_gated(repo: str, origin: str) -> DataError:
    return DataError(
        f"{repo} {origin} is gated. Accept its terms at https://huggingface.co/datasets/{repo}, then run "
        "`hf auth login`."
    )


def _not_reached(repo: str, origin: str, error: Exception) -> DataError:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return DataError(
            f"{repo} {origin} is not in the local cache, and HF_HUB_OFFLINE forbids downloading it. Unset "
            "HF_HUB_OFFLINE once, or download the files elsewhere and give data.path=FOLDER."
        )
    return DataError(
        f"{repo} {origin} cannot be reached: {_first_line(error)}. Check the network. If the data set was used on this "
        "machine before, HF_HUB_OFFLINE=1 takes it from the local cache. Else download its files and give "
        "data.path=FOLDER."
    )


def _no_access(repo: str, origin: str, error: Exception) -> DataError:
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        return _is_gated(repo, origin)
    if isinstance(error, hub.RevisionNotFoundError):
        return DataError(
            f"{repo} {origin} has no such revision. See https://huggingface.co/datasets/{repo}/commits/main."
        )
    return DataError(
        f"{repo} {origin} is not a file or folder here, and the Hub has no such data set, or it is private. Check the "
        "spelling. For a private data set, run `hf auth login`."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
