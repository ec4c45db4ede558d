"""Preference pairs as both trainers take them: rows of the source for qdpo, texts for TRL, and the same token ids."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdpo.data import prepare
from qdpo.data.layouts.pair import Rejection, detect_layout, to_pair
from qdpo.data.read.source import open_source
from qdpo.data.tokens.render import Rendered, Renderer
from qdpo.data.tokens.sieve import TokenPair
from qdpo.report.screen.live import Terminal
from qdpo.settings import layered


@dataclass(frozen=True)
class Candidate:
    """A usable pair: its row as it stands in the source, its texts, and qdpo's ids."""

    row: dict[str, Any]
    texts: Rendered
    ids: TokenPair


def read_candidates(path: str, tokenizer: Any, *, max_tokens: int) -> list[Candidate]:
    """All pairs of `path` that qdpo would use. TRL gets them as plain text, so that both see the same template."""
    settings = [f"data.path={path}", "model.path=given", f"data.max_tokens={max_tokens}"]
    config = layered.resolve(settings).config.data
    _name, pairs = prepare.read_pairs(config, tokenizer, Terminal())
    source = open_source(path, shipped=layered.shipped_folder())
    layout = detect_layout(source.rows.read_sample(), {}, source.name)
    rows, renderer, candidates = list(source.rows), Renderer(tokenizer=tokenizer), []
    for pair in pairs:
        row = rows[pair.row - 1]
        parsed = to_pair(row, pair.row, layout)
        assert not isinstance(parsed, Rejection)
        texts = renderer.render(parsed)
        assert not isinstance(texts, Rejection)
        candidates.append(Candidate(row, texts, pair))
    return candidates


def same_in_both(
    candidates: Sequence[Candidate], trl_ids: Sequence[Sequence[list[int]]], max_tokens: int
) -> list[bool]:
    """For each pair, whether TRL's ids, cut as its collator cuts them, are qdpo's."""
    same = []
    for candidate, (prompt, chosen, rejected) in zip(candidates, trl_ids, strict=True):
        room = max_tokens - len(prompt)
        ours = candidate.ids
        same.append(
            [prompt, chosen[:room], rejected[:room]]
            == [ours.prompt.tolist(), ours.chosen.tolist(), ours.rejected.tolist()]
        )
    return same


def write_rows(path: Path, candidates: Sequence[Candidate]) -> Path:
    path.write_text("".join(json.dumps(candidate.row) + "\n" for candidate in candidates), encoding="utf-8")
    return path
