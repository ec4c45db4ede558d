import random

import pytest

from qdpo.data.layouts.pair import Pair, Rejection, detect_layout, to_pair
from qdpo.data.layouts.winner import scores_disagree
from qdpo.errors import ConfigError, DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def hh(*turns):
    return "".join(f"\n\n{'Assistant' if n % 2 else 'Human'}: {text}" for n, text in enumerate(turns))


TALK = [user("q"), assistant("a"), user("q2")]
LAYOUTS = {  # row, name, expected prompt, is_chat; the answers are always "yes" and "no"
    "text": ({"prompt": "2+2=", "chosen": "yes", "rejected": "no"}, "text", [user("2+2=")], False),
    "question": ({"question": "q", "response_j": "yes", "response_k": "no"}, "text", [user("q")], False),
    "alpaca": (
        {"instruction": "Sum up.", "input": "A text.", "chosen": "yes", "rejected": "no"},
        "alpaca",
        [user("Sum up.\n\nA text.")],
        False,
    ),
    "repeated text": ({"prompt": "q ", "chosen": "q yes", "rejected": "q no"}, "text_with_prompt", [user("q ")], False),
    "orca": (
        {"system": "Be kind.", "question": "q", "chosen": "yes", "rejected": "no"},
        "orca",
        [{"role": "system", "content": "Be kind."}, user("q")],
        True,
    ),
    "orca without a system text": (
        {"system": "", "question": "q", "chatgpt": "yes", "llama2-13b-chat": "no"},
        "orca",
        [user("q")],
        True,
    ),
    "messages": ({"prompt": TALK, "chosen": [assistant("yes")], "rejected": [assistant("no")]}, "messages", TALK, True),
    "messages and text": ({"prompt": TALK, "chosen": "yes", "rejected": "no"}, "messages", TALK, True),
    "text and messages": (
        {"prompt": "q", "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        "messages",
        [user("q")],
        True,
    ),
    "messages that go on": (
        {
            "prompt": [user("q")],
            "chosen": [assistant("a"), user("q2"), assistant("yes")],
            "rejected": [assistant("a"), user("q2"), assistant("no")],
        },
        "messages",
        TALK,
        True,
    ),
    "implicit": (
        {"chosen": [*TALK, assistant("yes")], "rejected": [*TALK, assistant("no")]},
        "implicit_messages",
        TALK,
        True,
    ),
    "one word in common": (
        {"chosen": [user("q"), assistant("yes")], "rejected": [user("q "), assistant("no")]},
        "implicit_messages",
        [user("q")],
        True,
    ),
    "hh": ({"chosen": hh("q", "a", "q2", "yes"), "rejected": hh("q", "a ", "q2", "no")}, "hh", TALK, True),
    "hh with a prompt": (
        {"prompt": hh("q", "a", "q2") + "\n\nAssistant:", "chosen": "yes", "rejected": "no"},
        "hh_prompt",
        TALK,
        True,
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "system", "value": "s"}, human("q")],
            "chosen": {"from": "gpt", "value": "yes"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        "sharegpt",
        [{"role": "system", "content": "s"}, user("q")],
        True,
    ),
    "ultrafeedback": (
        {
            "prompt": "q",
            "chosen": [user("q"), assistant("yes")],
            "rejected": [user("q"), assistant("no")],
            "messages": [user("q"), assistant("yes")],
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        },
        "ultrafeedback",
        [user("q")],
        True,
    ),
    "prompt with a system message, repeated": (
        {
            "prompt": [{"role": "system", "content": "s"}, user("q")],
            "chosen": [{"role": "system", "content": "s"}, user("q"), assistant("yes")],
            "rejected": [{"role": "system", "content": "s"}, user("q"), assistant("no")],
        },
        "messages",
        [{"role": "system", "content": "s"}, user("q")],
        True,
    ),
    "prompt with a system message, repeated without it": (
        {
            "prompt": [{"role": "system", "content": "s"}, user("q")],
            "chosen": [user("q"), assistant("yes")],
            "rejected": [user("q"), assistant("no")],
        },
        "messages",
        [{"role": "system", "content": "s"}, user("q")],
        True,
    ),
    "json in a cell": (
        {
            "prompt": "q",
            "chosen": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}]',
            "rejected": "[{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'no'}]",
        },
        None,
        [user("q")],
        True,
    ),
    "parts": (
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}],
            "chosen": "yes",
            "rejected": "no",
        },
        "messages",
        [user("q")],
        True,
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_each_layout_is_found_and_gives_the_pair(case):
    row, name, prompt, is_chat = LAYOUTS[case]
    layout = detect_layout([row] * 3, {}, "test data")
    assert name is None or layout.name == name
    pair = to_pair(row, 4, layout)
    assert isinstance(pair, Pair), pair
    assert (pair.prompt, pair.chosen.strip(), pair.rejected.strip()) == (prompt, "yes", "no")
    assert (pair.row, pair.is_chat) == (4, is_chat)
    assert layout.why and "3 of 3 rows" in layout.why


@pytest.mark.parametrize("case", LAYOUTS)
def test_renamed_columns_are_found_through_the_mapping(case):
    row, name, _, _ = LAYOUTS[case]
    roles = {"prompt": ("prompt", "question", "instruction", "conversations"), "system": ("system",)}
    roles |= {"chosen": ("chosen", "chatgpt", "response_j"), "rejected": ("rejected", "llama2-13b-chat", "response_k")}
    mapping = {role: column for role, columns in roles.items() for column in columns if column in row}
    mapping = {role: column for role, column in mapping.items() if column != "instruction"}  # its `input` goes with it
    renamed = {f"my {column}" if column in mapping.values() else column: cell for column, cell in row.items()}
    layout = detect_layout([renamed] * 3, {role: f"my {column}" for role, column in mapping.items()}, "test data")
    one, other = (to_pair(*args) for args in ((renamed, 1, layout), (row, 1, detect_layout([row], {}, "test data"))))
    assert one == other


@pytest.mark.parametrize(
    ("layout_of", "row", "reason"),
    [
        ("text", {"prompt": "q", "chosen": None, "rejected": "no"}, "null_field"),
        ("text", {"prompt": "q", "rejected": "no"}, "null_field"),
        ("text", {"prompt": "q", "chosen": float("nan"), "rejected": "no"}, "null_field"),
        ("messages", {"prompt": TALK, "chosen": [], "rejected": [assistant("no")]}, "null_field"),
        ("text", {"prompt": " \n", "chosen": "yes", "rejected": "no"}, "empty_prompt"),
        ("implicit", {"chosen": [assistant("yes")], "rejected": [assistant("no")]}, "empty_prompt"),
        ("text", {"prompt": "q", "chosen": "yes", "rejected": "\t "}, "empty_response"),
        ("hh", {"chosen": hh("q", ""), "rejected": hh("q", "no")}, "empty_response"),
        ("text", {"prompt": "q", "chosen": "yes", "rejected": "yes"}, "identical_responses"),
        ("text", {"prompt": "q", "chosen": "yes", "rejected": " yes\n"}, "identical_after_trim"),
        (
            "implicit",
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]},
            "identical_responses",
        ),
        ("hh", {"chosen": hh("q", "yes"), "rejected": hh("other", "no")}, "prompts_differ"),
        ("hh", {"chosen": hh("q", "a", "q2", "yes"), "rejected": hh("q", "no")}, "prompts_differ"),
        (
            "implicit",
            {"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]},
            "prompts_differ",
        ),
        ("implicit", {"chosen": [user("q"), assistant("yes"), user("q2")], "rejected": TALK}, "no_final_assistant"),
        ("hh", {"chosen": hh("q", "a", "q2"), "rejected": hh("q", "no")}, "no_final_assistant"),
        (
            "implicit",
            {"chosen": [*TALK, assistant("x")], "rejected": [user("q"), assistant("b"), user("q2"), assistant("x")]},
            "several_response_turns",
        ),
        (
            "messages",
            {"prompt": [{"role": "narrator", "content": "1"}], "chosen": "a", "rejected": "b"},
            "unknown_role",
        ),
        ("text", {"prompt": "q", "chosen": 17, "rejected": "no"}, "not_text"),
        ("text", {"prompt": "q", "chosen": "half \ud83d", "rejected": "no"}, "not_text"),
        ("messages", {"prompt": "plain", "chosen": [assistant("yes")], "rejected": [assistant("no")]}, "not_text"),
        (
            "messages",
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "a", "rejected": "b"},
            "not_text",
        ),
        ("hh", {"chosen": "A letter.", "rejected": hh("q", "no")}, "not_a_dialogue"),
        ("hh", {"chosen": "A letter." + hh("q", "yes"), "rejected": "A letter." + hh("q", "no")}, "not_a_dialogue"),
        (
            "implicit",
            {
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("a"), user("q2"), assistant("b")],
            },
            "several_response_turns",
        ),
        (
            "ultrafeedback",
            {"prompt": "p", "chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]},
            "prompt_column_differs",
        ),
        ("repeated text", {"prompt": "q", "chosen": "q yes", "rejected": "other no"}, "prompt_column_differs"),
        ("ultrafeedback", {**LAYOUTS["ultrafeedback"][0], "score_rejected": 8}, "tie"),
        ("text", {"prompt": "q", "chosen": "yes", "rejected": "no", "status": "tie"}, "tie"),
    ],
)
def test_each_unusable_row_has_its_reason(layout_of, row, reason):
    if layout_of == "messages" and isinstance(row["chosen"], str):
        layout_of = "messages and text"
    layout = detect_layout([LAYOUTS[layout_of][0]] * 2, {}, "test data")
    result = to_pair(row, 9, layout)
    assert isinstance(result, Rejection) and (result.row, result.reason) == (9, reason), result
    assert result.detail


def test_scores_that_rate_the_rejected_answer_higher_are_noticed():
    row = LAYOUTS["ultrafeedback"][0]
    layout = detect_layout([row], {}, "test data")
    assert not scores_disagree(row, layout)
    assert scores_disagree({**row, "score_rejected": "9.5"}, layout)
    assert not scores_disagree({**row, "score_rejected": None}, layout)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], {}, "has no rows"),
        (
            [{"promt": "q", "chosn": "a", "rejected": "b"}],
            {},
            r"no column 'chosen'.*promt, chosn.*mean 'chosn'.*data\.columns\.chosen=",
        ),
        ([{"a": 1}], {}, r"no column 'chosen' and no column 'rejected'; its columns are: a\."),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], {"chosen": "choosen"}, r"choosen .*Did you mean 'chosen'"),
        ([{"prompt": "q", "completion": "a", "label": True}], {}, "KTO"),
        ([{"messages": TALK}], {}, "supervised fine-tuning"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b", "images": []}], {}, "trains on text only"),
        ([{"chosen": "a b c", "rejected": "a b d"}], {}, "no prompt column and no .*would cut into the answers"),
        ([{"prompt": "q", "chosen": 1, "rejected": "b"}], {}, "'chosen' holds numbers .*only text is trained"),
        (
            [{"prompt": "q", "chosen": "a", "rejected": [assistant("b")]}],
            {},
            "chosen holds text, but rejected holds messages",
        ),
    ],
)
def test_data_that_fit_no_layout_are_refused_with_a_way_out(rows, columns, message):
    with pytest.raises(DataError, match=message) as error:
        detect_layout(rows, columns, "acme.jsonl")
    assert "acme.jsonl" in str(error.value)


def test_an_unknown_role_in_the_mapping_is_a_config_error():
    with pytest.raises(ConfigError, match=r"data\.columns\.promt"):
        detect_layout([LAYOUTS["text"][0]], {"promt": "prompt"}, "test data")


def test_a_change_of_format_far_into_the_data_is_seen_and_both_rows_are_named():
    text = {"prompt": "q", "chosen": "a", "rejected": "b"}
    other = {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}
    with pytest.raises(DataError, match=r"differ in format.*'chosen' holds messages in row 70\d\d and text in row 1\b"):
        detect_layout([text] * 7000 + [other] * 3000, {}, "test data")


def test_odd_first_rows_do_not_decide():
    rows = [{"chosen": None, "rejected": None}, {"chosen": "?", "rejected": "?"}]
    rows += [{"chosen": hh("q", "yes"), "rejected": hh("q", "no")}] * 50
    layout = detect_layout(rows, {}, "test data")
    assert layout.name == "hh"
    assert [type(to_pair(row, 1, layout)) for row in rows[:3]] == [Rejection, Rejection, Pair]


@pytest.mark.parametrize("seed", range(20))
def test_property_a_conversation_comes_back_from_every_way_of_writing_it(seed):
    draw = random.Random(seed)
    words = ["yes", "a b", "Human:", "x\n\ny", "é😀", "[1]", '{"role": 1}', "Assistant"]
    talk = [draw.choice([user, assistant])(f"{draw.choice(words)} {n}") for n in range(draw.randint(0, 5))] + [
        user("ask")
    ]
    chosen, rejected = (f"{draw.choice(words)} {side}" for side in ("good", "bad"))
    rows = {
        "explicit": {"prompt": talk, "chosen": chosen, "rejected": rejected},
        "lists": {"prompt": talk, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]},
        "both": {"prompt": talk, "chosen": [*talk, assistant(chosen)], "rejected": [*talk, assistant(rejected)]},
        "implicit": {"chosen": [*talk, assistant(chosen)], "rejected": [*talk, assistant(rejected)]},
        "hh": {
            side: "".join(
                f"\n\n{'Human' if turn['role'] == 'user' else 'Assistant'}: {turn['content']}" for turn in turns
            )
            for side, turns in (("chosen", [*talk, assistant(chosen)]), ("rejected", [*talk, assistant(rejected)]))
        },
    }
    if talk[0]["role"] == "assistant":
        del rows["hh"]  # a Human speaks first there
    for name, row in rows.items():
        pair = to_pair(row, 1, detect_layout([row], {}, "test data"))
        assert isinstance(pair, Pair), (name, pair)
        assert (pair.prompt, pair.chosen, pair.rejected) == (talk, chosen, rejected), name
