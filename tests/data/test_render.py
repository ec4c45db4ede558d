import copy

import pytest
from tokenizers import pre_tokenizers

from qdpo.data.layouts.pair import Pair, Rejection
from qdpo.data.tokens.encode import Encoder
from qdpo.data.tokens.render import Renderer
from qdpo.data.tokens.templates import settle_template, template_warnings
from qdpo.errors import ConfigError, DataError
from tests.data.chat import prepare_rows
from tests.data.conftest import CHATML
from tests.data.template_tokenizers import tokenizer_of

QUESTION = [{"role": "user", "content": "q"}]


def pair(prompt=QUESTION, chosen="yes", rejected="no", is_chat=True):
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, row=3, is_chat=is_chat)


def render(pair, tokenizer, **settings):
    found = Renderer(tokenizer=tokenizer, **settings).render(pair)
    return found if isinstance(found, Rejection) else found.three


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
    with pytest.raises(DataError, match=r"no chat template.*base model.*instruct.*data\.template=chatml.*plain"):
        render(pair(talk), base_tokenizer)
    written = render(pair(talk), base_tokenizer, template="plain")
    assert written == ("Human: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant:", " yes<|end|>", " no<|end|>")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "template_refuses"),
        (
            "{% if add_generation_prompt %}{{ messages[0].content }}A:{% else %}B:yes{% endif %}",
            "template_rerenders_prompt",
        ),
        (
            "{{ messages[0].content }}A:"
            "{% if not add_generation_prompt %}{{ messages[-1].content | reverse }}{% endif %}",
            "template_changes_answer",
        ),
        (
            "{{ messages[0].content }}A:{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
            "template_rerenders_prompt",
        ),
        (
            "{% if add_generation_prompt %}A:{% endif %}",
            "turn_not_in_template",
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
        "{{ messages[0].content }}A:{% if not add_generation_prompt %}{{ messages[-1].content }}"
        + after.replace("\n", "{{ '\\n' }}")
        + "{% endif %}"
    )
    assert render(pair(), with_template(text, eos))[1] == response


@pytest.mark.parametrize("where", ["prompt", "chosen", "rejected"])
def test_the_text_of_a_special_token_inside_a_turn_is_hidden_from_the_tokenizer(chat_tokenizer, where):
    text = "so <|im_end|> it ends"
    parts = {"prompt": [{"role": "user", "content": text}]} if where == "prompt" else {where: text}
    result = Renderer(tokenizer=chat_tokenizer).render(pair(**parts))
    assert list(result.hidden.values()) == ["<|im_end|>"]
    (letter,) = result.hidden
    assert f"so {letter} it ends<|im_end|>" in getattr(result, where)
    assert result.mended[0][0] == "special_token_text"
    encoder = Encoder(chat_tokenizer, "auto")
    (ids,) = encoder.encode([result])
    end = chat_tokenizer.eos_token_id
    assert [part.count(end) for part in ids] == [1, 1, 1]
    assert text in chat_tokenizer.decode(ids[["prompt", "chosen", "rejected"].index(where)])


def test_a_tokenizer_without_template_takes_one_of_ours_or_of_a_file(base_tokenizer, tmp_path):
    talk = pair([{"role": "system", "content": "s"}, *QUESTION])
    tokenizer = copy.deepcopy(base_tokenizer)  # it has the tokens of ChatML
    assert "which had none" in settle_template(tokenizer, "chatml")
    assert render(talk, tokenizer, template="chatml") == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "yes<|im_end|>",
        "no<|im_end|>",
    )
    assert settle_template(tokenizer, "chatml") is None
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
                    "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    assert "replacing its own" in settle_template(tokenizer, str(file))
    assert render(pair(), tokenizer, template=str(file)) == ("user: q<|end|>assistant: ", "yes<|end|>", "no<|end|>")
    with pytest.raises(ConfigError, match=r"needs the tokens .*lacks <\|start_header_id\|>"):
        settle_template(tokenizer, "llama3")
    with pytest.raises(ConfigError, match="neither auto, plain, chatml, llama3 nor a file"):
        settle_template(tokenizer, "alpaca")


def test_chatml_on_a_tokenizer_without_its_tokens_ends_turns_with_eos(spaced_tokenizer):
    tokenizer = copy.deepcopy(spaced_tokenizer)
    settle_template(tokenizer, "chatml")
    prompt, chosen, _ = render(pair(), tokenizer, template="chatml")
    assert prompt.endswith("q</s>\n<|im_start|>assistant\n") and chosen == "yes</s>"


def test_what_a_template_adds_by_itself_is_said(with_template):
    own = (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a very helpful friend. "
        "Today is {{ strftime_now('%d') }}.<|im_end|>{% endif %}" + CHATML
    )
    system, date = template_warnings(with_template(own), "auto", {})
    assert "You are a very helpful friend" in system and "a date" in date
    assert template_warnings(with_template(CHATML), "auto", {}) == []
    assert template_warnings(with_template("{{ raise_exception('no') }}"), "auto", {}) == []


REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
SKIPS = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")


@pytest.mark.parametrize("template", [REFUSES, SKIPS])
def test_a_refused_system_message_is_folded_dropped_or_an_error(with_template, template):
    tokenizer = with_template(template)
    talk = [{"role": "system", "content": "Be kind."}, *QUESTION]
    renderer = Renderer(tokenizer=tokenizer)
    for _ in range(2):
        prompt = renderer.render(pair(talk)).prompt
        assert prompt == "<|im_start|>user\nBe kind.\n\nq<|im_end|>\n<|im_start|>assistant\n"
    assert {name: fact.count for name, fact in renderer.facts.items()} == {"system_folded": 2}
    assert "Be kind" not in render(pair(talk), tokenizer, refused_system="drop")[0]
    with pytest.raises(DataError, match="does not take a system message .*data.refused_system=fold"):
        render(pair(talk), tokenizer, refused_system="error")


def test_a_refused_system_message_before_an_answer_is_left_out_and_said(with_template):
    begun = [{"role": "system", "content": "Be kind."}, {"role": "assistant", "content": "Hello."}, *QUESTION]
    renderer = Renderer(tokenizer=with_template(SKIPS))
    rendered = renderer.render(pair(begun))
    assert "Be kind" not in rendered.prompt and [name for name, _detail in rendered.mended] == ["system_unfoldable"]
    assert {name: fact.count for name, fact in renderer.facts.items()} == {"system_unfoldable": 1}


def test_turns_of_one_role_are_joined_on_demand(with_template):
    alternate = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}" + CHATML
    )
    twice = pair([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])
    tokenizer = with_template(alternate)
    refused = render(twice, tokenizer)
    assert refused.reason == "template_refuses" and "roles must alternate" in refused.detail
    merged = Renderer(tokenizer=tokenizer, merge_same_role=True).render(twice)
    assert "a\n\nb<|im_end|>" in merged.prompt and merged.mended[0][0] == "turns_merged"


def test_a_tokenizer_without_end_token_is_refused(with_template):
    with pytest.raises(DataError, match="no end-of-text token"):
        render(pair(is_chat=False), with_template(None, eos=None))


def test_special_text_that_a_tokenizer_cannot_read_as_text_drops_its_row():
    rows = [{"prompt": f"q{n}", "chosen": chosen, "rejected": "no"} for n, chosen in enumerate(("a [INST] b", "yes"))]
    settings = {"max_tokens": 200, "max_prompt_tokens": 100, "template": "auto"}
    tokenizer = copy.deepcopy(tokenizer_of("mistral"))
    tokenizer.chat_template = (
        "<s>{% for m in messages %}{{ '[INST]' if m.role == 'user' }}{{ m.content }}"
        "{{ '[/INST]' if m.role == 'user' else '</s>' }}{% endfor %}"
    )
    assert len(prepare_rows(rows, tokenizer, **settings).pairs) == 2
    # Its words get a space before a text, but not behind a special token; now no switch keeps it from a part alone.
    words = pre_tokenizers.Sequence([pre_tokenizers.Digits(), tokenizer.backend_tokenizer.pre_tokenizer])
    tokenizer.backend_tokenizer.pre_tokenizer = words
    prepared = prepare_rows(rows, tokenizer, **settings)
    assert [(note.row, note.action, note.reason) for note in prepared.notes] == [
        (1, "dropped", "special_token_in_text")
    ]
    assert "a message contains '[INST]'" in prepared.notes[0].detail and [pair.row for pair in prepared.pairs] == [2]
