"""Every template kept here by every kind of row: what is trained is what a server would have produced."""

import copy
import json

import pytest

from qdpo.data.layouts.pair import Rejection, detect_layout, to_pair
from qdpo.data.tokens.encode import Encoder
from qdpo.data.tokens.ends import special_ids
from qdpo.data.tokens.render import Rendered, Renderer
from qdpo.errors import ConfigError
from qdpo.settings.schema import DataConfig
from tests.data.chat import prepare_rows
from tests.templates.judged import KINDS, judge
from tests.templates.tokenizers import KEPT, tokenizer_of, tokenizer_of_file

FILES = {path.stem: path for path in sorted(KEPT.glob("*/*.jinja"))}
# Rows that a template cannot take whole are dropped, each with its reason; all others are trained.
NO_THOUGHTS = {"reasoning", "thinking", "parts"}
DROPPED = {
    "Apertus-8B-Instruct": NO_THOUGHTS,
    "HuggingFaceTB-SmolLM3-3B": NO_THOUGHTS | {"generated", "call", "text call"},
    "Mistral-Small-3.2-24B-Instruct-2506": NO_THOUGHTS,
    "Qwen-Qwen2.5-7B-Instruct": NO_THOUGHTS,
    "Qwen3-Coder": NO_THOUGHTS,
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": {"call", "text call"},
    "deepseek-ai-DeepSeek-V3.1": NO_THOUGHTS | {"inline", "generated"},
    "google-gemma-4-31B-it": NO_THOUGHTS | {"inline", "generated"},
    "ibm-granite-granite-4.0": NO_THOUGHTS,
    "microsoft-Phi-3.5-mini-instruct": NO_THOUGHTS | {"call", "text call", "tool turns"},
    "mistralai-Mistral-Nemo-Instruct-2407": NO_THOUGHTS,
    "always_opens": NO_THOUGHTS,
    "arguments_as_text": NO_THOUGHTS,
    "nemotron": {"call", "text call"},
    "no_tools": NO_THOUGHTS | {"call", "text call"},
    "parts": {"call", "text call"},
}
THINKING_OFF = {
    "Qwen3.5-4B": "<think>\n\n</think>\n\n",
    "Qwen-Qwen3-0.6B": "<think>\n\n</think>\n\n",
    "GLM-4.7-Flash": "</think>",
    "nemotron": "<think></think>",
}


def rendered(name: str, kind: str, **settings: object) -> Rendered | Rejection:
    row = KINDS[kind]
    pair = to_pair(row, 1, detect_layout([row], {}, "the row"))
    assert not isinstance(pair, Rejection), pair
    return Renderer(tokenizer=tokenizer_of_file(FILES[name]), **settings).render(pair)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FILES)
def test_what_is_trained_is_what_a_server_would_have_produced(name: str) -> None:
    tokenizer = tokenizer_of_file(FILES[name])
    found = {kind: judge(tokenizer, kind, {}) for kind in KINDS}
    wrong = {kind: one.detail for kind, one in found.items() if one.mark == "!"}
    assert not wrong
    assert {kind for kind, one in found.items() if one.mark == "-"} == DROPPED.get(name, set())
    reasons = {found[kind].reason for kind in DROPPED.get(name, set())}
    assert reasons <= {"reasoning_not_in_template", "answer_not_in_template", "turn_not_in_template"}


@pytest.mark.parametrize("name", THINKING_OFF)
def test_a_switch_of_the_template_holds_for_prompt_and_answer(name: str) -> None:
    off = {"enable_thinking": False}
    plain = rendered(name, "plain", options=off)
    assert isinstance(plain, Rendered)
    assert plain.prompt.endswith(THINKING_OFF[name]) and plain.chosen.startswith("It is four.")
    for kind in ("reasoning", "inline", "generated"):
        thought = rendered(name, kind, options=off)
        assert isinstance(thought, Rejection) and thought.reason == "reasoning_not_in_template"
        assert "thinking off" in thought.detail
        assert rendered(name, kind, options=off, reasoning="train") == thought  # a second thought would follow
        left_out = rendered(name, kind, options=off, reasoning="ignore")
        assert isinstance(left_out, Rendered) and left_out.chosen == plain.chosen
        assert [reason for reason, _detail in left_out.mended] == ["reasoning_not_in_template"]


@pytest.mark.parametrize("name", ["Qwen3.5-4B", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B", "nemotron"])
def test_a_thought_behind_a_prompt_that_opens_it_is_trained_as_it_was_generated(name: str) -> None:
    generated, inline, apart = (rendered(name, kind) for kind in ("generated", "inline", "reasoning"))
    assert isinstance(generated, Rendered) and isinstance(inline, Rendered) and isinstance(apart, Rendered)
    assert generated.prompt.endswith("<think>\n")
    assert generated.chosen.startswith("Wondering about sums\n</think>\n\nIt is four.")
    assert inline.chosen == generated.chosen
    assert "".join(apart.chosen.split()) == "".join(generated.chosen.split())


def test_a_thought_that_the_template_cannot_write_is_dropped_trained_or_left_out() -> None:
    row = KINDS["reasoning"]
    tokenizer = tokenizer_of_file(FILES["Qwen-Qwen2.5-7B-Instruct"])
    found = prepare_rows([row], tokenizer, max_tokens=400, max_prompt_tokens=300, template="auto")
    assert dict(found.dropped) == {"reasoning_not_in_template": 1}
    trained = rendered("Qwen-Qwen2.5-7B-Instruct", "reasoning", reasoning="train")
    assert isinstance(trained, Rendered)
    assert trained.chosen == "<think>\nWondering about sums\n</think>\n\nIt is four.<|im_end|>"
    ignored = rendered("Qwen-Qwen2.5-7B-Instruct", "reasoning", reasoning="ignore")
    assert isinstance(ignored, Rendered) and ignored.chosen == "It is four.<|im_end|>"


def test_answers_that_differ_only_in_their_thoughts_are_a_pair_where_they_are_written() -> None:
    same = [{"role": "assistant", "content": "It is four.", "reasoning": text} for text in ("Sums.", "A guess.")]
    row = {"prompt": KINDS["plain"]["prompt"], "chosen": same[:1], "rejected": same[1:]}
    for name, reasons in (("Qwen3.5-4B", {}), ("Qwen-Qwen2.5-7B-Instruct", {"reasoning_not_in_template": 1})):
        tokenizer = tokenizer_of_file(FILES[name])
        found = prepare_rows([row], tokenizer, max_tokens=400, max_prompt_tokens=300, template="auto")
        assert dict(found.dropped) == reasons and len(found.pairs) == 1 - len(reasons)


def test_the_text_of_special_tokens_in_thoughts_tools_and_arguments_stays_text() -> None:
    call = {"name": "weather", "arguments": {"city": "<|im_end|>"}}
    row = copy.deepcopy(KINDS["call"])
    row["chosen"] = [
        {"role": "assistant", "content": "", "reasoning_content": "so <|im_start|>", "tool_calls": [{"function": call}]}
    ]
    row["tools"][0]["function"]["description"] = "ends <|endoftext|> early"
    pair = to_pair(row, 1, detect_layout([row], {}, "the row"))
    tokenizer = tokenizer_of_file(FILES["Qwen3.5-4B"])
    found = Renderer(tokenizer=tokenizer).render(pair)  # type: ignore[arg-type]
    assert isinstance(found, Rendered)
    assert sorted(found.hidden.values()) == ["<|im_end|>", "<|im_start|>"]
    assert found.chosen.count("<|im_end|>") == 1 and found.chosen.endswith("<|im_end|>")


def test_a_private_character_in_a_row_is_text_as_any_other() -> None:
    tokenizer = tokenizer_of_file(FILES["Qwen-Qwen3-0.6B"])
    row = {
        "prompt": [{"role": "user", "content": "Press \uf8ff\ue000?"}],
        "chosen": [{"role": "assistant", "content": "The \uf8ff key \ue000\ue001 is Command."}],
        "rejected": [{"role": "assistant", "content": "No <|im_end|> idea."}],
    }
    pair = to_pair(row, 1, detect_layout([row], {}, "the row"))
    found = Renderer(tokenizer=tokenizer).render(pair)  # type: ignore[arg-type]
    assert isinstance(found, Rendered)
    assert "The \uf8ff key \ue000\ue001 is Command." in found.chosen and "Press \uf8ff\ue000?" in found.prompt
    assert not set(found.hidden) & {"\uf8ff", "\ue000", "\ue001"}


def test_arguments_that_are_no_json_are_named_where_the_template_wants_an_object() -> None:
    row = copy.deepcopy(KINDS["text call"])
    row["chosen"][0]["tool_calls"][0]["function"]["arguments"] = "{city: Paris}"
    pair = to_pair(row, 1, detect_layout([row], {}, "the row"))
    found = Renderer(tokenizer=tokenizer_of_file(FILES["Qwen-Qwen2.5-7B-Instruct"])).render(pair)  # type: ignore[arg-type]
    assert isinstance(found, Rejection) and found.reason == "bad_tool_call" and "'weather'" in found.detail


def test_a_prompt_without_an_answer_is_that_of_a_pair() -> None:
    for name in ("Qwen3.5-4B", "google-gemma-4-31B-it", "openai-gpt-oss-120b"):
        renderer = Renderer(tokenizer=tokenizer_of_file(FILES[name]))
        pair = to_pair(KINDS["turns"], 1, detect_layout([KINDS["turns"]], {}, "the row"))
        whole = renderer.render(pair)  # type: ignore[arg-type]
        alone = renderer.prompt(KINDS["turns"]["prompt"], is_chat=True)
        assert isinstance(whole, Rendered) and isinstance(alone, Rendered) and alone.prompt == whole.prompt


def test_a_template_that_knows_no_thoughts_trains_their_text() -> None:
    tokenizer = tokenizer_of("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
                             "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")  # fmt: skip
    for kind in ("inline", "generated"):
        pair = to_pair(KINDS[kind], 1, detect_layout([KINDS[kind]], {}, "the row"))
        found = Renderer(tokenizer=tokenizer).render(pair)  # type: ignore[arg-type]
        assert isinstance(found, Rendered) and found.chosen == KINDS[kind]["chosen"][0]["content"] + "<|im_end|>"


@pytest.mark.parametrize("name", ["enable_thinkin", "messages", "tokenize"])
def test_a_switch_that_the_template_does_not_have_is_refused(name: str) -> None:
    config = DataConfig(template_options={name: False})
    told = (
        f"template_options.{name}: .* has no such switch. It reads: .*enable_thinking.*`data.template_options.{name}=`"
    )
    with pytest.raises(ConfigError, match=told):
        Renderer.of(tokenizer_of_file(FILES["Qwen3.5-4B"]), config)


def test_a_switch_without_a_template_is_refused() -> None:
    tokenizer = tokenizer_of_file(FILES["Qwen3.5-4B"])
    switched = {"enable_thinking": False}
    with pytest.raises(ConfigError, match=r"no chat template to switch \(data.template=plain\)"):
        Renderer.of(tokenizer, DataConfig(template="plain", template_options=switched))
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="'Qwen3.5-4B' has no chat template"):
        Renderer.of(tokenizer, DataConfig(template_options=switched))


@pytest.mark.parametrize(
    ("source", "line"),
    [("{% for m in messages %}\n{{ m.content }}\n{{ nothing.at_all }}{% endfor %}", 3), ("{% if %}", 1)],
)
def test_a_broken_template_is_named_with_its_line(source: str, line: int) -> None:
    pair = to_pair(KINDS["plain"], 1, detect_layout([KINDS["plain"]], {}, "the row"))
    with pytest.raises(
        ConfigError, match=rf"chat template of 'template' cannot be used: line {line} .*data\.template=FILE"
    ):
        Renderer(tokenizer=tokenizer_of(source)).render(pair)  # type: ignore[arg-type]


def test_a_thought_whose_words_stand_in_the_answer_is_missed_as_any_other() -> None:
    row = copy.deepcopy(KINDS["reasoning"])
    row["chosen"][0]["reasoning_content"] = "four"
    pair = to_pair(row, 1, detect_layout([row], {}, "the row"))
    found = Renderer(tokenizer=tokenizer_of_file(FILES["Qwen-Qwen2.5-7B-Instruct"])).render(pair)  # type: ignore[arg-type]
    assert isinstance(found, Rejection) and found.reason == "reasoning_not_in_template"


def test_a_turn_whose_words_stand_in_another_is_missed_as_any_other() -> None:
    last = "{{ messages[-1].content if add_generation_prompt else messages[-2].content }}"
    tokenizer = tokenizer_of(last + "<|im_end|>{{ messages[-1].content if not add_generation_prompt }}")
    row = {**KINDS["plain"], "prompt": [{"role": "user", "content": "Hi"}, *KINDS["turns"]["prompt"][1:]]}
    row["prompt"][-1] = {"role": "user", "content": "I said Hi. Hello friend."}
    pair = to_pair(row, 1, detect_layout([row], {}, "the row"))
    found = Renderer(tokenizer=tokenizer).render(pair)  # type: ignore[arg-type]
    assert isinstance(found, Rejection) and found.reason == "turn_not_in_template"


def test_tags_of_a_thought_that_are_special_tokens_are_structure() -> None:
    row = copy.deepcopy(KINDS["inline"])
    for side in ("chosen", "rejected"):
        content = row[side][0]["content"]
        row[side][0]["content"] = content.replace("<think>\n", "[THINK]").replace("\n</think>\n\n", "[/THINK]")
    pair = to_pair(row, 1, detect_layout([row], {}, "the row"))
    found = Renderer(tokenizer=tokenizer_of_file(FILES["mistralai-Ministral-3-14B-Reasoning-2512"])).render(pair)  # type: ignore[arg-type]
    assert isinstance(found, Rendered) and not found.hidden
    assert found.chosen == "[THINK]Wondering about sums[/THINK]It is four.<|endoftext|>"


CODE = 'print("a")\nprint(1)\tover'


def tool_row(arguments: object, **beside: object) -> dict:
    row = copy.deepcopy(KINDS["call"])
    row["chosen"][0]["tool_calls"][0]["function"]["arguments"] = arguments
    row["chosen"][0] |= beside
    return row


def rendered_row(name: str, row: dict, **settings: object) -> Rendered | Rejection:
    pair = to_pair(row, 1, detect_layout([row], {}, "the row"))
    assert not isinstance(pair, Rejection), pair
    return Renderer(tokenizer=tokenizer_of_file(FILES[name]), **settings).render(pair)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", sorted(name for name in FILES if "call" not in DROPPED.get(name, set())))
def test_arguments_with_line_breaks_and_other_letters_are_trained(name: str) -> None:
    value = {"city": f"{CODE} in Zürich"}
    for arguments in (value, json.dumps(value)):
        found = rendered_row(name, tool_row(arguments))
        assert isinstance(found, Rendered), found
        assert "over" in found.chosen and "rich" in found.chosen


@pytest.mark.parametrize("name", sorted(name for name in FILES if "call" not in DROPPED.get(name, set())))
def test_a_special_token_in_escapes_of_arguments_stays_text(name: str) -> None:
    tokenizer = tokenizer_of_file(FILES[name])
    special = special_ids(tokenizer)
    plain, escaped = (
        rendered_row(name, tool_row(json.dumps({"city": city}).replace("<", r"\u003c")))
        for city in ("Paris", f"Paris {tokenizer.eos_token} x")
    )
    assert isinstance(plain, Rendered) and isinstance(escaped, Rendered)
    counts = [
        sum(token in special for ids in next(Encoder(tokenizer, "auto").encode([one])) or [] for token in ids)
        for one in (plain, escaped)
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("place", [1, 3, 4])
@pytest.mark.parametrize("name", FILES)
def test_a_later_system_message_is_in_the_prompt_or_the_row_is_dropped(name: str, place: int) -> None:
    row = copy.deepcopy(KINDS["turns"])
    row["prompt"] = [{"role": "system", "content": "Be brief."}, *row["prompt"]]
    row["prompt"].insert(place, {"role": "system", "content": "Speak in rhymes."})
    found = rendered_row(name, row)
    if isinstance(found, Rejection):
        assert found.reason in ("turn_not_in_template", "template_refuses")
    else:
        assert "Speak in rhymes." in found.prompt
        renderer = Renderer(tokenizer=tokenizer_of_file(FILES[name]))
        assert renderer.prompt(row["prompt"], is_chat=True) == Rendered(found.prompt, "", "")


@pytest.mark.parametrize("name", FILES)
def test_a_thought_beside_the_text_and_in_it_is_written_once(name: str) -> None:
    row = copy.deepcopy(KINDS["inline"])
    row["chosen"][0]["reasoning_content"] = "Wondering about sums"
    assert rendered_row(name, row, reasoning="train") == rendered(name, "inline", reasoning="train")
    row["chosen"][0]["reasoning_content"] = "Counting fingers"
    both = rendered_row(name, row, reasoning="train")
    if isinstance(both, Rendered):
        assert both.chosen.count("Counting fingers") == both.chosen.count("Wondering about sums") == 1
        assert both.chosen.count("<think>") < 2


def test_a_call_behind_a_thought_that_the_prompt_opens_is_not_lost() -> None:
    name = "deepseek-ai-DeepSeek-R1-Distill-Llama-8B"
    found = rendered_row(name, tool_row({"city": "Paris"}, reasoning_content="Which town?"))
    assert isinstance(found, Rejection) and found.reason == "answer_not_in_template"


def test_a_thought_whose_words_are_in_the_call_is_missed_as_any_other() -> None:
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.reasoning_content }}{{ m.content }}"
        "{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    row = tool_row({"city": "Paris"}, reasoning_content="Paris")
    pair = to_pair(row, 1, detect_layout([row], {}, "the row"))
    found = Renderer(tokenizer=tokenizer_of(source)).render(pair)  # type: ignore[arg-type]
    assert isinstance(found, Rejection) and found.reason == "reasoning_not_in_template"


def test_thoughts_without_a_chat_template_go_by_the_setting() -> None:
    row = copy.deepcopy(KINDS["reasoning"])
    earlier = [*KINDS["turns"]["prompt"][:2], KINDS["plain"]["prompt"][0]]
    row["prompt"] = [earlier[0], {**earlier[1], "reasoning_content": "Who is it?"}, earlier[2]]
    pair = to_pair(row, 1, detect_layout([row], {}, "the row"))
    tokenizer = tokenizer_of_file(FILES["Qwen3.5-4B"])
    for reasoning, start in (("train", "<think>\nWondering about sums\n</think>\n\nIt is"), ("ignore", " It is")):
        renderer = Renderer(tokenizer=tokenizer, template="plain", reasoning=reasoning)  # type: ignore[arg-type]
        found = renderer.render(pair)  # type: ignore[arg-type]
        assert isinstance(found, Rendered) and found.chosen.strip().startswith(start.strip())
        assert "Who is it?" in renderer.facts["thinking_stripped"].example
        assert [reason for reason, _what in found.mended] == ["reasoning_not_in_template"] * 2
    dropped = Renderer(tokenizer=tokenizer, template="plain").render(pair)  # type: ignore[arg-type]
    assert isinstance(dropped, Rejection) and dropped.reason == "reasoning_not_in_template"


def test_a_call_of_an_earlier_turn_is_missed_by_its_arguments() -> None:
    row = copy.deepcopy(KINDS["tool turns"])
    row["prompt"][1]["tool_calls"][0]["function"]["arguments"] = {"city": "Oslo"}
    pair = to_pair(row, 1, detect_layout([row], {}, "the row"))
    assert not isinstance(pair, Rejection)
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{{ tools }}"
    renderer = Renderer(tokenizer=tokenizer_of(source))
    renderer.render(pair)
    assert renderer.facts["calls_not_in_prompt"].example == "weather"
