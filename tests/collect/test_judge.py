"""`qdpo judge`: its loop over what nobody has decided, and the judges that are rules."""

import json
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from qdpo.collect.candidates import Candidates, read_candidates
from qdpo.collect.decisions import Decision, Decisions, opened
from qdpo.collect.judge.choose import JudgeOptions, make_judge
from qdpo.collect.judge.ranking import Ranking, comparisons
from qdpo.collect.judge.rules import LengthJudge, RegexJudge
from qdpo.collect.judge.run import Judge, Judgement, Unanswered, judge_candidates, summary_lines
from qdpo.errors import ConfigError, ServerError
from tests.conftest import Quiet, qdpo, write_jsonl

BASE, OTHER = {"model": "tiny"}, {"model": "small"}


def read(tmp_path: Path, *rows: list[Any]) -> list[Candidates]:
    lines = [{"prompt": f"question {n}", "answers": answers} for n, answers in enumerate(rows)]
    return read_candidates([write_jsonl(tmp_path / "candidates.jsonl", lines)]).items


def answer(text: str, tokens: int, **others: Any) -> dict[str, Any]:
    return {"text": text, "tokens": tokens, "from": BASE, **others}


def decided(judge: Judge, items: Sequence[Candidates]) -> list[str]:
    """Each decision in words: `best > worst`, or why there is none."""
    return [in_words(outcome, item) for outcome, item in zip(judge.decide(items), items, strict=True)]


def in_words(outcome: Judgement, item: Candidates) -> str:
    if isinstance(outcome, Unanswered):
        return outcome.reason
    texts = {each.id: each.text for each in item.answers}
    return outcome.note or f"{texts[str(outcome.best)]} > {texts[str(outcome.worst)]}"


def test_the_shorter_answer_is_better_and_a_cut_one_loses(tmp_path: Path) -> None:
    items = read(
        tmp_path,
        [answer("mid", 20), answer("the short one", 10), answer("long", 30)],
        [answer("whole", 30), answer("cut", 8, cut=True)],
        [answer("a", 10), answer("b", 10)],
        [answer("nine", 91), answer("ten", 100)],
        [answer("x", 64, cut=True), answer("y", 60, cut=True)],
    )
    first = ["the short one > long", "whole > cut"]
    rest = ["lengths differ by less than 10%"] * 2 + ["all answers are cut at the length limit"]
    assert decided(LengthJudge(items, "shorter"), items) == first + rest
    assert decided(LengthJudge(items, "longer"), items) == ["long > the short one", "whole > cut", *rest]
    assert decided(LengthJudge(items, "shorter", 0.09), items)[3] == "nine > ten"
    assert decided(LengthJudge(items, "shorter", 0.0), items)[2].startswith("lengths differ")


@pytest.mark.parametrize("second", [{"text": "bb"}, {"text": "bb", "tokens": 2, "from": OTHER}])
def test_tokens_of_different_models_are_not_compared(tmp_path: Path, second: dict[str, Any]) -> None:
    items = read(tmp_path, [answer("a" * 50, 1), second])
    judge = LengthJudge(items, "shorter")
    assert decided(judge, items) == [f"bb > {'a' * 50}"] and "characters (some answers lack" in judge.opening(items)[0]


def test_an_answer_that_matches_is_better_and_the_pair_is_alike_in_length(tmp_path: Path) -> None:
    rows = [["yes, of course", "no", "no, I am afraid"], ["no", "never"], ["yes", "oh yes"]]
    items = read(tmp_path, *rows)
    assert decided(RegexJudge("(?i)YES"), items) == [
        "yes, of course > no, I am afraid", "no answer matches", "every answer matches"]  # fmt: skip
    assert decided(RegexJudge("!yes"), items)[0] == "no, I am afraid > yes, of course"
    assert decided(RegexJudge("!yes"), items)[1:] == ["no answer matches", "every answer matches"]


def test_a_pattern_that_never_ends_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdpo.collect.judge.rules.MATCH_TIMEOUT_S", 0.2)
    items = read(tmp_path, ["x" * 60 + "!", "short"], ["xy", "a"])
    assert decided(RegexJudge("(?:x|xx)+[yz]"), items) == ["the pattern takes more than 0.2 s in an answer", "xy > a"]


class Scripted(Judge):
    """A judge that gives the outcomes it was made with."""

    def __init__(self, outcomes: list[Judgement], name: str = "scripted"):
        self.name, self.outcomes, self.asked = name, {each.prompt: each for each in outcomes}, []  # type: ignore[var-annotated]

    def opening(self, items: Sequence[Candidates]) -> list[str]:
        return []

    def decide(self, items: Sequence[Candidates]) -> Iterator[Judgement]:
        for item in items:
            self.asked.append(item.prompt)
            yield self.outcomes[item.id]


def decision(item: Candidates, kind: Any = "pick", by: str = "scripted", **others: Any) -> Decision:
    ends = {"best": item.answers[0].id, "worst": item.answers[1].id} if kind == "pick" else {}
    return Decision(prompt=item.id, kind=kind, by=by, shown=tuple(each.id for each in item.answers), **ends, **others)


def test_what_is_decided_is_neither_asked_about_nor_changed(tmp_path: Path) -> None:
    items = read(tmp_path, *([f"a{n}", f"b{n}"] for n in range(6)))
    decisions = Decisions(tmp_path / "pairs.jsonl", items)
    decisions.add(decision(items[0], by="person"))
    decisions.add(decision(items[1], "skip", by="person"))
    decisions.add(decision(items[2], "open", note="tie: so it said"))
    decisions.add(decision(items[3], "open", by="another", note="tie"))
    judge = Scripted([decision(items[3]), decision(items[4], "open", note="too close: 1")])
    found = judge_candidates(judge, decisions, items, Quiet(), limit=2)
    assert judge.asked == ["question 3", "question 4"]
    assert (found.pairs, found.open, found.decided_before, found.open_before) == (1, {"too close": 1}, 2, 1)
    assert (found.not_reached, found.pairs_in_file, found.open_in_file) == (1, 2, 3)
    lines = "\n".join(summary_lines(found, judge, "c.jsonl"))
    assert "qdpo label c.jsonl --out" in lines and "the same command" in lines


def test_a_prompt_with_a_new_answer_is_asked_about_again(tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    with opened(out, items := read(tmp_path, ["a", "b"])) as decisions:
        decisions.add(decision(items[0], "open", note="tie"))
    with opened(out, items := read(tmp_path, ["a", "b", "c"])) as decisions:
        assert judge_candidates(Scripted([decision(items[0])]), decisions, items, Quiet()).pairs == 1


def test_failures_in_a_row_stop_the_judge_and_scattered_ones_do_not(tmp_path: Path) -> None:
    items = read(tmp_path, *([f"a{n}", f"b{n}"] for n in range(12)))
    failed = [Unanswered(item.id, f"it says 400: too long by {n}") for n, item in enumerate(items)]
    scattered = [decision(item) if n in (4, 9) else failed[n] for n, item in enumerate(items)]
    decisions = Decisions(tmp_path / "pairs.jsonl", items)
    found = judge_candidates(Scripted(scattered), decisions, items, watcher := Quiet())
    assert found.pairs == 2 and found.unanswered == {"it says 400": 10}
    assert watcher.text == f"no answer about {items[0].place}: it says 400: too long by 0"
    judge = Scripted(failed)
    with pytest.raises(ServerError, match=r"5 prompts in a row.*it says 400: too long by \d+"):
        judge_candidates(judge, decisions, items, Quiet())
    assert len(judge.asked) == 5 and sum(1 for _pair in decisions.pairs()) == 2


@pytest.mark.parametrize("answers", range(2, 7))
def test_a_judge_that_is_sure_finds_both_ends_in_the_fewest_comparisons(answers: int) -> None:
    most = 0
    for order in permutations(range(answers)):  # order[place] is how good that answer is
        ranking, asked = Ranking(answers), 0
        while (pair := ranking.next_pair()) is not None:
            ranking.record(*pair, max(pair, key=lambda place: order[place]))
            asked += 1
        assert ranking.outcome() == (order.index(answers - 1), order.index(0))
        most = max(most, asked)
    assert most == comparisons(answers)[0]


def test_where_comparisons_say_nothing_more_is_asked_and_only_what_was_said_counts() -> None:
    def rank(answers: int, says: dict[tuple[int, int], int]) -> tuple[int, Any]:
        ranking, asked = Ranking(answers), 0
        while (pair := ranking.next_pair()) is not None:
            ranking.record(*pair, says.get(pair))
            asked += 1
        return asked, ranking.outcome()

    assert rank(4, {}) == (comparisons(4)[1], None)
    assert rank(2, {(0, 1): 1}) == (1, (1, 0))
    # 2 beats 1; nothing is known of 0, so it is neither.
    assert rank(3, {(1, 2): 2}) == (3, (2, 1))
    # 0 and 2 both beat 1, and are not told apart; the first of them is taken.
    assert rank(3, {(0, 1): 0, (1, 2): 2})[1] == (0, 1)


@pytest.mark.parametrize(
    ("by", "options", "said"),
    [
        ("taste", {}, "is not a judge. Choose from: length"),
        ("length:wider", {}, "neither length:shorter nor"),
        ("length", {"margin": 1.5}, "not a share of a length"),
        ("length", {"parallel": 2}, "--parallel has no effect with --by length"),
        ("regex", {}, "lacks the part after the colon"),
        ("regex:(", {}, "not a regular expression: missing"),
        ("regex:!", {}, "needs a pattern"),
        ("regex:a", {"margin": 0.5}, "--margin has no effect with --by regex"),
        ("reward-model:a.gguf", {}, "GGUF files have no reward head"),
        ("reward-model:a", {"quantization": "int8"}, "--quantization int8 is not one of"),
        ("openai:http://localhost/v1", {}, "needs --judge-model"),
        ("openai:localhost:8000", {"judge_model": "m"}, "is not an http address"),
        ("openai:http://localhost/v1", {"judge_model": "m", "rubric": Path("absent")}, "--rubric absent cannot be"),
    ],
)  # fmt: skip
def test_a_judge_that_cannot_be_is_refused(by: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_judge(by, JudgeOptions(**options), [], lambda line: None)


def test_the_verb_judges_and_a_second_time_finds_nothing_to_do(tmp_path: Path) -> None:
    lines = [{"prompt": "p", "answers": ["short", "a longer one"]}, {"prompt": "q", "answers": ["same", "size"]}]
    write_jsonl(tmp_path / "c.jsonl", lines)
    words = ["judge", "c.jsonl", "--by", "length", "--out", "pairs.jsonl"]
    first = qdpo(*words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert "1 pairs of 2 prompts" in first.stdout and "qdpo label c.jsonl --out pairs.jsonl" in first.stdout
    before = {path: path.read_bytes() for path in tmp_path.glob("pairs*")}
    assert json.loads(before[tmp_path / "pairs.jsonl"]) == {
        "prompt": "p", "chosen": "short", "rejected": "a longer one", "judged_by": "length:shorter margin=0.1"
    }  # fmt: skip
    again = qdpo(*words, "--json", cwd=tmp_path)
    found = json.loads(again.stdout)
    assert (found["pairs"], found["decided_before"], found["open_before"], found["pairs_in_file"]) == (0, 1, 1, 1)
    assert {path: path.read_bytes() for path in tmp_path.glob("pairs*")} == before
    assert "--by taste is not a judge" in qdpo("judge", "c.jsonl", "--by", "taste", "--out", "x", cwd=tmp_path).stderr
