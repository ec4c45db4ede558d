"""What became of the rows of a data set: the lines on screen, and the report file."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from qdpo.data.layout import Layout
from qdpo.data.source import Source
from qdpo.data.tokens import Prepared, RowNote, TokenPair

LENGTH_BIAS = 0.9
"""From this share of longer chosen answers on, length alone tells the answers apart."""


def write_report(path: Path, notes: Sequence[RowNote], source_name: str) -> None:
    """Adds one JSON object a line for each row that was dropped or cut; several sources share the file."""
    lines = [json.dumps({**asdict(note), "source": source_name}, ensure_ascii=False) + "\n" for note in notes]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def summary_lines(prepared: Prepared, layout: Layout, source: Source) -> list[str]:
    """The data set in a few lines: how it was understood, what is used, what is not and why, and how long it is."""
    pairs, notes = prepared.pairs, prepared.notes
    dropped = Counter(note.reason for note in notes if note.action == "dropped")
    cut = sum(note.action == "cut" for note in notes)
    lines = [
        f"data: {source.name}" + (f" (licence: {source.license})" if source.license else ""),
        f"layout: {layout.name}: {layout.why}",
        f"rows: {prepared.seen:,} seen, {len(pairs):,} usable, {dropped.total():,} dropped, {cut:,} cut",
    ]
    if dropped:
        lines.append("dropped: " + ", ".join(f"{reason} {count:,}" for reason, count in dropped.most_common()))
    lengths = np.array([[len(pair.prompt), len(pair.chosen), len(pair.rejected)] for pair in pairs])
    sides = zip(("prompt", "chosen", "rejected"), np.median(lengths, axis=0), lengths.max(axis=0), strict=True)
    lines.append("tokens (median / longest): " + ", ".join(f"{side} {mid:,.0f} / {top:,}" for side, mid, top in sides))
    longest = pairs[int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).argmax())]
    longer = float((lengths[:, 1] > lengths[:, 2]).mean())
    lines.append(
        f"longest pair: {longest.tokens:,} tokens (row {longest.row}); chosen is longer in {longer:.0%} of pairs"
    )
    if longer >= LENGTH_BIAS:
        lines.append("warning: length alone tells chosen from rejected here, so the model may only learn to write more")
    if prepared.scores_disagree and layout.scores:
        share = prepared.scores_disagree / len(pairs)
        lines.append(f"warning: {layout.scores[0]} is below {layout.scores[1]} in {share:.0%} of the pairs")
    return lines


def overlap(train: Sequence[TokenPair], held_out: Sequence[TokenPair]) -> int:
    """How many held-out pairs have a prompt that is trained on."""
    trained = {pair.prompt.tobytes() for pair in train}
    return sum(pair.prompt.tobytes() in trained for pair in held_out)
