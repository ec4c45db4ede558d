"""The data report: counts of used and dropped rows, lengths, biases, a verdict, and the report file."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from qdpo.data.layouts.before import unused_warning
from qdpo.data.layouts.layout import Layout
from qdpo.data.layouts.notes import RowNote
from qdpo.data.layouts.origin import Origin
from qdpo.data.read.source import Source
from qdpo.data.tokens.cut import Limits
from qdpo.data.tokens.render import Fact
from qdpo.data.tokens.sieve import Prepared
from qdpo.data.tokens.store import TokenPair
from qdpo.run import disk

LENGTH_BIAS = 0.9
"""Share of longer chosen answers from which length alone tells the answers apart."""
FEW = "pairs are few"
FEW_PAIRS = 200
MUCH_CUT = 0.1
NOT_COUNTED = {"tie"}
"""Reasons that do not count against the quality of the data: these rows never were preferences."""
TRIED_TOKENS = (512, 1024, 2048, 4096, 8192, 16384)
SIDES = ("prompt", "chosen", "rejected")
BINS = 16
FACTS = {
    "thinking_stripped": "the chat template leaves out the thoughts of earlier answers in {count:,} pairs, as it will "
    "when the model is served (first: {example})",
    "text_before_answer": "the chat template puts text before {count:,} answers, which is trained on: {example!r}",
    "prompt_kept": "the chat template writes {count:,} prompts differently once an answer follows ({example}); the "
    "form used at inference was kept",
    "thinking_kept": "{count:,} answers have a thought that the chat template would rewrite; they are trained on "
    "unchanged (first: {example})",
    "system_folded": "the chat template does not take system messages ({example}): {count:,} were put before the first "
    "question (data.refused_system=drop leaves them out)",
    "system_left_out": "the chat template does not take system messages ({example}): {count:,} were left out "
    "(data.refused_system=drop)",
    "system_unfoldable": "the chat template does not take system messages ({example}): {count:,} were left out, as "
    "they are followed by an answer, not by a question to put them before. The data report names these rows "
    "(system_unfoldable); begin them with a question, or remove them",
    "empty_thought": "the chat template puts {example!r} before {count:,} answers without a thought, and it is trained "
    "as part of them. Where the model will be served without thinking, set the template's switch, as in "
    "data.template_options.enable_thinking=false",
    "thought_closed": "the prompt opens a thought, and {count:,} answers have none: each is trained with {example!r} "
    "before it. Where the model will be served without thinking, set the template's switch (data.template_options)",
    "calls_not_in_prompt": "the chat template leaves out {count:,} tool calls of earlier turns (first: {example})",
    "tools_not_in_prompt": "the chat template does not tell the model its functions in {count:,} pairs (first: "
    "{example}), as it will not when the model is served",
}


@dataclass(frozen=True)
class SourceReport:
    """One source of data.path, and its layout."""

    name: str
    license: str | None
    layout: str
    why: str


@dataclass(frozen=True)
class LengthReport:
    """Lengths in tokens; `histogram` has logarithmic bins from 1 to the longest."""

    median: float
    mean: float
    p95: float
    longest: int
    histogram: list[int]


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """A data set as it would be trained on. Lengths are in tokens; shares are of usable pairs."""

    sources: list[SourceReport]
    seen: int
    outcomes: int
    usable: int
    cut: int
    dropped: dict[str, int]
    mended: dict[str, int]
    drop_fraction: float
    """Share of the pairs that cannot be used, not counting ties."""
    lengths: dict[str, LengthReport]
    what_if: list[dict[str, int]]
    """For each data.max_tokens: number of pairs that stay whole, are cut, or are dropped for their length."""
    longest: dict[str, int]
    chosen_longer: float
    length_correlation: float
    """Pearson's r between an answer's length and whether it is the chosen one."""
    scores_disagree: int
    overlap: int | None
    origins: dict[str, int]
    """Number of answers by author; empty if no row names one."""
    on_policy: float | None
    """Share of the answers that the model to be trained wrote; None if no row names an author."""
    warnings: list[str]
    """Most harmful first."""
    fit: bool


def write_report(path: Path, notes: Sequence[RowNote]) -> None:
    """Append a JSON line for each row that was dropped, cut or mended, with its file and line.

    Raises: DiskError.
    """
    lines = []
    for note in notes:
        entry = asdict(note)
        entry["file"], entry["line"] = entry.pop("place") or (None, None)
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    disk.append_text(path, "".join(lines))


def summary_lines(prepared: Prepared, layouts: Sequence[Layout], sources: Sequence[Source]) -> list[str]:
    """The data set in a few lines: layout, rows used, rows dropped and why, and lengths."""
    lines = []
    for source, layout in zip(sources, layouts, strict=True):
        lines.append(f"data: {source.name}" + (f" (licence: {source.license})" if source.license else ""))
        lines.append(f"layout: {layout.name}: {layout.why}")
    lines.append(count_line(prepared))
    if prepared.dropped:
        lines.append("dropped: " + counted(prepared.dropped))
    if mended := mended_counts(prepared):
        lines.append("mended: " + counted(mended))
    if not len(prepared.pairs):
        return lines
    lengths = prepared.pairs.lengths
    sides = zip(SIDES, np.median(lengths, axis=0), lengths.max(axis=0), strict=True)
    lines.append("tokens (median / longest): " + ", ".join(f"{side} {mid:,.0f} / {top:,}" for side, mid, top in sides))
    longest = prepared.pairs[longest_place(prepared)]
    lines.append(
        f"longest pair: {longest.tokens:,} tokens (row {longest.row}); chosen is longer in "
        f"{chosen_longer(prepared):.0%} of pairs"
    )
    return lines + [f"warning: {text}" for text in data_warnings(prepared, layouts)]


def count_line(prepared: Prepared) -> str:
    """Rows and pairs in one line."""
    made = "" if prepared.outcomes == prepared.seen else f", which make {prepared.outcomes:,} pairs"
    cut = sum(note.action == "cut" for note in prepared.notes)
    return (
        f"rows: {prepared.seen:,} seen{made}, {len(prepared.pairs):,} usable, {prepared.dropped.total():,} dropped, "
        f"{cut:,} cut"
    )


def counted(reasons: Counter[str]) -> str:
    """Reasons with their counts, the most frequent first."""
    return ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common())


def mended_counts(prepared: Prepared) -> Counter[str]:
    """Number of mended rows, by what was done."""
    return Counter(note.reason for note in prepared.notes if note.action == "mended")


def longest_place(prepared: Prepared) -> int:
    """Place of the pair with the longest prompt and answer."""
    lengths = prepared.pairs.lengths
    return int((lengths[:, 0] + lengths[:, 1:].max(axis=1)).argmax())


def chosen_longer(prepared: Prepared) -> float:
    """Share of pairs whose chosen answer is the longer one."""
    return float((prepared.pairs.lengths[:, 1] > prepared.pairs.lengths[:, 2]).mean())


def drop_fraction(prepared: Prepared) -> float:
    """Share of the pairs that cannot be used, not counting ties."""
    dropped = sum(count for reason, count in prepared.dropped.items() if reason not in NOT_COUNTED)
    return dropped / max(1, prepared.outcomes)


def data_warnings(prepared: Prepared, layouts: Sequence[Layout]) -> list[str]:
    """Warnings about usable data, most harmful first."""
    warnings, pairs = [], max(1, len(prepared.pairs))
    scores = next((layout.scores for layout in layouts if layout.form == "pairs" and layout.scores), None)
    if prepared.scores_disagree and scores:
        share = prepared.scores_disagree / pairs
        advice = ": the labels look swapped" if share > 0.5 else ""
        warnings.append(f"{scores[0]} is below {scores[1]} in {share:.0%} of the pairs{advice}")
    warnings += [unused_warning(layout.unused) for layout in layouts if layout.unused]
    if contradictions := prepared.dropped["contradiction"]:
        warnings.append(
            f"{contradictions:,} pairs contradict another pair (same answers, labels swapped) and are left out: the "
            "labels are noisy"
        )
    warnings += [_fact(name, prepared.facts[name]) for name in FACTS if name in prepared.facts]
    if len(prepared.pairs) and chosen_longer(prepared) >= LENGTH_BIAS:
        warnings.append("length alone tells chosen from rejected, so the model may only learn to write longer answers")
    if prepared.chosen_cut:
        warnings.append(
            f"{prepared.chosen_cut:,} chosen answers were cut at the length limit when they were drawn: they teach the "
            "model to stop in mid-sentence. Draw with a higher --max-new-tokens, or choose other answers"
        )
    cut = sum(note.action == "cut" for note in prepared.notes)
    if cut > MUCH_CUT * pairs:
        warnings.append(f"answers are cut at their end in {cut:,} pairs; a higher data.max_tokens keeps them whole")
    if spelt := mended_counts(prepared)["special_token_text"]:
        warnings.append(f"{spelt:,} pairs contain the text of a special token; it is trained on as ordinary text")
    if prepared.merged:
        warnings.append(
            f"{prepared.merged:,} answers would share a token with their prompt; they are tokenised separately, as at "
            "inference"
        )
    if len(prepared.pairs) < FEW_PAIRS:
        warnings.append(f"{len(prepared.pairs):,} {FEW}: a noticeable change takes some hundreds")
    return warnings


def make_report(
    prepared: Prepared,
    layouts: Sequence[Layout],
    sources: Sequence[Source],
    limits: Limits,
    *,
    max_drop_fraction: float,
    overlap: int | None,
    policy: Origin,
    template_notes: Sequence[str],
) -> DataReport:
    """The full report on a data set. `overlap` counts held-out pairs whose prompt is trained on.

    `policy` is the model to be trained; the checksum of its weights is unknown, since they are not loaded.
    """
    share, warnings = drop_fraction(prepared), data_warnings(prepared, layouts)
    if overlap:
        warnings.insert(
            0, f"{overlap:,} held-out prompts are also trained on, so held-out figures are too good (hold-out leakage)"
        )
    if share > max_drop_fraction:
        warnings.insert(0, too_many_dropped(prepared, max_drop_fraction))
    lengths, usable = prepared.pairs.lengths, len(prepared.pairs)
    longest = prepared.pairs[longest_place(prepared)] if usable else None
    return DataReport(
        sources=[
            SourceReport(source.name, source.license, layout.name, layout.why)
            for source, layout in zip(sources, layouts, strict=True)
        ],
        seen=prepared.seen,
        outcomes=prepared.outcomes,
        usable=usable,
        cut=sum(note.action == "cut" for note in prepared.notes),
        dropped=dict(prepared.dropped.most_common()),
        mended=dict(mended_counts(prepared).most_common()),
        drop_fraction=share,
        lengths={side: _lengths(lengths[:, n]) for n, side in enumerate(SIDES)} if usable else {},
        what_if=[_what_if(prepared.full_lengths, tokens, limits) for tokens in _tried(limits)],
        longest={"row": longest.row, "tokens": longest.tokens} if longest else {},
        chosen_longer=chosen_longer(prepared) if usable else 0.0,
        length_correlation=_correlation(lengths) if usable else 0.0,
        scores_disagree=prepared.scores_disagree,
        overlap=overlap,
        origins=_by_name(prepared.origins),
        on_policy=_on_policy(prepared.origins, policy),
        warnings=warnings + list(template_notes),
        fit=bool(usable) and share <= max_drop_fraction,
    )


def _by_name(origins: Counter[Origin | None]) -> dict[str, int]:
    if set(origins) <= {None}:
        return {}
    found = Counter[str]()
    for origin, count in origins.items():
        found["unknown" if origin is None else "a person, by editing" if origin.edited else origin.name] += count
    return dict(found.most_common())


def _on_policy(origins: Counter[Origin | None], policy: Origin) -> float | None:
    if set(origins) <= {None}:
        return None
    own = sum(count for origin, count in origins.items() if origin is not None and origin.is_of(policy))
    return own / origins.total()


def too_many_dropped(prepared: Prepared, allowed: float) -> str:
    """The sentence for a data set with too many unusable pairs."""
    reasons = Counter({reason: n for reason, n in prepared.dropped.items() if reason not in NOT_COUNTED})
    worst = reasons.most_common(1)[0][0]
    first = next(note for note in prepared.notes if note.reason == worst)
    where = f"{first.place.file}, line {first.place.line}" if first.place else f"row {first.row}"
    return (
        f"{drop_fraction(prepared):.0%} of the pairs cannot be used ({counted(reasons)}), more than "
        f"data.max_drop_fraction={allowed:g} allows. For example {where}: {first.detail}"
    )


def overlap_places(train: Sequence[TokenPair], held_out: Sequence[TokenPair]) -> list[int]:
    """Places of the held-out pairs whose prompt is trained on."""
    trained = {pair.prompt.tobytes() for pair in train}
    return [place for place, pair in enumerate(held_out) if pair.prompt.tobytes() in trained]


def _fact(name: str, fact: Fact) -> str:
    return FACTS[name].format(count=fact.count, example=fact.example)


def _lengths(values: np.ndarray) -> LengthReport:
    edges = np.geomspace(1, max(2, int(values.max())) + 1, BINS + 1)
    return LengthReport(
        median=float(np.median(values)),
        mean=float(values.mean()),
        p95=float(np.percentile(values, 95)),
        longest=int(values.max()),
        histogram=np.histogram(values, edges)[0].tolist(),
    )


def _tried(limits: Limits) -> list[int]:
    return sorted({*TRIED_TOKENS, limits.max_tokens})


def _what_if(lengths: np.ndarray, tokens: int, limits: Limits) -> dict[str, int]:
    prompt = tokens if limits.max_prompt_tokens >= limits.max_tokens else limits.max_prompt_tokens
    tried = Limits(tokens, prompt)
    counts = Counter(tried.outcome(*map(int, row)) for row in lengths)
    dropped = counts["prompt_too_long"] + counts["response_cut_too_much"]
    return {"max_tokens": tokens, "whole": counts["whole"], "cut": counts["cut"], "dropped": dropped}


def _correlation(lengths: np.ndarray) -> float:
    values = lengths[:, 1:].T.reshape(-1).astype(float)
    chosen = np.repeat([1.0, 0.0], len(lengths))
    return 0.0 if not values.std() else float(np.corrcoef(values, chosen)[0, 1])
