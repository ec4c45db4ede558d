"""Prepares the pairs of a run in its folder: read, recognise, render, tokenise once, split, report."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.data import report, split
from qdpo.data.layouts import pair
from qdpo.data.layouts.layout import Layout
from qdpo.data.layouts.notes import RowNote
from qdpo.data.read import source
from qdpo.data.read.source import Source
from qdpo.data.tokens import sieve, templates
from qdpo.data.tokens.cut import Limits
from qdpo.data.tokens.render import Renderer
from qdpo.data.tokens.sieve import Prepared
from qdpo.data.tokens.store import PairStore, TokenPair
from qdpo.errors import DataError
from qdpo.run.record import DataRecord
from qdpo.run.watcher import Watcher
from qdpo.settings.layered import shipped_folder
from qdpo.settings.schema import DataConfig

MIB = 2**20


@dataclass(frozen=True)
class PreparedData:
    """Token ids of all pairs, and the record of where they came from."""

    train: PairStore
    held_out: PairStore
    about: DataRecord
    files: list[Path]
    notes: list[RowNote]


@dataclass(frozen=True)
class ReadData:
    """The pairs of one or several sources, and how they were read."""

    sources: list[Source]
    layouts: list[Layout]
    prepared: Prepared
    template_notes: list[str]

    @property
    def name(self) -> str:
        """Names of the sources, in the order of data.path."""
        return " + ".join(source.name for source in self.sources)


def prepare_data(
    config: DataConfig, tokenizer: Any, *, seed: int, watcher: Watcher, scratch: Path | None = None
) -> PreparedData:
    """Read and tokenise the training and held-out pairs; ids are kept in a temporary file in `scratch`.

    Raises: DataError, also if more than data.max_drop_fraction of the pairs cannot be used.
    """
    say = watcher.say
    main = read_data(config, tokenizer, watcher, scratch=scratch)
    _tell(main, say, "")
    _refuse(config, main)
    first = main.sources[0]
    other_name = other_revision = None
    sources, notes = list(main.sources), list(main.prepared.notes)
    pairs, source_of, ends = main.prepared.pairs, main.prepared.source_of, Counter(main.prepared.ends)
    if config.eval_path or config.eval_split:
        other = read_held_out(config, tokenizer, watcher, scratch=scratch)
        _tell(other, say, "held out: ")
        _refuse(config, other)
        held_out = other.prepared.pairs[: config.eval_limit]
        sources += other.sources
        notes += other.prepared.notes
        ends += other.prepared.ends
        other_name, other_revision = other.name, other.sources[0].revision
        held_out = _without_overlap(config, pairs, held_out, say)
        places: Sequence[int] = range(len(pairs))
    else:
        held = split.held_out_places(pairs, config.eval_fraction, config.eval_limit, seed)
        held_out, others = pairs.select(held), set(held)
        places = [place for place in range(len(pairs)) if place not in others]
    train = pairs.select(places)
    if config.weights is not None:
        train = train.select(split.weighted_places(train, source_of[list(places)], config.weights, seed))
        if not len(train):
            raise DataError(f"data.weights={'+'.join(map(str, config.weights))} leaves no training pairs. Raise it.")
    dropped = sum(note.action == "dropped" for note in notes)
    about = DataRecord(
        source=main.name, revision=first.revision, license=first.license, train_pairs=len(train),
        held_out_pairs=len(held_out), dropped=dropped, held_out_source=other_name, held_out_revision=other_revision,
        ends=[token for token, _count in ends.most_common()],
    )  # fmt: skip
    if config.template_options:
        switches = ", ".join(f"{name}={json.dumps(value)}" for name, value in config.template_options.items())
        say(f"chat template: rendered with {switches} (data.template_options), here and in every export")
    say(f"pairs: {len(train)} to train, {len(held_out)} held out")
    files = [Path(name) for entry in sources for name in entry.files]
    return PreparedData(train=train, held_out=held_out, about=about, files=files, notes=notes)


def read_data(config: DataConfig, tokenizer: Any, watcher: Watcher, *, scratch: Path | None = None) -> ReadData:
    """All usable pairs of data.path, with none held out. There may be none; the notes say why."""
    return _read(config, str(config.path), config.split, config.limit, tokenizer, watcher, scratch)


def read_held_out(config: DataConfig, tokenizer: Any, watcher: Watcher, *, scratch: Path | None = None) -> ReadData:
    """The pairs of data.eval_path or data.eval_split."""
    path = config.eval_path or str(config.path)
    return _read(config, path, config.eval_split, config.eval_limit, tokenizer, watcher, scratch)


def read_pairs(config: DataConfig, tokenizer: Any, watcher: Watcher) -> tuple[str, PairStore]:
    """Name and all usable pairs of data.path. Raises: DataError if there are none."""
    found = read_data(config, tokenizer, watcher)
    _tell(found, watcher.say, "")
    if not len(found.prepared.pairs):
        raise sieve.nothing_usable(found.prepared)
    return found.name, found.prepared.pairs


def check_ids(pairs: Sequence[TokenPair], vocab_size: int, tokenizer: Any) -> None:
    """Raises: DataError if a pair has a token id without an embedding in the model."""
    if isinstance(pairs, PairStore) and pairs.are_within(vocab_size):
        return
    for found in pairs:
        for ids in (found.prompt, found.chosen, found.rejected):
            for wrong in ids[(ids < 0) | (ids >= vocab_size)][:1].tolist():
                raise DataError(_wrong_id(found.row, wrong, vocab_size, tokenizer))


def _wrong_id(row: int, wrong: int, vocab_size: int, tokenizer: Any) -> str:
    token = tokenizer.convert_ids_to_tokens(wrong) if 0 <= wrong < len(tokenizer) else None
    if token is None:
        return (
            f"Row {row} has the token id {wrong}, but the ids of the model and its tokenizer go from 0 to "
            f"{vocab_size - 1}: the prepared pairs are damaged. Put prepared/ of the run back from a copy, or start "
            "again with `--fresh`."
        )
    return (
        f"Row {row} has the token {token!r} with the id {wrong}, but the model has embeddings only for ids below "
        f"{vocab_size}: the token was added to the tokenizer, but not to the model. Put the model's own tokenizer into "
        "its folder, or choose a data.template without the token."
    )


def limits_of(config: DataConfig) -> Limits:
    """The length rule that the settings ask for."""
    return Limits(config.max_tokens, config.max_prompt_tokens or config.max_tokens, config.long_prompt)


def open_sources(
    config: DataConfig, path: str, chosen_split: str | None, watcher: Watcher
) -> list[tuple[Source, Layout, int]]:
    """Each source in `path`, with its layout and number of rows; reads every row of a file once."""
    columns = {name: value for name, value in config.columns.model_dump().items() if value is not None}
    found = []
    for one in source.split_paths(path):
        opened = source.open_source(
            one, split=chosen_split, revision=config.revision, shipped=shipped_folder(),
            skip_bad=config.skip_bad_lines, row_bytes=round(config.max_row_mib * MIB),
        )  # fmt: skip
        bar = _Bytes(watcher, opened.rows.bytes, f"reading {one}")
        sample = opened.rows.read_sample(bar.advance)
        bar.finish()
        layout = pair.detect_layout(
            sample, columns, opened.name, form=config.format, last_answer_only=config.last_answer_only
        )
        pair.check_sample(sample, layout, opened.name)
        found.append((opened, layout, sample.count))
    return found


def _read(
    config: DataConfig,
    path: str,
    chosen_split: str | None,
    limit: int | None,
    tokenizer: Any,
    watcher: Watcher,
    scratch: Path | None,
) -> ReadData:
    if note := templates.settle_template(tokenizer, config.template):
        watcher.say(note)
    renderer = Renderer.of(tokenizer, config)
    work = sieve.Preparation(
        tokenizer, limits_of(config), renderer, keep_empty_rejected=config.keep_empty_rejected, scratch=scratch
    )
    opened = open_sources(config, path, chosen_split, watcher)
    for one, layout, count in opened:
        watcher.begin(f"tokenising {one.name}", count, "row")
        done = 0

        def advance(seen: int) -> None:
            nonlocal done
            watcher.advance(seen - done)
            done = seen

        work.add(one.rows.located(), layout, source=one.name, limit=limit, progress=advance)
        watcher.finish()
    sources, layouts = [one for one, _, _ in opened], [layout for _, layout, _ in opened]
    return ReadData(
        sources,
        layouts,
        work.finish(),
        templates.template_warnings(tokenizer, config.template, config.template_options),
    )


class _Bytes:
    """A progress bar in MiB, for files that take a while to read."""

    def __init__(self, watcher: Watcher, size: int, what: str):
        self._watcher, self._done, self._told, self._shown = watcher, 0, 0, size > 64 * MIB
        if self._shown:
            watcher.begin(what, size // MIB, "MiB")

    def advance(self, read: int) -> None:
        self._done += read
        if self._shown and (whole := self._done // MIB) > self._told:
            self._watcher.advance(whole - self._told)
            self._told = whole

    def finish(self) -> None:
        if self._shown:
            self._watcher.finish()


def _tell(found: ReadData, say: Any, before: str) -> None:
    lines = report.summary_lines(found.prepared, found.layouts, found.sources)
    if before:  # the number of held-out pairs has a warning of its own
        lines = [line for line in lines if report.FEW not in line]
    lines += [f"warning: {note}" for note in found.template_notes]
    for line in lines:
        say(before + line)


def _refuse(config: DataConfig, found: ReadData) -> None:
    if not len(found.prepared.pairs):
        raise sieve.nothing_usable(found.prepared)
    if report.drop_fraction(found.prepared) > config.max_drop_fraction:
        raise DataError(
            f"{found.name}: {report.too_many_dropped(found.prepared, config.max_drop_fraction)}. `qdpo data check` "
            "lists them all. If they may be dropped, raise data.max_drop_fraction."
        )


def _without_overlap(config: DataConfig, train: PairStore, held_out: PairStore, say: Any) -> PairStore:
    shared = report.overlap_places(train, held_out)
    if not shared:
        return held_out
    if not config.drop_overlap:
        say(
            f"warning: {len(shared)} held-out prompts are also trained on, so held-out figures are too good "
            "(hold-out leakage); data.drop_overlap=true leaves them out"
        )
        return held_out
    gone = set(shared)
    left = held_out.select([place for place in range(len(held_out)) if place not in gone])
    say(f"{len(shared)} held-out pairs left out: their prompts are trained on")
    if not len(left):
        raise DataError(
            "All held-out prompts are also trained on, so data.drop_overlap=true leaves none. Give other pairs."
        )
    return left
