"""Pairs as token ids: tokenised once, held to one length rule, freed of duplicates, and split by prompt.

Ids are int32 arrays. `tokens` counts prompt + chosen + rejected, as a shared-prompt row holds them.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from qdpo import rundir
from qdpo.data.encode import IdLists, encode
from qdpo.data.layout import Layout, Row
from qdpo.data.pair import Rejection, scores_disagree, to_pair
from qdpo.data.render import Texts, render
from qdpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = npt.NDArray[np.int32]

BATCH_ROWS = 1000
MIN_KEPT_SHARE = 0.5
MIN_KEPT_TOKENS = 32
"""A cut answer must keep at least this much: less is another answer, and its preference another preference."""


@dataclass(frozen=True, eq=False)
class TokenPair:
    """One prompt and two responses as ids; prompt + response is what the model reads."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    row: int
    """Row of the data set, counted from 1."""

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over lengths and ids: the same for the same pair wherever it stands."""
        return _digest(self.prompt, self.chosen, self.rejected)


@dataclass(frozen=True)
class RowNote:
    """What was done to a row, for the data report."""

    row: int
    action: Literal["dropped", "cut"]
    reason: str
    detail: str


@dataclass(frozen=True)
class Prepared:
    """The usable pairs of a data set in its order, and a note on each row that was dropped or cut."""

    pairs: list[TokenPair]
    notes: list[RowNote]
    seen: int
    """Rows looked at; fewer than there are where `limit` was reached."""
    scores_disagree: int = 0
    """Usable pairs whose score columns rate the rejected answer higher."""


@dataclass
class _Sieve:
    """Keeps each pair once, and neither of two that contradict each other."""

    kept: dict[str, TokenPair] = field(default_factory=dict)
    contradicted: dict[str, int] = field(default_factory=dict)
    """Digest of a pair, either way round, to the row that first held it."""

    def add(self, pair: TokenPair) -> list[RowNote]:
        """Notes on the rows that fall out by adding this one."""
        swapped = _digest(pair.prompt, pair.rejected, pair.chosen)
        for digest in (pair.digest, swapped):
            if digest in self.contradicted:
                return [_contradiction(pair.row, self.contradicted[digest])]
        if pair.digest in self.kept:
            return [RowNote(pair.row, "dropped", "duplicate", f"the same pair as row {self.kept[pair.digest].row}")]
        if swapped in self.kept:
            first = self.kept.pop(swapped)
            self.contradicted[swapped] = first.row
            return [_contradiction(first.row, pair.row), _contradiction(pair.row, first.row)]
        self.kept[pair.digest] = pair
        return []


def prepare(
    source_rows: Iterable[Row],
    layout: Layout,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_tokens: int,
    max_prompt_tokens: int,
    template: str,
    system: str | None,
    limit: int | None,
    progress: Callable[[int], None] | None = None,
) -> Prepared:
    """Turns rows into token pairs, until `limit` usable ones are found.

    `max_tokens` bounds prompt + longer response, `max_prompt_tokens` the prompt. `progress` is told the rows seen.
    Raises: DataError if no row is usable.
    """
    sieve, notes, seen, against_scores = _Sieve(), list[RowNote](), 0, set[int]()
    batch_rows = BATCH_ROWS if limit is None else min(BATCH_ROWS, limit + 50)  # some rows will not be usable
    for batch in _batches(source_rows, batch_rows):
        for row, result in zip(batch, _encode_rows(batch, seen + 1, layout, tokenizer, template, system), strict=True):
            seen += 1
            if isinstance(result, Rejection):
                notes.append(_dropped(result.row, result.reason, result.detail))
                continue
            pair, found = _fit(seen, result, max_tokens, max_prompt_tokens)
            notes += found if pair is None else [*found, *sieve.add(pair)]
            if scores_disagree(row, layout):
                against_scores.add(seen)
            if len(sieve.kept) == limit:
                break
        if progress:
            progress(seen)
        if len(sieve.kept) == limit:
            break
    if not sieve.kept:
        raise _nothing_usable(notes, seen)
    pairs = list(sieve.kept.values())
    return Prepared(pairs, _settled(notes), seen, sum(pair.row in against_scores for pair in pairs))


def split_held_out(
    pairs: Sequence[TokenPair], fraction: float, limit: int | None, seed: int
) -> tuple[list[TokenPair], list[TokenPair]]:
    """Train and held-out pairs, both in the given order; no prompt is on both sides.

    Prompts are ranked by a hash of seed and ids, and the first of them are held out: up to `fraction` of the pairs and
    up to `limit`. The order of the pairs does not matter, and a data set that grows keeps most of its split.
    Raises: DataError where one side would be empty.
    """
    sizes = Counter(map(_prompt_key, pairs))
    ranked = sorted(sizes, key=lambda prompt: sha256(b"%d:" % seed + prompt).digest())
    most = len(pairs) - 1 if limit is None else min(limit, len(pairs) - 1)
    target = min(max(1, round(fraction * len(pairs))), most)
    held_out, held_pairs = set[bytes](), 0
    for prompt in ranked:
        if held_pairs + sizes[prompt] <= target:
            held_out.add(prompt)
            held_pairs += sizes[prompt]
    if not held_out:  # every prompt has more pairs than the share: the one with the fewest
        held_out = {prompt for prompt in sorted(ranked, key=sizes.__getitem__)[:1] if sizes[prompt] <= most}
    if not held_out:
        bound = "" if limit is None else f", at most {limit} of them held out"
        raise DataError(
            f"{len(pairs)} pairs with {len(sizes)} different prompts cannot be split into training and held-out pairs "
            f"(data.eval_fraction={fraction}{bound}): a prompt may stand on one side only. Give more prompts, or a "
            "separate data.eval_path."
        )
    train = [pair for pair in pairs if _prompt_key(pair) not in held_out]
    return train, [pair for pair in pairs if _prompt_key(pair) in held_out]


def save_pairs(path: Path, pairs: Sequence[TokenPair]) -> None:
    """Writes the pairs into one safetensors file, whole or not at all. Raises DiskError."""
    arrays = [ids for pair in pairs for ids in (pair.prompt, pair.chosen, pair.rejected)]
    data = save(
        {
            "ids": np.concatenate([np.zeros(0, np.int32), *arrays]),
            "lengths": np.array([len(ids) for ids in arrays], np.int32).reshape(len(pairs), 3),
            "rows": np.array([pair.row for pair in pairs], np.int64),
        }
    )
    rundir.write_bytes(path, data)


def load_pairs(path: Path) -> list[TokenPair]:
    """The pairs of `save_pairs`, byte for byte. Raises DataError if the file is missing, damaged or another one."""
    try:
        tensors = load_file(path)
        ids, lengths, rows = tensors["ids"], tensors["lengths"], tensors["rows"]
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(
            f"{path} does not hold prepared pairs ({error}). Remove it to prepare the data again."
        ) from error
    ends = lengths.astype(np.int64).cumsum()
    parts = np.split(ids, ends[:-1]) if len(ends) else []
    columns = zip(parts[::3], parts[1::3], parts[2::3], rows, strict=True)
    return [TokenPair(prompt, chosen, rejected, int(row)) for prompt, chosen, rejected, row in columns]


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _encode_rows(
    batch: list[Row],
    first: int,
    layout: Layout,
    tokenizer: "PreTrainedTokenizerBase",
    template: str,
    system: str | None,
) -> Iterator[Rejection | IdLists]:
    """Each row's ids or why it has none, in order; the whole batch is tokenised in one go."""
    texts: list[Rejection | Texts] = []
    for number, row in enumerate(batch, first):
        pair = to_pair(row, number, layout)
        texts.append(pair if isinstance(pair, Rejection) else render(pair, tokenizer, template=template, system=system))
    encoded = encode([text for text in texts if not isinstance(text, Rejection)], tokenizer, template)
    for text in texts:
        yield text if isinstance(text, Rejection) else next(encoded)


def _fit(row: int, ids: IdLists, max_tokens: int, max_prompt_tokens: int) -> tuple[TokenPair | None, list[RowNote]]:
    """The one length rule: a pair stays whole if it fits, a prompt is never cut, a response loses only its end.

    A cut response has no end token: the model must not learn to stop there.
    """
    prompt, *responses = ids
    if len(prompt) > max_prompt_tokens or len(prompt) >= max_tokens:
        allowed = min(max_prompt_tokens, max_tokens - 1)
        return None, [_dropped(row, "prompt_too_long", f"the prompt has {len(prompt)} tokens, {allowed} are allowed")]
    room = max_tokens - len(prompt)
    cuts = []
    for side, response in zip(("chosen", "rejected"), responses, strict=True):
        if len(response) > room:
            cuts.append(f"{side} from {len(response)} to {room} tokens")
            if room < max(MIN_KEPT_SHARE * len(response), MIN_KEPT_TOKENS):
                return None, [_dropped(row, "response_cut_too_much", f"would cut {cuts[-1]}")]
    chosen, rejected = (response[:room] for response in responses)
    if chosen == rejected:
        reason = "identical_after_cut" if cuts else "identical_tokens"
        return None, [_dropped(row, reason, f"chosen and rejected are the same {len(chosen)} tokens")]
    if not (prompt and chosen and rejected):
        reason = "empty_response" if prompt else "empty_prompt"
        return None, [_dropped(row, reason, "the tokenizer makes no token of it")]
    pair = TokenPair(np.array(prompt, np.int32), np.array(chosen, np.int32), np.array(rejected, np.int32), row)
    return pair, [RowNote(row, "cut", "response_cut", "; ".join(cuts))] if cuts else []


def _settled(notes: list[RowNote]) -> list[RowNote]:
    """By row, and without the cuts of rows that were dropped afterwards."""
    dropped = {note.row for note in notes if note.action == "dropped"}
    standing = (note for note in notes if note.action == "dropped" or note.row not in dropped)
    return sorted(standing, key=lambda note: note.row)


def _dropped(row: int, reason: str, detail: str) -> RowNote:
    return RowNote(row, "dropped", reason, detail)


def _contradiction(row: int, other: int) -> RowNote:
    return _dropped(row, "contradiction", f"row {other} holds the same two answers with the labels swapped")


def _nothing_usable(notes: list[RowNote], seen: int) -> DataError:
    reasons = Counter(note.reason for note in notes)
    counted = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
    first = f" Row {notes[0].row}: {notes[0].detail}." if notes else ""
    return DataError(
        f"None of the {seen} rows can be used ({counted or 'there are none'}).{first} Check data.path and "
        "data.columns, and for length reasons data.max_tokens and data.max_prompt_tokens."
    )


def _prompt_key(pair: TokenPair) -> bytes:
    return pair.prompt.astype("<i4").tobytes()


def _digest(*arrays: Ids) -> str:
    lengths = np.array([len(ids) for ids in arrays], np.int32)
    return sha256(b"".join(ids.astype("<i4").tobytes() for ids in (lengths, *arrays))).hexdigest()
