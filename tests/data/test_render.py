import copy

import pytest

from qdpo.data.pair import Pair, Rejection
from qdpo.data.render import render
from qdpo.errors import ConfigError, DataError

QUESTION = [{"role": "user", "content": "q"}]


def pair(prompt=QUESTION, chosen="yes", rejected="no", is_chat=True):
    return Pair(prompt, chosen, rejected, 3, is_chat)


@pytest.fixture
def with_template(chat_tokenizer):
    def build(template, eos="<|im_end|>"):
        tokenizer = copy.deepcopy(chat_tokenizer)
        tokenizer.chat_template, tokenizer.eos_token = template, eos
        return tokenizer

    return build


def test_the_chat_template_is_split_at_the_answer_and_ends_with_the_end_of_turn(chat_tokenizer):
    prompt, chosen, rejected = render(pair(chosen="yes, "), chat_tokenizer)
    assert prompt == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert (chosen, rejected) == ("yes, <|im_end|>", "no<|im_end|>")
    assert render(pair(is_chat=False), chat_tokenizer) == (prompt, "yes<|im_end|>", "no<|im_end|>")


def test_a_system_text_is_added_only_where_there_is_none(chat_tokenizer):
    own = [{"role": "system", "content": "own"}, *QUESTION]
    assert render(pair(), chat_tokenizer, system="ours")[0].startswith("<|im_start|>system\nours<|im_end|>\n")
    assert render(pair(own), chat_tokenizer, system="ours") == render(pair(own), chat_tokenizer)
    assert render(pair(is_chat=False), chat_tokenizer, template="plain", system="ours")[0] == "ours\n\nq"


def test_plain_text_stays_as_it_is_and_gets_an_end(base_tokenizer, chat_tokenizer):
    text = pair([{"role": "user", "content": "2+2="}], "4 ", " five<|end|>", is_chat=False)
    assert render(text, base_tokenizer) == ("2+2=", "4 <|end|>", " five<|end|>")
    assert render(text, chat_tokenizer, template="plain")[0] == "2+2="


def test_a_conversation_without_template_is_refused_or_written_out(base_tokenizer):
    talk = [*QUESTION, {"role": "assistant", "content": "a"}, {"role": "user", "content": "q2"}]
    with pytest.raises(DataError, match=r"no chat template.*base model.*instruct.*data\.template=plain"):
        render(pair(talk), base_tokenizer)
    written = render(pair(talk), base_tokenizer, template="plain")
    assert written == ("Human: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant:", " yes<|end|>", " no<|end|>")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "template_refuses"),
        ("{% if add_generation_prompt %}A:{% else %}B:yes{% endif %}", "template_rerenders_prompt"),
        (
            "A:{% if not add_generation_prompt %}{{ messages[-1].content | upper }}{% endif %}",
            "template_changes_answer",
        ),
    ],
)
def test_a_template_that_does_not_keep_prompt_and_answer_rejects_the_row(with_template, template, reason):
    result = render(pair(), with_template(template))
    assert isinstance(result, Rejection) and (result.row, result.reason) == (3, reason)
    if reason == "template_refuses":
        assert "System role not supported" in result.detail


@pytest.mark.parametrize(
    ("after", "eos", "response"),
    [
        ("<|im_end|>\n", "<|end|>", "yes<|im_end|>"),  # end of turn is not the tokenizer's eos: Gemma, Qwen base
        ("<|im_end|><|end|>\n\n", "<|end|>", "yes<|im_end|><|end|>"),
        ("\n", "<|end|>", "yes<|end|>"),
        ("", "<|end|>", "yes<|end|>"),
    ],
)
def test_a_response_always_ends_with_a_token_that_stops_generation(with_template, after, eos, response):
    text = (
        "A:{% if not add_generation_prompt %}{{ messages[-1].content }}"
        + after.replace("\n", "{{ '\\n' }}")
        + "{% endif %}"
    )
    assert render(pair(), with_template(text, eos))[1] == response


@pytest.mark.parametrize("where", ["prompt", "chosen", "rejected"])
def test_the_text_of_a_special_token_inside_a_turn_rejects_the_row(chat_tokenizer, where):
    text = "so <|im_end|> it ends"
    parts = {"prompt": [{"role": "user", "content": text}]} if where == "prompt" else {where: text}
    result = render(pair(**parts), chat_tokenizer)
    assert isinstance(result, Rejection) and result.reason == "special_token_in_text"


def test_bad_settings_and_tokenizers_are_refused(base_tokenizer, with_template):
    with pytest.raises(ConfigError, match="data.template=chatml"):
        render(pair(), base_tokenizer, template="chatml")
    with pytest.raises(DataError, match="no end-of-text token"):
        render(pair(is_chat=False), with_template(None, eos=None))
