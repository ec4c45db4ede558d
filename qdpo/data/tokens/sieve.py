"""Converts rows into token pairs: tokenises once, applies the length rule, drops duplicates and contradictions.

Ids are int32 arrays. `tokens` counts prompt + chosen + rejected, as in a shared-prompt row.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qdpo.data.layouts.layout import Layout
from qdpo.data.layouts.notes import RowNote, Where
from qdpo.data.layouts.origin import Origin, Origins, origins_of
from qdpo.data.layouts.pair import Pair, Rejection, to_pairs, without_oldest_turns
from qdpo.data.layouts.winner import scores_disagree
from qdpo.data.read.files import Place
from qdpo.data.read.progress import BadLine, Row
from qdpo.data.tokens.cut import Limits, fit
from qdpo.data.tokens.encode import Encoder, IdLists
from qdpo.data.tokens.ends import special_ids
from qdpo.data.tokens.render import Fact, Rendered, Renderer
from qdpo.data.tokens.store import Ids as Ids
from qdpo.data.tokens.store import PairStore, Spool, digest_of
from qdpo.data.tokens.store import TokenPair as TokenPair
from qdpo.data.tokens.store import load_pairs as load_pairs
from qdpo.data.tokens.store import save_pairs as save_pairs
from qdpo.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 1000
Located = tuple[Place, Row | BadLine]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The usable pairs of one or several sources in their order, and a note on each row that was dropped or changed."""

    pairs: PairStore
    notes: list[RowNote]
    seen: int
    """Rows read; fewer than there are if a limit was reached."""
    outcomes: int
    """Pairs that these rows could have made; more than `seen` if rows hold several."""
    scores_disagree: int
    """Usable pairs whose score columns rate the rejected answer higher."""
    origins: Counter[Origin | None]
    """Answers of usable pairs by author; None if the row does not name one."""
    chosen_cut: int
    """Usable pairs whose chosen answer was cut at the length limit when it was drawn."""
    source_of: np.ndarray
    """Number of the source of each usable pair, from 0."""
    full_lengths: np.ndarray
    """Tokens of prompt, chosen and rejected, before any cut, for every tokenised pair."""
    facts: dict[str, Fact]
    merged: int
    """Responses that would have shared a token with the prompt."""
    ends: Counter[int]
    """The special tokens with which uncut answers end, by id."""

    @property
    def dropped(self) -> Counter[str]:
        """Number of dropped pairs, by reason."""
        return Counter(note.reason for note in self.notes if note.action == "dropped")


@dataclass
class _Sieve:
    """Deduplicates pairs, and drops both of two that contradict each other. Pairs are identified by their index."""

    kept: dict[bytes, int] = field(default_factory=dict)
    contradicted: dict[bytes, int] = field(default_factory=dict)
    """Digest of a pair, in either order, to the pair that first had it."""

    def classify(self, pair: TokenPair) -> tuple[Literal["new", "duplicate", "contradiction"], int]:
        """Classify the pair, with the index of the pair that it repeats or contradicts."""
        same = digest_of(pair.prompt, pair.chosen, pair.rejected)
        swapped = digest_of(pair.prompt, pair.rejected, pair.chosen)
        for digest in (same, swapped):
            if digest in self.contradicted:
                return "contradiction", self.contradicted[digest]
        if same in self.kept:
            return "duplicate", self.kept[same]
        if swapped in self.kept:
            self.contradicted[swapped] = self.kept.pop(swapped)
            return "contradiction", self.contradicted[swapped]
        return "new", -1


class Preparation:
    """Takes the rows of one source after the other, and returns all usable pairs at the end."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        limits: Limits,
        renderer: Renderer,
        *,
        keep_empty_rejected: bool = False,
        scratch: Path | None = None,
    ):
        self._limits, self._renderer, self._keep_empty = limits, renderer, keep_empty_rejected
        self._encoder = Encoder(tokenizer, renderer.template)
        self._spool, self._sieve = Spool(scratch), _Sieve()
        self._special, self._ends = special_ids(tokenizer), Counter[int]()
        self._notes: dict[int, list[RowNote]] = {}
        """Notes by the number of the outcome; a pair's other notes are removed if the pair is dropped afterwards."""
        self._places: list[tuple[int, str, Place | None]] = []
        self._source_of, self._against, self._full = array("H"), array("b"), array("i")
        self._origins: dict[Origins, int] = {}
        self._origin_of = array("i")
        self._dead = set[int]()
        self._sources, self._seen, self._outcomes = 0, 0, 0

    def add(
        self,
        rows: Iterable[Located],
        layout: Layout,
        *,
        source: str = "",
        limit: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Read rows until `limit` usable pairs are found. `progress` receives the rows read so far of this source."""
        self._sources += 1
        seen, first = 0, len(self._spool)

        def full() -> bool:
            return limit is not None and len(self._spool) - first - sum(n >= first for n in self._dead) >= limit

        batch_rows = BATCH_ROWS if limit is None else min(BATCH_ROWS, limit + 50)  # some rows will not be usable
        for batch in _batches(rows, batch_rows):
            for number, place, row, result in self._encode(batch, seen + 1, layout):
                if number > seen:
                    if full():
                        break
                    seen = number
                self._take(result, row, Where(number, source, place), layout)
            if progress:
                progress(seen)
            if full():
                break
        self._seen += seen

    def finish(self) -> Prepared:
        """The result, in which there may be no pairs."""
        alive = [n for n in range(len(self._spool)) if n not in self._dead]
        notes = [note for number in sorted(self._notes) for note in self._notes[number]]
        origins, chosen_cut = self._written_by(alive)
        return Prepared(
            pairs=self._spool.store(alive),
            notes=notes,
            seen=self._seen,
            outcomes=self._outcomes,
            scores_disagree=sum(self._against[n] for n in alive),
            origins=origins,
            chosen_cut=chosen_cut,
            source_of=np.array(self._source_of, np.int32)[alive],
            full_lengths=np.array(self._full, np.int32).reshape(-1, 3),
            facts=self._renderer.facts,
            merged=self._encoder.merged,
            ends=self._ends,
        )

    def _encode(
        self, batch: list[Located], first: int, layout: Layout
    ) -> Iterator[tuple[int, Place, Row, "Rejection | _Encoded"]]:
        """Every pair of every row, or the reason why there is none, in order; the batch is tokenised in one call."""
        found: list[tuple[int, Place, Row, Pair | None, Rejection | Rendered]] = []
        for number, (place, row) in enumerate(batch, first):
            if isinstance(row, BadLine):
                found.append((number, place, {}, None, Rejection(number, "unreadable_line", row.detail)))
                continue
            for made in to_pairs(row, number, layout, keep_empty_rejected=self._keep_empty):
                if isinstance(made, Rejection):
                    found.append((number, place, row, None, made))
                else:
                    found.append((number, place, row, made, self._renderer.render(made)))
        encoded = self._encoder.encode([text for *_, text in found if isinstance(text, Rendered)])
        for number, place, row, pair, text in found:
            if isinstance(text, Rejection):
                yield number, place, row, text
                continue
            ids = next(encoded)
            assert pair is not None
            if ids is None:
                spelt = ", ".join(map(repr, text.hidden.values()))
                detail = f"a message contains {spelt}, which this tokenizer cannot read as ordinary text"
                yield number, place, row, Rejection(number, "special_token_in_text", detail)
            else:
                yield number, place, row, _Encoded(pair, text, ids)

    def _take(self, result: "Rejection | _Encoded", row: Row, where: Where, layout: Layout) -> None:
        self._outcomes += 1
        if isinstance(result, Rejection):
            self._drop(self._outcomes, where, result.reason, result.detail)
            return
        if self._limits.long_prompt == "drop_oldest_turns":
            result = self._shortened(result)
        self._full.extend(map(len, result.ids))
        pair, notes = fit(where, result.ids, self._limits)
        if pair is not None:
            notes = [where.note("mended", reason, detail) for reason, detail in result.text.mended] + notes
        if notes:
            self._notes[self._outcomes] = notes
        if pair is None:
            return
        what, other = self._sieve.classify(pair)
        if what == "duplicate":
            self._drop(self._outcomes, where, "duplicate", f"the same pair as {self._name(other, where)}")
        elif what == "contradiction":
            self._contradict(other, where)
        else:
            index = self._spool.add(pair)
            kept = ((result.ids[1], pair.chosen), (result.ids[2], pair.rejected))
            self._ends.update(full[-1] for full, ids in kept if len(full) == len(ids) and full[-1] in self._special)
            self._sieve.kept[digest_of(pair.prompt, pair.chosen, pair.rejected)] = index
            self._places.append((self._outcomes, where.source, where.place))
            self._source_of.append(self._sources - 1)
            self._against.append(scores_disagree(row, layout))
            self._origin_of.append(self._origins.setdefault(origins_of(row), len(self._origins)))

    def _written_by(self, pairs: list[int]) -> tuple[Counter[Origin | None], int]:
        """Answers by origin, and the number of pairs whose chosen answer was cut when it was drawn."""
        known = list(self._origins)
        found = [known[self._origin_of[pair]] for pair in pairs]
        chosen_cut = sum(chosen is not None and chosen.cut for chosen, _rejected in found)
        return Counter(origin for both in found for origin in both), chosen_cut

    def _contradict(self, other: int, where: Where) -> None:
        said = "{} holds the same two answers with the labels swapped"
        if other not in self._dead:
            self._dead.add(other)
            outcome, source, place = self._places[other]
            then = Where(self._spool.rows[other], source, place)
            this = f"row {where.row}" if source == where.source else f"row {where.row} of {where.source}"
            self._drop(outcome, then, "contradiction", said.format(this))
        self._drop(self._outcomes, where, "contradiction", said.format(self._name(other, where)))

    def _drop(self, outcome: int, where: Where, reason: str, detail: str) -> None:
        self._notes[outcome] = [where.note("dropped", reason, detail)]

    def _name(self, index: int, where: Where) -> str:
        source = self._places[index][1]
        return f"row {self._spool.rows[index]}" + ("" if source == where.source else f" of {source}")

    def _shortened(self, found: "_Encoded") -> "_Encoded":
        """The pair without as many of its oldest exchanges as needed for the prompt to fit."""
        allowed = min(self._limits.max_prompt_tokens, self._limits.max_tokens - 1)
        pair, text, ids, dropped = found.pair, found.text, found.ids, 0
        while len(ids[0]) > allowed:
            shorter = without_oldest_turns(pair)
            again = self._renderer.render(shorter) if shorter is not None else None
            encoded = next(self._encoder.encode([again])) if isinstance(again, Rendered) else None
            if shorter is None or encoded is None or not isinstance(again, Rendered):
                return found  # the prompt stays too long, and is reported as such
            dropped += len(pair.prompt) - len(shorter.prompt)
            pair, ids, text = shorter, encoded, again
        if not dropped:
            return found
        detail = f"the {dropped} oldest turns were left out of a prompt of {len(found.ids[0])} tokens"
        note = ("oldest_turns_dropped", detail)
        return _Encoded(pair, replace(text, mended=(*text.mended, note)), ids)


@dataclass(frozen=True)
class _Encoded:
    pair: Pair
    text: Rendered
    ids: IdLists


def _batches(rows: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def nothing_usable(prepared: Prepared) -> DataError:
    """The error for a data set without a usable row."""
    counted = ", ".join(f"{reason} {count}" for reason, count in prepared.dropped.most_common())
    notes = [note for note in prepared.notes if note.action == "dropped"]
    first = f" Row {notes[0].row}: {notes[0].detail}." if notes else ""
    return DataError(
        f"None of the {prepared.seen} rows can be used ({counted or 'there are none'}).{first} Check data.path and "
        "data.columns; if they are too long, also data.max_tokens and data.max_prompt_tokens."
    )
