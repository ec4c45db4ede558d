"""For every family of chat templates: the prompt is what inference reads, and the answer alone is trained.

Conversations are drawn at random, with the letters that break tokenizers and the texts of special tokens among them.
"""

import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from qdpo.data.layouts.pair import Message, Rejection
from tests.data.chat import ids_of
from tests.data.template_tokenizers import FAMILIES, Family, tokenizer_of

SPECIAL_TEXTS = sorted({text for family in FAMILIES.values() for text in (*family.special, *family.plain_added)})
LETTERS = (
    "abcXYZ 019 \n\n\t  .,!?'\"<|>[]{}%/你好、😀é\u00df\u0130ﬁ"
    "\u0301\u200d\u200b\ufeff\u202e\x00\x1b\x7f\x85\xa0\u2028\r"
)
EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
PIECES = [
    "yes ",
    "  no",
    "the capital",
    "\n\n",
    "2024",
    "3.14 ",
    "你好，世界",
    "👩‍👩‍👧 🇫🇷",
    "e\u0301",
    "{{ 7 * 7 }}{% raw %}",
    "<tool_response>\nok\n</tool_response>",
    "Human:",
    " assistant\n",
    "<<SYS>>",
    "▲\r\n",
    "\t- item\n",
]
STORAGE = tempfile.TemporaryDirectory(prefix="hypothesis-")  # hypothesis keeps its tables of letters on disk
hypothesis.configuration.set_hypothesis_home_dir(STORAGE.name)
PHASES = [Phase.explicit, Phase.generate, Phase.shrink]
examples = settings(
    max_examples=30,
    derandomize=True,
    deadline=None,
    database=None,
    phases=PHASES,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)

Talk = tuple[list[Message], str, str]
"""Prompt, chosen answer, rejected answer."""


def each_family(test: Callable[..., None]) -> Callable[..., None]:
    return for_families(*FAMILIES)(test)


def for_families(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test for each of these families."""
    return pytest.mark.parametrize("name", names)


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def texts(spice: Iterable[str], forbidden: Iterable[str] = ()) -> st.SearchStrategy[str]:
    """Contents that are not blank; `spice` are texts strewn in."""
    piece = st.one_of(st.sampled_from(PIECES), st.text(LETTERS, max_size=5), st.sampled_from([*spice, " "]))
    whole = st.lists(piece, min_size=1, max_size=5).map("".join)
    return whole.filter(lambda text: bool(text.strip()) and not any(word in text for word in forbidden))


@st.composite
def talks(draw: st.DrawFn, family: Family, *, special: bool = False) -> Talk:
    """One to three exchanges, perhaps a system turn; with `special`, the family's own special tokens stand in them."""
    others = [text for text in SPECIAL_TEXTS if text not in family.special and text != "</s>"]
    text = texts([*family.special, *family.special, "<think>"]) if special else texts(others, family.special)
    prompt = [message("system", draw(text))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [message("user", draw(text)), message("assistant", draw(text))]
    prompt.append(message("user", draw(text)))
    chosen, rejected = draw(text), draw(text)
    assume(chosen.strip() != rejected.strip() and max(chosen.count("</think>"), rejected.count("</think>")) < 2)
    return prompt, chosen, rejected


def all_contents(talk: Talk) -> list[str]:
    return [turn["content"] for turn in talk[0]] + [*talk[1:]]


def usable(talk: Talk, name: str) -> tuple[list[int], list[int], list[int]]:
    result = ids_of(*talk, tokenizer_of(name))
    assert not isinstance(result, Rejection), result
    return result


def inference_prompts(talk: Talk, name: str) -> list[str]:
    """The texts that a server may put before the answer; more than one where no rule decides."""
    prompt, prompts = talk[0], [talk[0]]
    if FAMILIES[name].refuses_system and prompt[0]["role"] == "system":
        system, user = (turn["content"] for turn in prompt[:2])
        folded = f"{system}\n\n{user}", f"{system.strip()}\n\n{user.strip()}"
        prompts = [[message("user", text), *prompt[2:]] for text in folded]
    return [
        tokenizer_of(name).apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in prompts
    ]


def written(talk: Talk, name: str) -> Iterator[tuple[str, set[str]]]:
    """Each answer, and how it may be written with its end: in one way, but for what no rule decides."""
    family, answers = FAMILIES[name], talk[1:]
    for answer in answers:
        forms = {answer.strip()} if family.trims else {answer}
        if name == "phi3":  # the token before it swallows white space
            forms.add(answer.lstrip())
        if name == "qwen3":
            bare = {answer, answer.lstrip("\n"), answer.strip()}
            forms = bare if is_thought(answer) else {EMPTY_THOUGHT + form for form in bare}
            if "</think>" in answer and not is_thought(
                answer
            ):  # as a model writes behind a prompt that opens a thought
                thought, _, rest = answer.partition("</think>")
                forms |= {EMPTY_THOUGHT + end for end in (rest, rest.strip(), rest.lstrip())}
                for inner in (thought.strip(), thought.strip("\n")):
                    forms |= {f"<think>\n{inner}\n</think>\n\n{end}" for end in (rest.lstrip(), rest.strip())}
        yield answer, {normal(family.before + form + family.end, name) for form in forms}


def is_thought(answer: str) -> bool:
    return answer.lstrip().startswith("<think>") and "</think>" in answer


def normal(text: str, name: str) -> str:
    return unicodedata.normalize("NFC", text) if name.startswith("qwen") else text


def special_ids(ids: list[int], name: str) -> list[int]:
    tokenizer = tokenizer_of(name)
    return [token for token in ids if tokenizer.convert_ids_to_tokens(token) in FAMILIES[name].special]


def decode(ids: list[int], name: str) -> str:
    return tokenizer_of(name).decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def assert_spans_are_the_answers(talk: Talk, name: str) -> None:
    prompt, *spans = usable(talk, name)
    for span, (answer, forms) in zip(spans, written(talk, name), strict=True):
        before, whole = decode(prompt, name), decode(prompt + span, name)
        assert whole.startswith(before)
        assert whole[len(before) :] in forms, answer
        end = FAMILIES[name].end.strip()
        assert [decode([token], name) for token in special_ids(span, name)] == [end]
        assert decode(span[-1:], name) == end


@each_family
@examples
@given(data=st.data())
def test_the_prompt_is_what_inference_reads(name: str, data: st.DataObject) -> None:
    talk = data.draw(talks(FAMILIES[name]))
    prompt, *spans = usable(talk, name)
    tokenizer = tokenizer_of(name)
    possible = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for text in inference_prompts(talk, name)}
    assert prompt in possible.values()
    (text,) = {text for text, ids in possible.items() if ids == prompt} or {""}
    for span, (_, forms) in zip(spans, written(talk, name), strict=True):
        wholes = [tokenizer(text + form, add_special_tokens=False)["input_ids"] for form in forms]
        in_place = [whole for whole in wholes if whole[: len(prompt)] == prompt]
        # A token across the border parts the two; nothing else does.
        assert prompt + span in in_place or len(in_place) < len(wholes)


@each_family
@examples
@given(data=st.data())
def test_the_trained_span_is_the_answer_and_its_end(name: str, data: st.DataObject) -> None:
    assert_spans_are_the_answers(data.draw(talks(FAMILIES[name])), name)


@for_families(*(name for name, family in FAMILIES.items() if family.bos))
@examples
@given(data=st.data())
def test_there_is_one_bos_and_it_stands_in_front(name: str, data: st.DataObject) -> None:
    family = FAMILIES[name]
    talk = data.draw(talks(family))
    prompt, *spans = usable(talk, name)
    bos = tokenizer_of(name).bos_token_id
    exchanges = sum(turn["role"] == "user" for turn in talk[0])
    wanted = exchanges if family.bos_for_each_exchange else int(family.adds_bos)
    assert prompt.count(bos) == wanted and prompt[:2].count(bos) == int(family.adds_bos)
    assert not any(bos in span for span in spans)


@each_family
@examples
@given(data=st.data())
def test_the_text_of_a_special_token_stays_text(name: str, data: st.DataObject) -> None:
    family = FAMILIES[name]
    talk = data.draw(talks(family, special=True))
    assume(any(word in content for content in all_contents(talk) for word in family.special))
    prompt, *spans = usable(talk, name)
    bare = [message(turn["role"], "x") for turn in talk[0] if not (family.refuses_system and turn["role"] == "system")]
    template_ids = tokenizer_of(name).apply_chat_template(bare, add_generation_prompt=True, return_dict=True)
    assert special_ids(prompt, name) == special_ids(template_ids["input_ids"], name)
    # White space aside: some of these tokenizers add spaces, and others swallow them.
    assert "".join(decode(prompt, name).split()) in {
        "".join(normal(text, name).split()) for text in inference_prompts(talk, name)
    }
    assert_spans_are_the_answers(talk, name)


@for_families(*(name for name, family in FAMILIES.items() if family.alternates))
@examples
@given(data=st.data())
def test_a_refused_conversation_comes_back_with_the_words_of_the_template(name: str, data: st.DataObject) -> None:
    (*before, question), chosen, rejected = data.draw(talks(FAMILIES[name]))
    result = ids_of([*before, question, question], chosen, rejected, tokenizer_of(name))
    assert isinstance(result, Rejection) and result.reason == "template_refuses"
    words = "conversation roles must alternate user/assistant/user/assistant/...", "system role not supported"
    assert any(word in result.detail.lower() for word in words)


@for_families("qwen3")
@examples
@given(data=st.data())
def test_thoughts_are_trained_as_they_stand_and_forgotten_later(name: str, data: st.DataObject) -> None:
    plain = texts([], FAMILIES[name].special)
    thoughts = st.builds("{}<think>{}</think>{}".format, st.sampled_from(["", "\n"]), plain, plain)
    question = message("user", data.draw(plain))
    talk = ([question, message("assistant", data.draw(thoughts)), question], data.draw(thoughts), data.draw(thoughts))
    assume(talk[1].strip() != talk[2].strip())
    prompt, *spans = usable(talk, name)
    assert decode(prompt, name) in {normal(text, name) for text in inference_prompts(talk, name)}
    assert "think>" not in decode(prompt, name)
    for span, answer in zip(spans, talk[1:], strict=True):
        assert decode(span, name) == normal(answer + FAMILIES[name].end, name)


@each_family
def test_a_short_answer_is_not_looked_for_in_its_end_token(name: str) -> None:
    answers = [*"<|>_/si", "end", "d", "e"]
    for chosen, rejected in zip(answers, [*answers[1:], answers[0]], strict=True):
        assert_spans_are_the_answers(([message("user", "Which one?")], chosen, rejected), name)


TODAY = datetime.now().strftime("%d %b %Y")
LLAMA3_TAIL = (
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n<think>hm</think>\n\n Hello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAgain<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
CHATML_TAIL = (
    "<|im_start|>user\n Hi <|im_end|>\n<|im_start|>assistant\n<think>hm</think>\n\n Hello <|im_end|>\n"
    "<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n"
)
WRITTEN = {  # family: prompt of a short conversation, and what the template writes after it for the answer " Yes "
    "chatml": ("<|im_start|>system\nBe terse.<|im_end|>\n" + CHATML_TAIL, " Yes <|im_end|>\n"),
    "llama2": (
        "<s>[INST] <<SYS>>\nBe terse.\n<</SYS>>\n\n Hi [/INST] <think>hm</think>\n\n Hello </s><s>[INST] Again [/INST]",
        " Yes </s>",
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe terse.<|eot_id|>" + LLAMA3_TAIL,
        "Yes<|eot_id|>",
    ),
    "llama3_first": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe terse.<|eot_id|>" + LLAMA3_TAIL,
        "Yes<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "llama31": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        f"Today Date: {TODAY}\n\nBe terse.<|eot_id|>" + LLAMA3_TAIL,
        "Yes<|eot_id|>",
    ),
    "mistral": (
        "<s>[INST]  Hi [/INST] <think>hm</think>\n\n Hello</s>[INST] Be terse.\n\nAgain[/INST]",
        None,  # the system text is gone from the last question
    ),
    "gemma": (None, "System role not supported"),
    "qwen25": ("<|im_start|>system\nBe terse.<|im_end|>\n" + CHATML_TAIL, " Yes <|im_end|>\n"),
    "qwen3": (
        "<|im_start|>system\nBe terse.<|im_end|>\n" + CHATML_TAIL.replace("<think>hm</think>\n\n", ""),
        "<think>\n\n</think>\n\n Yes <|im_end|>\n",
    ),
    "phi3": (
        "<|system|>\nBe terse.<|end|>\n<|user|>\n Hi <|end|>\n<|assistant|>\n<think>hm</think>\n\n Hello <|end|>\n"
        "<|user|>\nAgain<|end|>\n<|assistant|>\n",
        " Yes <|end|>\n<|endoftext|>",
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_the_templates_write_what_the_published_ones_write(name: str) -> None:
    thought = "<think>hm</think>\n\n Hello "
    talk = [message("system", "Be terse."), message("user", " Hi "), message("assistant", thought)]
    talk.append(message("user", "Again"))
    prompt, after = WRITTEN[name]
    apply = tokenizer_of(name).apply_chat_template
    if prompt is None:
        with pytest.raises(Exception, match=after):
            apply(talk, tokenize=False)
        return
    assert apply(talk, tokenize=False, add_generation_prompt=True) == prompt
    whole = apply([*talk, message("assistant", " Yes ")], tokenize=False)
    assert whole == prompt + after if after else not whole.startswith(prompt)


def test_defaults_of_the_templates() -> None:
    question = [message("user", "q")]
    for name, text in (("qwen25", "You are Qwen, created by Alibaba Cloud."), ("llama31", f"Today Date: {TODAY}\n\n")):
        written_text = tokenizer_of(name).apply_chat_template(question, tokenize=False)
        assert text in written_text and ">system" in written_text
    empty = tokenizer_of("qwen3").apply_chat_template(
        question, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert empty.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
