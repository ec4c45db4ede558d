"""Preferences in other forms than a better and a worse text: contests, rankings, several rejected answers, tools."""

import json
import math

import pytest

from qdpo.data.layouts.layout import sample_of
from qdpo.data.layouts.pair import Pair, Rejection, check_sample, detect_layout, to_pair, to_pairs
from qdpo.data.tokens.render import Rendered, Renderer
from qdpo.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def answers(row, layout):
    return [(pair.chosen, pair.rejected) for pair in to_pairs(row, 1, layout)]


CONTESTS = {  # rows in which the first, the second, no answer won
    "arena": (
        {"conversation_a": [user("q"), assistant("one")], "conversation_b": [user("q"), assistant("two")]},
        [{"winner": "model_a"}, {"winner": "model_b"}, {"winner": "tie (bothbad)"}],
    ),
    "letters": ({"prompt": "q", "response_a": "one", "response_b": "two"}, [{"winner": w} for w in ("A", "b", "tie")]),
    "names": (
        {"prompt": "q", "answer_a": "one", "answer_b": "two"},
        [{"preferred": "answer_a"}, {"preferred": "answer_b"}, {"preferred": None}],
    ),
    "ids": (
        {"prompt": "q", "response_0": "one", "response_1": "two"},
        [{"better_response_id": 0}, {"better_response_id": 1}, {"better_response_id": None}],
    ),
    "numbers": (
        {"question": "q", "output_1": "one", "output_2": "two"},
        [{"preference": 1}, {"preference": 2}, {"preference": None}],
    ),
    "csv": (
        {"prompt": "q", "response_1": "one", "response_2": "two"},
        [{"choice": "1"}, {"choice": "2"}, {"choice": ""}],
    ),
    "signed": (
        {"context": [user("q")], "response1": "one", "response2": "two"},
        [{"overall_preference": -3}, {"overall_preference": 1}, {"overall_preference": 0}],
    ),
    "human preferences": (
        {"history": "q", "human_ref_A": "one", "human_ref_B": "two"},
        [{"labels": 1}, {"labels": 0}, {"labels": None}],
    ),
    "scores alone": (
        {"prompt": "q", "response_a": "one", "response_b": "two"},
        [{"score_a": 2, "score_b": 1}, {"score_a": "1.5", "score_b": "2"}, {"score_a": 2, "score_b": 2.0}],
    ),
}


@pytest.mark.parametrize("case", CONTESTS)
def test_the_winner_of_two_answers_is_chosen(case):
    both, ends = CONTESTS[case]
    rows = [{**both, **end} for end in ends]
    layout = detect_layout(rows, {}, "test data")
    assert (layout.name, layout.form) == ("winner", "winner")
    assert [answers(row, layout) for row in rows[:2]] == [[("one", "two")], [("two", "one")]]
    tie = to_pair(rows[2], 3, layout)
    assert isinstance(tie, Rejection) and tie.reason == "tie"
    assert to_pair(rows[0], 1, layout).prompt == [user("q")]


def test_a_winner_that_cannot_be_read_is_refused():
    rows = [{"prompt": "q", "response_a": "x", "response_b": "y", "winner": word} for word in ("left", "right")]
    with pytest.raises(DataError, match=r"'winner' should say which of response_a and response_b.*left, right"):
        detect_layout(rows, {}, "test data")


def test_a_verdict_that_is_always_1_is_read_by_the_columns_names_or_refused():
    both = {"prompt": "q", "response_1": "one", "response_2": "two", "label": 1}
    assert answers(both, detect_layout([both], {}, "test data")) == [("one", "two")]
    both = {"prompt": "q", "response_a": "one", "response_b": "two", "label": 1}
    with pytest.raises(DataError, match="'label' should say .* but holds 1 only, which may mean 0/1 or"):
        detect_layout([both], {}, "test data")


def test_a_contest_can_be_named_by_its_columns():
    rows = [{"q": "?", "x": "one", "y": "two", "best": 1}, {"q": "?", "x": "one", "y": "two", "best": 0}]
    columns = {"prompt": "q", "chosen": "x", "rejected": "y", "winner": "best"}
    layout = detect_layout(rows, columns, "test data")
    assert [answers(row, layout) for row in rows] == [[("two", "one")], [("one", "two")]]


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        ({"instruction": "q", "input": "", "output": ["good", "bad"]}, [("good", "bad")]),
        ({"prompt": "q", "responses": ["a", "b", "c"]}, [("a", "b"), ("a", "c")]),
        ({"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 3, 3]}, [("b", "a")]),
        (
            {"instruction": "q", "completions": [{"response": x, "overall_score": s} for x, s in (("a", 4), ("b", 7))]},
            [("b", "a")],
        ),
        ({"prompt": "q", "answers": [{"answer": x, "rank": r} for x, r in (("a", 2), ("b", 1))]}, [("b", "a")]),
    ],
)
def test_the_best_of_a_list_is_paired_with_each_worse_answer(row, pairs):
    layout = detect_layout([row] * 3, {}, "test data")
    assert layout.name == "ranked" and "each worse answer makes a pair" in layout.why
    assert answers(row, layout) == pairs


def test_ranked_rows_that_cannot_be_used_have_a_reason():
    row = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 2]}
    layout = detect_layout([row], {}, "test data")
    cases = [
        ({"scores": [2, 2]}, "tie"),
        ({"scores": None}, "null_field"),
        ({"scores": [1]}, "null_field"),
        ({"scores": [1, "n/a"]}, "null_field"),
        ({"scores": [1, math.nan]}, "null_field"),
        ({"responses": ["a"]}, "one_answer"),
        ({"responses": None}, "null_field"),
        ({"responses": 17}, "not_text"),
        ({"responses": ["a", None]}, "null_field"),
    ]
    for change, reason in cases:
        found = to_pair({**row, **change}, 1, layout)
        assert isinstance(found, Rejection) and found.reason == reason, (change, found)


def test_a_ranking_whose_answers_bear_scores_is_said_to_go_by_them():
    row = {"prompt": "q", "completions": [{"response": "a", "rating": 4}, {"response": "b", "rating": "7"}]}
    layout = detect_layout([row], {}, "test data")
    assert "the highest score" in layout.why and answers(row, layout) == [("b", "a")]
    for rating in (None, "N/A", math.nan):
        torn = {**row, "completions": [{"response": "a", "rating": rating}, {"response": "b", "rating": 7}]}
        found = to_pair(torn, 1, layout)
        assert isinstance(found, Rejection) and found.reason == "null_field", rating


@pytest.mark.parametrize("case", ["ids", "numbers", "csv", "human preferences", "signed"])
def test_a_verdict_that_names_neither_answer_makes_no_pair(case):
    both, ends = CONTESTS[case]
    layout = detect_layout([{**both, **end} for end in ends], {}, "test data")
    (column,) = ends[0]
    for verdict in (math.nan, "nan", math.inf) if case == "signed" else (-1, 3, 0.5, math.nan, "nan"):
        found = to_pair({**both, column: verdict}, 1, layout)
        assert isinstance(found, Rejection) and found.reason == "tie", verdict


def test_a_score_that_is_no_number_decides_no_contest():
    rows = [{"prompt": "q", "response_a": "x", "response_b": "y", "score_a": 2, "score_b": b} for b in (1, math.nan)]
    found = to_pair(rows[1], 2, detect_layout(rows, {}, "test data"))
    assert isinstance(found, Rejection) and found.reason == "null_field"


def test_several_rejected_answers_make_a_pair_each():
    row = {"prompt": "q", "chosen": "yes", "rejected": ["no", "never", "yes", ""]}
    layout = detect_layout([row] * 2, {}, "test data")
    assert "several rejected answers" in layout.why
    found = to_pairs(row, 5, layout)
    assert [(p.chosen, p.rejected) for p in found[:2]] == [("yes", "no"), ("yes", "never")]
    assert [p.reason for p in found[2:]] == ["identical_responses", "empty_response"]
    kept = to_pairs(row, 5, layout, keep_empty_rejected=True)[3]
    assert isinstance(kept, Pair) and kept.rejected == ""


def test_openai_preference_files_are_read():
    row = {
        "input": {"messages": [user("q")], "tools": []},
        "preferred_output": [assistant("yes")],
        "non_preferred_output": [assistant("no")],
    }
    layout = detect_layout([row], {}, "test data")
    pair = to_pair(row, 1, layout)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([user("q")], "yes", "no")


def test_data_that_fit_several_forms_are_asked_about():
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "response_a": "c", "response_b": "d", "winner": "a"}
    with pytest.raises(DataError, match=r"several ways: winner .*; pairs .*data\.format="):
        detect_layout([row], {}, "test data")
    assert answers(row, detect_layout([row], {}, "test data", form="pairs")) == [("a", "b")]
    assert answers(row, detect_layout([row], {}, "test data", form="winner")) == [("c", "d")]
    with pytest.raises(DataError, match=r"data\.format=ranked does not fit the columns"):
        detect_layout([row], {}, "test data", form="ranked")
    two = {"prompt": "q", "chosen": "a", "rejected": "b", "response_j": "c", "response_k": "d"}
    with pytest.raises(DataError, match=r"data\.columns\.chosen="):
        detect_layout([two], {}, "test data")
    picked = detect_layout([two], {"chosen": "response_j", "rejected": "response_k"}, "test data")
    assert answers(two, picked) == [("c", "d")]


def test_a_fault_of_most_rows_stops_with_the_way_out():
    several = {
        "chosen": [user("q"), assistant("a"), user("more"), assistant("yes")],
        "rejected": [user("q"), assistant("b"), user("more"), assistant("no")],
    }
    layout = detect_layout([several] * 4, {}, "test data")
    with pytest.raises(DataError, match=r"4 of 4 sampled rows .*several_response_turns.*data\.last_answer_only=true"):
        check_sample(sample_of([several] * 4), layout, "test data")
    last = detect_layout([several] * 4, {}, "test data", last_answer_only=True)
    check_sample(sample_of([several] * 4), last, "test data")
    pair = to_pair(several, 1, last)
    assert (pair.prompt, pair.chosen, pair.rejected) == ([user("q")], "yes", "no")
    assert [reason for reason, _ in pair.mended] == ["last_answer_only"]


TOOLED = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<|end|><call>{{ c.function.name }}({{ c.function.arguments | tojson }})</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tool_calls_stay_as_the_template_writes_them(chat_tokenizer):
    import copy

    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = TOOLED
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "rain", "arguments": {"at": "x"}}}],
    }
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {}}}]
    row = {
        "prompt": [user("Will it rain?")],
        "chosen": [call],
        "rejected": [assistant("No idea.")],
        "tools": json.dumps(tools),
    }
    layout = detect_layout([row] * 2, {}, "test data")
    pair = to_pair(row, 1, layout)
    found = Renderer(tokenizer=tokenizer).render(pair)
    assert isinstance(found, Rendered)
    assert '"name": "rain"' in found.prompt and found.prompt.endswith("<|im_start|>assistant\n")
    assert found.chosen == '<|end|><call>rain({"at": "x"})</call><|im_end|>' and found.rejected == "No idea.<|im_end|>"
    result = [user("Will it rain?"), call, {"role": "tool", "content": "yes", "name": "rain"}]
    later = {"prompt": result, "chosen": "It will.", "rejected": "It will not."}
    text = Renderer(tokenizer=tokenizer).render(to_pair(later, 1, detect_layout([later], {}, "test data"))).prompt
    assert "<call>rain" in text and "<|im_start|>tool\nyes<|im_end|>" in text
    broken = to_pair({**row, "tools": "[not json"}, 1, layout)
    assert isinstance(broken, Rejection) and broken.reason == "bad_tools"
