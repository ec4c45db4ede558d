"""The prepared pairs in a run folder: written once, under digests, and prepared again where they are damaged."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qdpo.data import report
from qdpo.data.prepare import PreparedData, prepare_data
from qdpo.data.tokens import sieve
from qdpo.data.tokens.store import PairStore, damaged_pairs, load_checked
from qdpo.errors import DataError
from qdpo.run import disk
from qdpo.run.folder import RunDir
from qdpo.run.record import damaged, file_record, read_record, write_record
from qdpo.run.watcher import Watcher
from qdpo.settings.schema import DataConfig


def store(run: RunDir, prepared: PreparedData) -> dict[str, str]:
    """Write prepared/ and data_report.jsonl; return the SHA-256 of each file in prepared/.

    Pairs are never rendered again: a template may print today's date.
    """
    report.write_report(run.data_report, prepared.notes)
    return _store_pairs(run, prepared)


def _store_pairs(run: RunDir, prepared: PreparedData, wanted: Mapping[str, str] | None = None) -> dict[str, str]:
    """Replace prepared/. Raises: DataError, before anything is replaced, if the digests are not those `wanted`."""
    digests: dict[str, str] = {}

    def fill(folder: Path) -> None:
        for path, pairs in ((run.train_pairs, prepared.train), (run.held_out_pairs, prepared.held_out)):
            sieve.save_pairs(folder / path.name, pairs)
            digests[path.name] = file_record(folder / path.name).sha256
        if wanted is not None and digests != wanted:
            raise DataError("the data, its template or this version of qdpo give other pairs now")

    disk.write_folder(run.prepared, fill)
    return digests


def load(run: RunDir) -> tuple[PairStore, PairStore]:
    """The stored training and held-out pairs. Raises: DataError if they are not those that the run was started with."""
    kept = read_record(run)
    digests = kept.prepared or {}
    if kept.prepared is not None and set(digests) != {run.train_pairs.name, run.held_out_pairs.name}:
        raise damaged(run.record, f"its `prepared` names {', '.join(digests) or 'no file'}")
    train, held_out = (
        load_checked(path, digests.get(path.name)) for path in (run.train_pairs, run.held_out_pairs)
    )  # fmt: skip
    for path, found, count in (
        (run.train_pairs, train, kept.data.train_pairs), (run.held_out_pairs, held_out, kept.data.held_out_pairs),
    ):  # fmt: skip
        if len(found) != count:
            raise damaged_pairs(path, f"it has {len(found)} pairs instead of {count}")
    return train, held_out


def load_or_prepare(
    run: RunDir, config: DataConfig, tokenizer: Any, *, seed: int, watcher: Watcher, scratch: Path | None
) -> tuple[PairStore, PairStore]:
    """As load, but prepares damaged pairs again where the data still give the recorded digests, and says so.

    The caller has checked that the files of the data have not changed. Raises: DataError.
    """
    digests = read_record(run).prepared
    try:
        loaded = load(run)
    except DataError as damage:
        if digests is None:
            raise
        watcher.say(f"warning: {damage}")
        watcher.say("preparing the pairs again from the data, whose files have not changed")
        try:
            again = prepare_data(config, tokenizer, seed=seed, watcher=watcher, scratch=scratch)
            _store_pairs(run, again, digests)
        except DataError as error:
            raise DataError(f"{damage} Preparing them again failed: {error}") from error
        return load(run)
    if digests is None:  # a run of an earlier version: from here on, a change is noticed
        names = (run.train_pairs, run.held_out_pairs)
        write_record(run, replace(read_record(run), prepared={path.name: file_record(path).sha256 for path in names}))
    return loaded
