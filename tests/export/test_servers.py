"""A Modelfile and a vLLM command that mean what the model's own template and the adapter mean."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from qdpo.errors import ConfigError, VerificationError
from qdpo.export import servers
from qdpo.export.template_pieces import turn_text
from tests.conftest import CHATML, tiny_tokenizer

HEADERS = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m['role'] + '<|stop|>\n\n' + m['content'] | trim + '<|e|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
# Gemma 2 refuses a system message; Llama 2 puts it into the first turn, and a space before an answer.
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<turn>' + m['role'] + '\n' + m['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
    "{% set s = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set s = '' %}{% endif %}{% for m in turns %}"
    "{% if m['role'] == 'user' %}[INST] {{ s if loop.first else '' }}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe \"kind\" {{ '{{' }}.<|im_end|>\n{% endif %}"
    + CHATML
)
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "none": NO_SYSTEM, "llama 2": LLAMA_2, "default": DEFAULT_SYSTEM}
TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two {{ .Content }}"},
    {"role": "user", "content": "three"},
]


def with_template(template: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.bos_token = template, "<|end|>"
    return tokenizer


def go(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of the few actions that our templates have: an interpreter of just those."""
    actions = re.split(r"(\{\{.*?\}\})", template)
    role = messages[0]["role"]

    def run(start: int, message: dict[str, str] | None, active: bool) -> tuple[str, int]:
        """Text of actions from `start` to the matching end; (text, index behind the end)."""
        out, index = "", start
        while index < len(actions):
            word = actions[index].removeprefix("{{ ").removesuffix(" }}")
            index += 1
            if not word.strip():
                continue
            assert actions[index - 1].startswith("{{"), f"bare text {word!r}"
            if word == "end":
                return out, index
            if word.startswith('if ne (index .Messages 0).Role "system"'):
                inner, index = run(index, message, role != "system")
                out += inner
            elif word == "range .Messages":
                for one in messages:
                    inner, behind = run(index, one, True)
                    out += inner
                index = behind
            elif word.startswith("if eq .Role") or word.startswith("else if eq .Role"):
                assert message is not None
                if word.startswith("if"):
                    inner, index = run_branches(index, message, word)
                    out += inner
                else:
                    return out, index - 1
            elif active:
                assert message is not None or word != ".Content"
                out += message["content"] if word == ".Content" and message else json.loads(word)
        return out, index

    def run_branches(index: int, message: dict[str, str], word: str) -> tuple[str, int]:
        out = ""
        while True:
            wanted = json.loads(word.rpartition(" ")[2])
            inner, index = run(index, message, message["role"] == wanted)
            out += inner
            following = actions[index].removeprefix("{{ ").removesuffix(" }}") if index < len(actions) else ""
            if actions[index - 1] == "{{ end }}" or not following.startswith("else"):
                return out, index
            word, index = following, index + 1

    return run(0, None, True)[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_go_template_gives_what_the_model_was_trained_on(name: str) -> None:
    tokenizer = with_template(TEMPLATES[name])
    found = turn_text(tokenizer)
    talks = [TALK[:1], TALK]
    if name == "none":
        assert not found.takes_system
    else:
        talks += [[{"role": "system", "content": "four"}, *talk] for talk in talks]
    for talk in talks:
        expected = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert found.render(talk) == expected
        assert go(found.go_template(), talk) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{% if loop.last %}" + "{{ m.content }}" + "{% endif %}{% endfor %}",  # forgets
        "{% for m in messages %}<{{ loop.index }}>{{ m.content }}{% endfor %}",  # counts
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",  # changes
    ],
)
def test_a_template_that_is_more_than_text_around_turns_is_refused(template: str) -> None:
    with pytest.raises(VerificationError, match="more than fixed text around turns"):
        turn_text(with_template(template))


def test_a_token_that_the_server_adds_is_not_in_the_template() -> None:
    tokenizer = with_template(HEADERS)
    assert "<|end|>" in turn_text(tokenizer).go_template()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.bos_token_id)]
    )
    assert "<|end|>" not in turn_text(tokenizer).go_template()


def test_a_modelfile_quotes_what_it_names(tmp_path: Path) -> None:
    tokenizer = with_template(DEFAULT_SYSTEM)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "temperature": 0.25}))
    text = servers.modelfile(tokenizer, tmp_path, source="./my model.gguf", adapter="./adapter.gguf")
    lines = text.splitlines()
    assert lines[1:3] == ["FROM ./my model.gguf", "ADAPTER ./adapter.gguf"] and text.count('"""') == 2
    assert 'PARAMETER stop "<|im_end|>"' in lines and 'PARAMETER stop "<|end|>"' in lines
    assert "PARAMETER temperature 0.25" in lines and sum(line.startswith("TEMPLATE") for line in lines) == 1
    for path in ("a\nPARAMETER stop x", '"quoted"', " padded"):
        with pytest.raises(ConfigError, match="cannot name"):
            servers.modelfile(tokenizer, tmp_path, source=path, adapter=None)


def test_commands_quote_what_a_shell_would_take_apart() -> None:
    words = ["vllm", "serve", "a b", "$HOME;rm -rf ~", "it's"]
    assert shlex.split(servers.command(*words)) == words
    line = servers.vllm_adapter(["org/base", "--revision", "abc"], Path("/runs/my run/adapter"), "my name", 9)
    found = shlex.split(line)
    assert found[found.index("--max-lora-rank") + 1] == "16" and found[-1] == "my name=/runs/my run/adapter"


@pytest.mark.parametrize(("rank", "accepted"), [(1, 1), (2, 8), (8, 8), (65, 128), (257, 320), (512, 512)])
def test_ranks_are_those_of_vllm(rank: int, accepted: int) -> None:
    assert servers.lora_rank(rank) == accepted


def test_a_rank_beyond_vllm_is_refused() -> None:
    with pytest.raises(ConfigError, match="--merged"):
        servers.lora_rank(513)


@pytest.mark.parametrize(
    ("drawn", "expected"), [(False, {"temperature": 0.0}), (True, {"temperature": 0.6, "top_p": 0.9})]
)
def test_greedy_stays_greedy(tmp_path: Path, drawn: bool, expected: dict[str, float]) -> None:
    stated = {"do_sample": drawn, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert servers._sampling(tmp_path) == {**expected, "repeat_penalty": 1.1}
