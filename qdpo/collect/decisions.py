"""Decisions about candidates: an append-only journal, and the file of pairs that follows from it.

The journal PAIRS.decisions.jsonl is next to PAIRS.jsonl, with one decision a line; a decision is on disk before it is
confirmed. The pairs follow from the journal alone: after a crash they are written again.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from qdpo.collect.candidates import Answer, Candidates
from qdpo.data.layouts.origin import COLUMNS
from qdpo.errors import ConfigError, DataError
from qdpo.run import disk, places
from qdpo.run.typed import check_fields

DecisionKind = Literal["pick", "edit", "tie", "skip", "open", "undo"]
"""pick: `best` over `worst` · edit: `text` over `worst` · tie and skip: no pair · open: a judge left the prompt to a
person · undo: reverts the prompt's last decision."""
MAKES_PAIR = ("pick", "edit")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One decision about one prompt; `best` and `worst` are ids of answers."""

    prompt: str
    kind: DecisionKind
    by: str = "person"
    """Who decided: person, or the name of a judge."""
    best: str | None = None
    worst: str | None = None
    text: str | None = None
    """The text that a person wrote to replace the answer `worst`."""
    note: str = ""
    """The person's note, or the judge's reason to leave the prompt open."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """A judge's score of each answer, by id."""
    shown: tuple[str, ...] = ()
    """Ids of the answers in the order shown."""
    seconds: float | None = None
    """Time from showing the prompt to the decision."""
    again: bool = False
    """True if the prompt was asked a second time, to measure self-agreement; such a decision changes no pair."""
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def to_json(self) -> dict[str, Any]:
        """The fields that are set, as plain values."""
        unset: tuple[object, ...] = (None, "", (), {})
        return {name: value for name, value in vars(self).items() if value not in unset and value is not False}


class Decisions:
    """The decisions about some candidates, and the resulting file of pairs; used by one process at a time."""

    def __init__(self, out: Path, items: list[Candidates]):
        """Resume from the existing files. Use `opened`, which also holds the lock.

        Raises: DataError if `out` belongs to other candidates or was not made by qdpo; DiskError if it cannot be
        written.
        """
        self.out, self.journal = out, journal_of(out)
        self.items = {item.id: item for item in items}
        self.history: list[Decision] = []
        """All decisions in the order they were made, including undone ones."""
        self._standing: dict[str, list[Decision]] = {}
        self._entries = Counter[str]()
        self._lags = False
        """True after a failure between writing the two files: the next decision then rewrites all pairs."""
        self._read()
        pairs = "".join(map(_line, self.pairs()))
        if not disk.is_there(out) or disk.read_bytes(out) != pairs.encode():
            disk.write_text(out, pairs)

    def current(self, prompt: str) -> Decision | None:
        """The decision in force for this prompt; None if there is none."""
        taken = self._standing.get(prompt)
        return taken[-1] if taken else None

    def count(self, prompt: str) -> int:
        """Number of journal entries about this prompt: a view is up to date while the number is unchanged."""
        return self._entries[prompt]

    def is_settled(self, prompt: str) -> bool:
        """True if the prompt is decided and not left open by a judge."""
        current = self.current(prompt)
        return current is not None and current.kind != "open"

    def add(self, decision: Decision) -> None:
        """Record a decision; journal and pairs are on disk when this returns.

        Raises: DataError for ids that are not among the candidates; DiskError (what is in the journal stays valid).
        """
        self._check(decision, "this decision")
        before, was_decided = self.current(decision.prompt), self._is_decided(decision.prompt)
        disk.append_text(self.journal, _line(decision.to_json()))
        self._apply(decision)
        after = self.current(decision.prompt)
        lagged, self._lags = self._lags, True
        if after is decision and not was_decided and not lagged:
            if pair := self._pair(decision):
                disk.append_text(self.out, _line(pair))
        elif after is not before or lagged:
            disk.write_text(self.out, "".join(map(_line, self.pairs())))
        self._lags = False

    def pairs(self) -> Iterator[dict[str, Any]]:
        """The pairs of the decisions in force, in the order in which their prompts were first decided.

        An open entry of a judge does not count as a decision. In this order a new pair only appends a line to the file.
        """
        for taken in self._standing.values():
            if taken and (pair := self._pair(taken[-1])):
                yield pair

    def _pair(self, decision: Decision) -> dict[str, Any] | None:
        if decision.kind not in MAKES_PAIR:
            return None
        item = self.items[decision.prompt]
        worst = item.answer(str(decision.worst))
        assert worst is not None  # checked when the decision was read or added
        if decision.kind == "edit":
            rewritten = replace(worst.origin, edited=True) if worst.origin else None
            best: Answer | None = Answer(str(decision.text), rewritten)
        else:
            best = item.answer(str(decision.best))
        assert best is not None
        pair: dict[str, Any] = {"prompt": item.prompt, "chosen": best.text, "rejected": worst.text}
        pair |= {"tools": item.tools} if item.tools else {}
        for column, answer in zip(COLUMNS, (best, worst), strict=True):
            if answer.origin:
                pair[column] = replace(answer.origin, cut=answer.cut).to_json()
        if {best.id, worst.id} <= set(decision.scores):
            pair |= {"score_chosen": decision.scores[best.id], "score_rejected": decision.scores[worst.id]}
        return pair | {"judged_by": decision.by} | ({"note": decision.note} if decision.note else {})

    def _apply(self, decision: Decision) -> None:
        self.history.append(decision)
        self._entries[decision.prompt] += 1
        taken = self._standing.setdefault(decision.prompt, [])
        if decision.kind == "undo":
            if taken:
                taken.pop()
        elif not decision.again:
            if not self._is_decided(decision.prompt):
                self._standing[decision.prompt] = self._standing.pop(decision.prompt)  # move to the end
            taken.append(decision)

    def _is_decided(self, prompt: str) -> bool:
        return any(taken.kind != "open" for taken in self._standing.get(prompt, ()))

    def _read(self) -> None:
        if not disk.is_there(self.journal):
            if disk.is_there(self.out) and disk.read_bytes(self.out):
                raise DataError(
                    f"{self.out} exists without its journal {self.journal.name}, so its pairs are not of `qdpo label` "
                    "or `qdpo judge`. Give another --out."
                )
            return
        disk.cut_torn_line(self.journal)  # it was never confirmed
        for number, line in enumerate(disk.read_bytes(self.journal).split(b"\n")[:-1], 1):
            where = f"{self.journal} line {number}"
            try:
                value = disk.parse(line.decode())
                decision = Decision(**value | {"shown": tuple(value.get("shown", ()))})
                check_fields(Decision, vars(decision))
            except (ValueError, TypeError, AttributeError) as error:
                raise DataError(f"{where} is not a decision ({error}). Fix or remove the line.") from None
            self._check(decision, where)
            self._apply(decision)

    def _check(self, decision: Decision, where: str) -> None:
        item = self.items.get(decision.prompt)
        if decision.kind not in get_args(DecisionKind):
            raise DataError(f"{where} has the unknown kind {decision.kind!r}.")
        if item is None:
            raise DataError(
                f"{where} is about a prompt that is not among the candidates: {self.out} belongs to another "
                "candidates file. Give that file too, or another --out."
            )
        needed = {"pick": (decision.best, decision.worst), "edit": (decision.worst,)}.get(decision.kind, ())
        for answer in needed:
            if answer is None or item.answer(answer) is None:
                raise DataError(
                    f"{where} names an answer that is not among those of {item.place}. If answers were drawn again, "
                    "give another --out."
                )
        if decision.kind == "pick" and decision.best == decision.worst:
            raise DataError(f"{where} names the same answer as best and as worst.")
        if decision.kind == "edit" and not (decision.text or "").strip():
            raise DataError(f"{where} replaces an answer with an empty text. Write an answer, or skip the prompt.")
        if (
            decision.kind == "edit"
            and (replaced := item.answer(str(decision.worst)))
            and decision.text == replaced.text
        ):
            raise DataError(f"{where} replaces an answer with the same text. Change the text, or skip the prompt.")


@contextmanager
def opened(out: Path, items: list[Candidates]) -> Iterator[Decisions]:
    """The decisions behind `out`, locked by this process. Raises: ConfigError if another process holds the lock."""
    with held(out):
        yield Decisions(out, items)


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Lock the file against other qdpo processes. Raises: ConfigError if another process holds the lock; DiskError."""
    if not out.name:
        raise ConfigError(f"--out={out} names no file. Give one, as in `--out pairs.jsonl`.")
    place = out.with_name(f".{out.name}.lock")
    for path in (place, out, journal_of(out)):
        places.check_file(path)
    lock = FileLock(place)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(f"Another qdpo process works on {out}. Wait for it, or give another --out.") from None
    except OSError as error:
        raise disk.disk_error(error, out) from error
    try:
        yield
    finally:
        lock.release()


def journal_of(out: Path) -> Path:
    """Path of the journal of decisions behind these pairs."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.decisions.jsonl")


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
