"""From settings to prepared pairs in the run folder: read, recognise, render, tokenise once, split, report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo import rundir
from qdpo.config import DataConfig
from qdpo.data import check, pair, source, tokens
from qdpo.data.tokens import TokenPair
from qdpo.errors import DataError
from qdpo.presets import shipped_folder
from qdpo.rundir import RunDir


@dataclass(frozen=True)
class PreparedData:
    """Token ids of all pairs, and what must be recorded about where they came from."""

    train: list[TokenPair]
    held_out: list[TokenPair]
    about: dict[str, Any]
    files: list[Path]
    notes: list[tuple[str, list[tokens.RowNote]]]


def prepare_data(config: DataConfig, tokenizer: Any, *, seed: int, say: Callable[[str], None]) -> PreparedData:
    """Reads and tokenises the training and held-out pairs. Raises: DataError; writes nothing."""
    main, prepared = _read(config, str(config.path), config.split, config.limit, tokenizer, say)
    files, notes = [main], [(main.name, prepared.notes)]
    about: dict[str, Any] = {"source": main.name, "revision": main.revision, "license": main.license}
    if config.eval_path or config.eval_split:
        other, held = _read(
            config,
            config.eval_path or str(config.path),
            config.eval_split,
            config.eval_limit,
            tokenizer,
            say,
            held_out=True,
        )
        train, held_out = prepared.pairs, held.pairs[: config.eval_limit]
        files.append(other)
        notes.append((other.name, held.notes))
        about |= {"held_out_source": other.name, "held_out_revision": other.revision}
        if shared := check.overlap(train, held_out):
            say(f"warning: {shared} held-out prompts are also among the training prompts, so held-out figures flatter")
    else:
        train, held_out = tokens.split_held_out(prepared.pairs, config.eval_fraction, config.eval_limit, seed)
    dropped = sum(note.action == "dropped" for _name, rows in notes for note in rows)
    about |= {"train_pairs": len(train), "held_out_pairs": len(held_out), "dropped": dropped}
    say(f"pairs: {len(train)} to train, {len(held_out)} held out")
    return PreparedData(train, held_out, about, [Path(name) for entry in files for name in entry.files], notes)


def read_pairs(config: DataConfig, tokenizer: Any, *, say: Callable[[str], None]) -> tuple[str, list[TokenPair]]:
    """Name and all usable pairs of data.path, nothing held out."""
    opened, prepared = _read(config, str(config.path), config.split, config.limit, tokenizer, say)
    return opened.name, prepared.pairs


def _read(
    config: DataConfig,
    path: str,
    split: str | None,
    limit: int | None,
    tokenizer: Any,
    say: Callable[[str], None],
    *,
    held_out: bool = False,
) -> tuple[source.Source, tokens.Prepared]:
    opened = source.open_source(path, split=split, revision=config.revision, shipped=shipped_folder())
    columns = {name: value for name, value in config.columns.model_dump().items() if value is not None}
    layout = pair.detect_layout(opened.rows, columns, opened.name)
    prepared = tokens.prepare(
        opened.rows,
        layout,
        tokenizer,
        max_tokens=config.max_tokens,
        max_prompt_tokens=config.max_prompt_tokens or config.max_tokens,
        template=config.template,
        system=config.system,
        limit=limit,
    )
    for line in check.summary_lines(prepared, layout, opened):
        say(f"held out: {line}" if held_out else line)
    if not prepared.pairs:
        reasons = sorted({note.reason for note in prepared.notes})
        raise DataError(
            f"No usable pair in {opened.name}: all {prepared.seen} rows were dropped ({', '.join(reasons)})."
        )
    return opened, prepared


def store(run: RunDir, prepared: PreparedData) -> None:
    """Writes prepared/ and data_report.jsonl. The ids are never rendered again: a template may print today's date."""

    def fill(folder: Path) -> None:
        tokens.save_pairs(folder / run.train_pairs.name, prepared.train)
        tokens.save_pairs(folder / run.held_out_pairs.name, prepared.held_out)

    run.data_report.write_text("", encoding="utf-8")
    for name, rows in prepared.notes:
        check.write_report(run.data_report, rows, name)
    rundir.write_folder(run.prepared, fill)


def load(run: RunDir) -> tuple[list[TokenPair], list[TokenPair]]:
    """The stored training and held-out pairs."""
    return tokens.load_pairs(run.train_pairs), tokens.load_pairs(run.held_out_pairs)
