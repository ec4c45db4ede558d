"""One tokenizer of the run: what adapter.start brings, what adapter/ keeps, and where qdpo's own answers stop."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from qdpo.collect.answering_model import base_sampler, run_sampler
from qdpo.data import stored
from qdpo.data.tokens.shipped import shipped_template
from qdpo.errors import ConfigError
from qdpo.model.base.tokenizer_files import read_tokenizer_files
from qdpo.model.generate.generate import end_tokens
from qdpo.run import finished
from qdpo.run.folder import RunDir
from qdpo.run.record import Result, read_record, write_record
from qdpo.train.start.tokenizer import take_start, tokenizer_of
from tests.conftest import CHATML, Quiet, save_tiny_base, tiny_rows, tiny_tokenizer, write_jsonl

Train = Callable[..., tuple[Result, Quiet]]
SHORT = {"train__steps": "1", "data__limit": "8", "data__eval_fraction": "0.3"}
OTHER = CHATML.replace("<|im_start|>{{ m.role }}", "<|im_start|>[{{ m.role }}]").replace(
    "<|im_start|>assistant", "<|im_start|>[assistant]"
)
END, IM_END = 0, 2


def base_tokenizer(template: Any = None) -> Any:
    """As base models have it: text ends with <|end|>, and there is no chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = "<|end|>", template
    return tokenizer


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny_base(tmp_path_factory.mktemp("bare") / "base", eos_token_id=END)
    (folder / "chat_template.jinja").unlink()
    base_tokenizer().save_pretrained(folder)
    return folder


def with_template(bare: Path, folder: Path, template: Any) -> Path:
    shutil.copytree(bare, folder)
    base_tokenizer(template).save_pretrained(folder)
    return folder


def save_start(folder: Path, base: Path, tokenizer: Any = None) -> Path:
    """An SFT adapter over the base as other kits save it."""
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    peft.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def run_of(settings: dict[str, str], name: str = "run") -> RunDir:
    return RunDir(Path(settings["output.dir"]) / name)


def prompts(run: RunDir) -> list[str]:
    tokenizer = tiny_tokenizer()
    return [tokenizer.decode(pair.prompt) for pair in stored.load(run)[0]]


def test_adapter_keeps_the_trained_template_and_end(bare: Path, settings: dict[str, str], train: Train) -> None:
    train(model__path=str(bare), data__template="chatml", **SHORT)
    run = run_of(settings)
    assert read_record(run).data.ends == [IM_END]
    kept = AutoTokenizer.from_pretrained(run.adapter)
    assert kept.eos_token == "<|im_end|>" and "<|im_start|>" in kept.chat_template
    stated = json.loads((run.adapter / "generation_config.json").read_text())["eos_token_id"]
    assert set(stated) == {END, IM_END}
    base = AutoModelForCausalLM.from_pretrained(bare)
    assert PeftModel.from_pretrained(base, run.adapter).peft_config["default"].r == 16
    found = tokenizer_of(finished.finished_run(run.path), bare)
    assert found.template == kept.chat_template and list(found.ends.trained) == [IM_END]


def test_answers_of_a_run_stop_where_it_was_trained_to(bare: Path, settings: dict[str, str], train: Train) -> None:
    train(model__path=str(bare), data__template="chatml", samples__count="2", samples__max_new_tokens="4", **SHORT)
    run = run_of(settings)
    sampler = run_sampler(run.path, [], Quiet())
    assert set(end_tokens(sampler.model, sampler.tokenizer)) == {END, IM_END}
    assert "<|im_start|>" in sampler.tokenizer.chat_template
    words = ["model.quantization=none", "model.device=cpu", "model.dtype=fp32", f"model.path={bare}"]
    words += [f"cache.dir={settings['cache.dir']}"]
    plain = base_sampler(words, Quiet())
    assert end_tokens(plain.model, plain.tokenizer) == [END]
    chat = base_sampler([*words, "data.template=chatml"], Quiet())
    assert set(end_tokens(chat.model, chat.tokenizer)) == {END, IM_END}
    watcher = Quiet()
    started = base_sampler([*words, f"adapter.start={run.adapter}"], watcher)
    assert set(end_tokens(started.model, started.tokenizer)) == {END, IM_END}
    assert "<|im_start|>" in started.tokenizer.chat_template and "chat template" in watcher.text


def test_samples_while_training_stop_at_the_trained_end(
    bare: Path, settings: dict[str, str], train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qdpo.train.watch import samples

    seen = []
    monkeypatch.setattr(
        samples,
        "complete",
        lambda model, tokenizer, asked, **_: (seen.append(end_tokens(model, tokenizer)), [[5]])[1] * len(asked),
    )
    train(model__path=str(bare), data__template="chatml", samples__count="1", **SHORT)
    assert seen and all(set(ends) == {END, IM_END} for ends in seen)


def test_a_run_of_yesterday_finds_its_ends_in_prepared(bare: Path, settings: dict[str, str], train: Train) -> None:
    train(model__path=str(bare), data__template="chatml", **SHORT)
    run = run_of(settings)
    record = read_record(run)
    content = record.to_json()
    del content["data"]["ends"]  # type: ignore[attr-defined]
    write_record(run, type(record).of_json(content))
    base_tokenizer(read_tokenizer_files(run.adapter).template).save_pretrained(run.adapter)
    (run.adapter / "generation_config.json").unlink()
    found = tokenizer_of(finished.finished_run(run.path), bare)
    assert list(found.ends.trained) == [IM_END] and found.tokenizer.eos_token == "<|im_end|>"


def test_plain_conversations_ship_their_format(
    bare: Path, settings: dict[str, str], train: Train, tmp_path: Path
) -> None:
    base = with_template(bare, tmp_path / "instruct", CHATML)
    talks = [
        {
            "prompt": [{"role": "system", "content": "be kind"}, {"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in tiny_rows(12)
    ]
    data = str(write_jsonl(tmp_path / "talks.jsonl", talks))
    train(model__path=str(base), data__path=data, data__template="plain", **SHORT)
    run = run_of(settings)
    kept = AutoTokenizer.from_pretrained(run.adapter)
    by_row = {pair.row: pair for pair in stored.load(run)[0]}
    for row, pair in by_row.items():
        asked = kept.apply_chat_template(talks[row - 1]["prompt"], add_generation_prompt=True, return_dict=False)
        assert asked == pair.prompt.tolist()
        whole = kept.apply_chat_template([*talks[row - 1]["prompt"], *talks[row - 1]["chosen"]], return_dict=False)
        assert whole == [*pair.prompt.tolist(), *pair.chosen.tolist()]
    assert kept.eos_token == "<|end|>"


def test_bare_text_ships_no_template(bare: Path, settings: dict[str, str], train: Train, tmp_path: Path) -> None:
    base = with_template(bare, tmp_path / "instruct", CHATML)
    train(model__path=str(base), data__template="plain", **SHORT)
    assert AutoTokenizer.from_pretrained(run_of(settings).adapter).chat_template is None


def test_a_start_adapter_brings_its_template(
    bare: Path, settings: dict[str, str], train: Train, tmp_path: Path
) -> None:
    """As TRL (chat_template.jinja) and LLaMA-Factory (tokenizer_config.json) save it."""
    brought = base_tokenizer(OTHER)
    brought.eos_token = "<|im_end|>"
    start = save_start(tmp_path / "sft", bare, brought)
    _, said = train(model__path=str(bare), adapter__start=str(start), **SHORT)
    run = run_of(settings)
    assert all(prompt.startswith("<|im_start|>[user]\n") for prompt in prompts(run))
    assert read_record(run).data.ends == [IM_END] and "adapter.start" in said.text
    assert AutoTokenizer.from_pretrained(run.adapter).chat_template == OTHER

    (start / "chat_template.jinja").unlink()
    config = json.loads((start / "tokenizer_config.json").read_text())
    (start / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": OTHER}))
    train(model__path=str(bare), adapter__start=str(start), output__name="inline", **SHORT)
    assert prompts(run_of(settings, "inline")) == prompts(run)

    _, said = train(model__path=str(bare), adapter__start=str(run.adapter), output__name="second", **SHORT)
    assert prompts(run_of(settings, "second")) == prompts(run)

    _, said = train(
        model__path=str(bare), adapter__start=str(start), data__template="chatml", output__name="given", **SHORT
    )
    assert "data.template=chatml replaces the chat template" in said.text
    assert all(prompt.startswith("<|im_start|>user\n") for prompt in prompts(run_of(settings, "given")))


def test_a_start_adapter_without_tokenizer_changes_nothing(
    bare: Path, settings: dict[str, str], train: Train, tmp_path: Path
) -> None:
    start = save_start(tmp_path / "sft", bare)
    _, said = train(model__path=str(bare), adapter__start=str(start), **SHORT)
    assert "<|im_start|>" not in "".join(prompts(run_of(settings))) and "template" not in said.text


def test_a_start_adapter_with_other_tokens_is_refused(
    bare: Path, settings: dict[str, str], train: Train, tmp_path: Path
) -> None:
    added = base_tokenizer(OTHER.replace("<|im_end|>", "<|stop|>"))
    added.add_special_tokens({"additional_special_tokens": ["<|stop|>"]})
    start = save_start(tmp_path / "sft", bare, added)
    with pytest.raises(ConfigError, match=r"<\|stop\|>"):
        train(model__path=str(bare), adapter__start=str(start), **SHORT)
    assert not run_of(settings).path.exists()
    _, said = train(model__path=str(bare), adapter__start=str(start), data__template="chatml", **SHORT)
    assert "own tokenizer" in said.text

    moved = json.loads((bare / "tokenizer.json").read_text())
    words = moved["model"]["vocab"]
    words["river"], words["stone"] = words.get("stone", 7), words.get("river", 8)
    other = save_start(tmp_path / "moved", bare, base_tokenizer(OTHER))
    (other / "tokenizer.json").write_text(json.dumps(moved))
    with pytest.raises(ConfigError, match="other"):
        train(model__path=str(bare), adapter__start=str(other), output__name="moved", **SHORT)


DAMAGE = ("{", "[]", '{"model": 3}', '{"model": {"vocab": [1, 2]}}', '{"added_tokens": [1]}', '{"a": "b"}', "\xff")


def test_damaged_tokenizer_files_of_a_start_adapter_are_named(bare: Path, tmp_path: Path) -> None:
    start = tmp_path / "sft"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        for damage in DAMAGE:
            shutil.rmtree(start, ignore_errors=True)
            base_tokenizer(OTHER).save_pretrained(start)
            (start / name).write_text(damage, encoding="latin-1")
            try:
                take_start(base_tokenizer(), str(start), "auto", lambda line: None)
            except ConfigError as error:
                assert str(start) in str(error)
    for template in ({"chat_template": 3}, {"chat_template": [{"name": "tool_use", "template": "x"}]}):
        (start / "chat_template.jinja").unlink(missing_ok=True)
        (start / "added_tokens.json").unlink(missing_ok=True)
        (start / "tokenizer_config.json").write_text(json.dumps(template))
        with pytest.raises(ConfigError, match="chat templates in"):
            take_start(base_tokenizer(), str(start), "auto", lambda line: None)


def test_several_templates_are_kept(bare: Path, settings: dict[str, str], train: Train, tmp_path: Path) -> None:
    both = {"default": CHATML, "tool_use": OTHER}
    base = with_template(bare, tmp_path / "two", both)
    train(model__path=str(base), **SHORT)
    assert AutoTokenizer.from_pretrained(run_of(settings).adapter).chat_template == both
    assert read_tokenizer_files(run_of(settings).adapter).template == both


SWITCHED = (
    "  {% if think is defined and think is false %}\nno\n{% endif %}"
    "{% macro put(m) %}{{ m.content }}{{ think }}{% endmacro %}"
    "{% for m in messages %}{{ m.role }}:{{ put(m) }}{{ level }}\n{% endfor %}"
)


@pytest.mark.parametrize(
    "options", [{"think": False}, {"think": True, "level": 3}, {"think": 'a "b" %} {{ \\n\n é🚀'}, {"level": -1.5}]
)
@pytest.mark.parametrize("opening", ["", "\n", " \n x", "{#- c -#}\n\n"])
def test_switches_are_the_defaults_of_the_shipped_template(options: dict[str, Any], opening: str) -> None:
    source = opening + SWITCHED
    tokenizer, talk = tiny_tokenizer(), [{"role": "user", "content": "hi"}]

    def text(template: str, **switches: Any) -> str:
        return str(tokenizer.apply_chat_template(talk, chat_template=template, tokenize=False, **switches))

    shipped = shipped_template(source, options)
    assert text(shipped) == text(source, **options)
    assert text(shipped, think="own") == text(source, **{**options, "think": "own"})
    again = shipped_template(shipped, {"think": "new"})
    assert text(again) == text(source, **{**options, "think": "new"})
    assert shipped_template(source, {}) == source


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "a-b", "1a", "", "é", "true", "x %}{{ y"])
def test_a_switch_needs_a_name_that_a_template_can_read(name: str) -> None:
    with pytest.raises(ConfigError, match="template_options"):
        shipped_template("", {name: True})
