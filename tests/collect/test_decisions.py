"""The candidates file, the journal of decisions, and the pairs that follow from it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from qdpo.collect.candidates import read_candidates
from qdpo.collect.decisions import Decision, Decisions, journal_of, opened
from qdpo.errors import ConfigError, DataError, DiskError
from tests.conftest import write_jsonl

BASE = {"model": "tiny", "weights": "w1"}


def rows(count: int = 3) -> list[dict[str, Any]]:
    return [
        {"prompt": f"question {n}", "answers": [{"text": f"{word} {n}", "tokens": 2, "seed": n, "from": BASE}
                                                 for word in ("good", "fair", "bad")]}
        for n in range(count)
    ]  # fmt: skip


@pytest.fixture
def items(tmp_path: Path) -> list[Any]:
    return read_candidates([write_jsonl(tmp_path / "candidates.jsonl", rows())]).items


def pick(item: Any, best: int = 0, worst: int = 2, **others: Any) -> Decision:
    return Decision(prompt=item.id, kind="pick", best=item.answers[best].id, worst=item.answers[worst].id, **others)


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_lines_of_one_prompt_become_one_and_answers_are_distinct(tmp_path: Path) -> None:
    base = write_jsonl(tmp_path / "base.jsonl", rows(1))
    tuned = {"prompt": [{"role": "user", "content": "question 0"}], "answers": ["good 0", "new", "  "]}
    found = read_candidates([base, write_jsonl(tmp_path / "tuned.jsonl", [tuned])])
    assert [answer.text for answer in found.items[0].answers] == ["good 0", "fair 0", "bad 0", "new"]
    assert found.items[0].answers[0].origin is not None and "1 empty answers" in found.notes[0]


def test_a_prompt_without_a_choice_is_left_aside_and_said(tmp_path: Path) -> None:
    lines = [*rows(1), {"prompt": "p", "answers": ["same", "same"]}]
    found = read_candidates([write_jsonl(tmp_path / "c.jsonl", lines)])
    assert len(found.items) == 1 and "1 prompts are left out (fewer than two different answers)" in found.notes[0]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "p", "answers": ["a"', "line 2 is not JSON"),
        ('{"prompt": "p", "chosen": "a", "rejected": "b"}', "These are pairs already"),
        ('{"prompt": "p", "answers": "ab"}', "instead of a `prompt` and a list of `answers`"),
        ('{"prompt": "  ", "answers": ["a"]}', "prompt is empty"),
        ('{"prompt": "p", "answers": [1, 2]}', r"answers\[0\] is neither a text nor an object"),
        ('{"prompt": "p", "answers": [{"text": "a", "seed": "x"}]}', "seed is 'x', not a whole number"),
        ('{"prompt": [{"role": "robot", "content": "p"}], "answers": ["a"]}', "role 'robot'"),
        (r'{"prompt": "\ud83d", "answers": ["a", "b"]}', "half a character"),
    ],
)  # fmt: skip
def test_a_broken_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(rows(1)[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=said) as error:
        read_candidates([path])
    assert "line 2" in str(error.value)


def test_decisions_make_pairs_that_carry_where_they_came_from(tmp_path: Path, items: list[Any]) -> None:
    out = tmp_path / "pairs.jsonl"
    with opened(out, items) as decisions:
        decisions.add(pick(items[0], seconds=1.5, note="clear"))
        decisions.add(Decision(prompt=items[1].id, kind="tie"))
        decisions.add(Decision(prompt=items[2].id, kind="edit", worst=items[2].answers[0].id, text="better"))
    assert written(out) == [
        {"prompt": "question 0", "chosen": "good 0", "rejected": "bad 0", "chosen_from": BASE, "rejected_from": BASE,
         "judged_by": "person", "note": "clear"},
        {"prompt": "question 2", "chosen": "better", "rejected": "good 2", "chosen_from": {**BASE, "edited": True},
         "rejected_from": BASE, "judged_by": "person"},
    ]  # fmt: skip


def test_a_pair_says_which_answer_was_cut(tmp_path: Path) -> None:
    answers = [{"text": "a", "cut": True, "from": BASE}, {"text": "b", "from": BASE}]
    items = read_candidates([write_jsonl(tmp_path / "c.jsonl", [{"prompt": "p", "answers": answers}])]).items
    with opened(tmp_path / "pairs.jsonl", items) as decisions:
        decisions.add(pick(items[0], 0, 1))
        assert next(decisions.pairs())["chosen_from"] == {**BASE, "cut": True}
        decisions.add(Decision(prompt=items[0].id, kind="edit", worst=items[0].answers[0].id, text="whole"))
        pair = next(decisions.pairs())
    assert pair["chosen_from"] == {**BASE, "edited": True} and pair["rejected_from"] == {**BASE, "cut": True}


def test_undo_brings_back_what_stood_before(tmp_path: Path, items: list[Any]) -> None:
    out = tmp_path / "pairs.jsonl"
    with opened(out, items) as decisions:
        decisions.add(pick(items[0]))
        decisions.add(pick(items[0], best=1))
        assert written(out)[0]["chosen"] == "fair 0"
        decisions.add(Decision(prompt=items[0].id, kind="undo"))
        assert written(out)[0]["chosen"] == "good 0"
        decisions.add(Decision(prompt=items[0].id, kind="undo"))
        assert written(out) == [] and not decisions.is_settled(items[0].id) and len(decisions.history) == 4


def test_what_was_open_or_undone_is_a_line_more_when_it_is_decided(
    tmp_path: Path, items: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of prompts that one judge left open would else write the whole file for each that the next decides."""
    out = tmp_path / "pairs.jsonl"
    with opened(out, items) as decisions:
        decisions.add(Decision(prompt=items[0].id, kind="open", by="judge", note="tie"))
        decisions.add(pick(items[1]))
        decisions.add(pick(items[2]))
        decisions.add(Decision(prompt=items[1].id, kind="undo"))
        with monkeypatch.context() as changed:
            changed.setattr("qdpo.run.disk.write_text", None)
            decisions.add(Decision(prompt=items[0].id, kind="open", by="another", note="tie"))
            decisions.add(pick(items[0]))
            decisions.add(pick(items[1]))
    whole = out.read_bytes()
    assert [pair["prompt"] for pair in written(out)] == ["question 2", "question 0", "question 1"]
    monkeypatch.setattr("qdpo.run.disk.write_text", None)  # the journal makes the very same file
    with opened(out, items):
        assert out.read_bytes() == whole


def test_asking_again_changes_no_pair(tmp_path: Path, items: list[Any]) -> None:
    out = tmp_path / "pairs.jsonl"
    with opened(out, items) as decisions:
        decisions.add(pick(items[0]))
        decisions.add(pick(items[0], best=2, worst=0, again=True))
    assert written(out)[0]["chosen"] == "good 0"


def test_the_journal_alone_makes_the_pairs_again(tmp_path: Path, items: list[Any]) -> None:
    """Killed between the two files, or in the middle of a line: what was said to be taken is there."""
    out = tmp_path / "pairs.jsonl"
    with opened(out, items) as decisions:
        for item in items:
            decisions.add(pick(item))
    whole = out.read_bytes()
    out.write_bytes(whole[:-30])
    with journal_of(out).open("a") as file:
        file.write('{"prompt": "abc", "ki')
    with opened(out, items) as decisions:
        assert out.read_bytes() == whole and len(decisions.history) == 3
        decisions.add(Decision(prompt=items[0].id, kind="undo"))
    assert len(written(out)) == 2


def test_no_time_is_a_time_too(items: list[Any]) -> None:
    assert pick(items[0], seconds=0.0).to_json()["seconds"] == 0.0 and "again" not in pick(items[0]).to_json()


def test_a_line_ends_at_a_line_feed_alone(tmp_path: Path) -> None:
    r"""A text may hold what Python calls line ends: U+2028, a form feed, U+0085."""
    odd = "one\u2028two\x0cthree\x85four"
    items = read_candidates([write_jsonl(tmp_path / "c.jsonl", [{"prompt": odd, "answers": [odd, "b"]}])]).items
    out = tmp_path / "pairs.jsonl"
    for _start in range(2):
        with opened(out, items) as decisions:
            decisions.add(pick(items[0], 0, 1, note=odd))
    with opened(out, items) as decisions:
        assert len(decisions.history) == 2 and written(out)[0]["note"] == odd == written(out)[0]["chosen"]


def test_the_pairs_of_other_candidates_are_refused(tmp_path: Path, items: list[Any]) -> None:
    out = tmp_path / "pairs.jsonl"
    with opened(out, items) as decisions:
        decisions.add(pick(items[0]))
    with pytest.raises(DataError, match="belongs to another candidates file"), opened(out, items[1:]):
        pass
    foreign = write_jsonl(tmp_path / "mine.jsonl", [{"prompt": "p", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match="Give another --out"), opened(foreign, items):
        pass
    assert written(foreign) == [{"prompt": "p", "chosen": "a", "rejected": "b"}]


def test_one_process_at_a_time(tmp_path: Path, items: list[Any]) -> None:
    out = tmp_path / "pairs.jsonl"
    with opened(out, items), pytest.raises(ConfigError, match="Another qdpo process works on"), opened(out, items):
        pass


def test_a_decision_that_cannot_be_written_is_not_taken(
    tmp_path: Path, items: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "pairs.jsonl"
    decisions = Decisions(out, items)
    decisions.add(pick(items[0]))
    before = journal_of(out).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        decisions.add(pick(items[1]))
    assert journal_of(out).read_bytes() == before and decisions.current(items[1].id) is None


def test_a_pair_that_could_not_be_written_comes_with_the_next(tmp_path: Path, items: list[Any]) -> None:
    """The disk was full between journal and pairs, and has room again."""
    out = tmp_path / "pairs.jsonl"
    decisions = Decisions(out, items)
    out.unlink()
    out.mkdir()
    with pytest.raises(DiskError):
        decisions.add(pick(items[0]))
    out.rmdir()
    decisions.add(pick(items[1]))
    assert [pair["prompt"] for pair in written(out)] == ["question 0", "question 1"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "love"}, "unknown kind"),
        ({"prompt": "0" * 16}, "belongs to another candidates file"),
        ({"worst": "0" * 16}, "names an answer that is not among"),
        ({"kind": "edit", "text": " "}, "replaces an answer with an empty text"),
        ({"kind": "edit", "text": "bad 0"}, "replaces an answer with the same text"),
    ],
)
def test_a_decision_that_means_nothing_is_refused(
    tmp_path: Path, items: list[Any], change: dict[str, Any], said: str
) -> None:
    decision = vars(pick(items[0])) | change
    with opened(tmp_path / "p.jsonl", items) as decisions, pytest.raises(DataError, match=said):
        decisions.add(Decision(**decision))
