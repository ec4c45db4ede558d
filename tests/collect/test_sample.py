"""`qdpo sample`: distinct answers with their origin, and a file that goes on where it was stopped."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdpo.collect import sample as sample_module
from qdpo.collect.answering_model import Sampler, base_sampler, run_sampler
from qdpo.collect.candidates import read_candidates
from qdpo.collect.sample import Sampled, SamplingParameters, read_prompts, sample
from qdpo.errors import ConfigError, DataError, OutOfMemoryError
from tests.conftest import Quiet, arguments, qdpo, tiny_rows, write_jsonl
from tests.model.multimodal import CONFIGS

DRAWING = SamplingParameters(n=3, temperature=1.5, max_new_tokens=8)


@pytest.fixture
def words(settings: dict[str, str]) -> list[str]:
    """The tiny base in fp32."""
    wanted = ("model.", "cache.")
    return arguments({name: value for name, value in settings.items() if name.startswith(wanted)})


@pytest.fixture
def sampler(words: list[str]) -> Sampler:
    return base_sampler(words, Quiet())


@pytest.fixture
def prompts(tmp_path: Path) -> list[Any]:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"tell me about {row['prompt']}\n" for row in tiny_rows(7)))
    return read_prompts(str(path), None, None, Quiet())


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_each_prompt_gets_distinct_answers_that_say_where_they_came_from(
    sampler: Sampler, prompts: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "c.jsonl"
    found = sample(sampler, prompts, out, DRAWING, Quiet())
    lines = written(out)
    assert [line["prompt"][0]["content"] for line in lines] == [prompt.turns[0]["content"] for prompt in prompts]
    for line in lines:
        assert len({answer["text"] for answer in line["answers"]}) == 3 == len({a["seed"] for a in line["answers"]})
        assert {json.dumps(answer["from"]) for answer in line["answers"]} == {json.dumps(sampler.origin.to_json())}
    cut = sum(answer.get("cut", False) for line in lines for answer in line["answers"])
    assert (found.answers, found.cut, found.short) == (21, cut, 0) and cut > 0
    assert len(read_candidates([out]).items) == 7


@pytest.mark.parametrize("batch", [1, 4])
def test_stopped_and_continued_is_the_same_file(
    sampler: Sampler, prompts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Also with another batch size, and with a last line torn in the middle."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "c.jsonl"
    sample(sampler, prompts, whole, DRAWING, Quiet())
    monkeypatch.setitem(sample_module.MOST_AT_ONCE, "cpu", batch)
    draws, draw = [0], sample_module.draw

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        draws[0] += 1
        if draws[0] * batch > 12:
            raise KeyboardInterrupt
        return draw(*arguments, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample_module, "draw", interrupted)
        sample(sampler, prompts, out, DRAWING, Quiet())
    kept = written(out)
    assert 0 < len(kept) < 7
    with out.open("a") as file:
        file.write('{"prompt": "torn')
    watcher = Quiet()
    found = sample(sampler, prompts, out, DRAWING, watcher)
    assert out.read_bytes() == whole.read_bytes() and found.before == len(kept)
    assert (
        "is incomplete (after a crash)" in watcher.text and f"{len(kept)} prompts are answered already" in watcher.text
    )
    assert sample(sampler, prompts, out, DRAWING, Quiet()) == Sampled(prompts=7, before=7)


def test_more_prompts_later_are_added(sampler: Sampler, prompts: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    sample(sampler, prompts[:3], out, DRAWING, Quiet())
    first = out.read_bytes()
    sample(sampler, prompts, out, DRAWING, Quiet())
    assert out.read_bytes().startswith(first) and len(written(out)) == 7


def test_answers_said_already_are_drawn_anew_and_then_given_up(
    sampler: Sampler, prompts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of numbers that repeat, a model that says one thing makes one answer, and each prompt is asked three times."""
    asked: list[int] = []
    draw = sample_module.draw

    def same(model: Any, tokenizer: Any, draws: Any, **settings: Any) -> Any:
        asked.append(len(draws))
        return [draw(model, tokenizer, [sample_module.Draw(one.prompt, 1)], **settings)[0] for one in draws]

    monkeypatch.setattr(sample_module, "draw", same)
    found = sample(sampler, prompts[:1], tmp_path / "c.jsonl", DRAWING, Quiet())
    assert asked == [3, 2, 2] and (found.answers, found.repeated, found.short) == (1, 6, 1)
    assert any("a higher --temperature" in line for line in found.lines())
    with pytest.raises(DataError, match="no prompt with two different answers"):
        read_candidates([tmp_path / "c.jsonl"])


def test_a_model_that_says_nothing_is_told_of(
    sampler: Sampler, prompts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_module, "draw", lambda *_, **__: [sample_module.Drawn([], False)] * len(_[2]))
    lines = "\n".join(sample(sampler, prompts[:2], tmp_path / "c.jsonl", DRAWING, Quiet()).lines())
    assert "0 answers to 2 prompts" in lines and "18 empty answers" in lines and "nothing to do" not in lines


@pytest.mark.parametrize("change", [{"temperature": 0.7}, {"n": 2}, {"seed": 1}, {"max_new_tokens": 9}])
def test_a_file_drawn_otherwise_is_not_mixed_with(
    sampler: Sampler, prompts: list[Any], tmp_path: Path, change: dict[str, Any]
) -> None:
    out = tmp_path / "c.jsonl"
    sample(sampler, prompts[:2], out, DRAWING, Quiet())
    before = out.read_bytes()
    with pytest.raises(ConfigError, match=f"line 1 was drawn with {next(iter(change))}=.*another --out"):
        sample(sampler, prompts, out, SamplingParameters(**{**vars(DRAWING), **change}), Quiet())
    assert out.read_bytes() == before


def test_less_memory_than_thought_halves_the_batch(
    sampler: Sampler, prompts: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tmp_path / "whole.jsonl"
    sample(sampler, prompts, whole, DRAWING, Quiet())
    room, draw = [5], sample_module.draw

    def small(model: Any, tokenizer: Any, draws: Any, **settings: Any) -> Any:
        if len(draws) > room[0]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return draw(model, tokenizer, draws, **settings)

    monkeypatch.setattr(sample_module, "draw", small)
    watcher = Quiet()
    sample(sampler, prompts, tmp_path / "c.jsonl", DRAWING, watcher)
    assert (tmp_path / "c.jsonl").read_bytes() == whole.read_bytes()
    assert "not enough memory: 10 answers at a time" in watcher.text and "5 answers at a time" in watcher.text
    room[0] = 0
    with pytest.raises(OutOfMemoryError, match="smaller --max-new-tokens"):
        sample(sampler, prompts, tmp_path / "d.jsonl", DRAWING, Quiet())


def test_a_batch_is_what_memory_allows(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    one = sample_module.bytes_an_answer(sampler.model.config, 4, 100, 8)
    # Keys and values of two layers and a copy of one, two heads of 16 numbers, 108 tokens; and logits.
    assert one == 2 * 3 * 2 * 16 * 4 * 108 + 48 * sampler.model.config.vocab_size
    wide = CONFIGS["gemma4"]()  # two layers of 2 heads of 16, two of 2 heads of 512
    assert sample_module.bytes_an_answer(wide, 4, 100, 8) == 2 * 5 * 2 * 512 * 4 * 108 + 48 * 408
    monkeypatch.setattr(sample_module.auto_memory, "available", lambda device: 10.5 * one / 0.8)
    assert sample_module._at_once(sampler, 100, DRAWING) == 10


def test_a_prompt_that_is_too_long_is_named(sampler: Sampler, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "short"}, {"prompt": "river " * 2100}])
    prompts = read_prompts(str(path), None, None, Quiet())
    with pytest.raises(DataError, match=r"p\.jsonl line 2 has .* tokens; with 8 more"):
        sample(sampler, prompts, tmp_path / "c.jsonl", DRAWING, Quiet())


def test_prompts_come_from_whatever_the_data_layer_reads(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "one"}]
    hh = {"chosen": "\n\nHuman: four\n\nAssistant: a", "rejected": "\n\nHuman: four\n\nAssistant: b"}
    files = {
        "text": ([{"question": "one"}, {"question": "two"}, {"question": "one"}], ["one", "two"]),
        "messages": ([{"messages": turns}], ["one"]),
        "dialogue": ([{"prompt": "Human: three\n\nAssistant:"}], ["three"]),
        "pairs": ([hh], ["four"]),
    }
    for name, (rows, expected) in files.items():
        watcher = Quiet()
        found = read_prompts(str(write_jsonl(tmp_path / f"{name}.jsonl", rows)), None, None, watcher)
        assert [prompt.turns[-1]["content"] for prompt in found] == expected
        assert ("1 prompts are repeated" in watcher.text) == (name == "text")
    assert len(read_prompts("bundled:demo-held-out.jsonl", None, 5, Quiet())) == 5
    with pytest.raises(DataError, match="--column=nope: .* Its columns are: question"):
        read_prompts(str(tmp_path / "text.jsonl"), "nope", None, Quiet())
    with pytest.raises(DataError, match=r"b\.jsonl line 2: prompt is empty"):
        read_prompts(str(write_jsonl(tmp_path / "b.jsonl", [{"prompt": "p"}, {"prompt": " "}])), None, None, Quiet())


def test_the_system_message_that_was_used_is_written(words: list[str], prompts: list[Any], tmp_path: Path) -> None:
    sampler = base_sampler([*words, "data.system=be brief"], Quiet())
    sample(sampler, prompts[:1], tmp_path / "c.jsonl", DRAWING, Quiet())
    assert written(tmp_path / "c.jsonl")[0]["prompt"][0] == {"role": "system", "content": "be brief"}


def test_a_base_without_a_template_goes_on_with_text_and_refuses_conversations(
    sampler: Sampler, prompts: list[Any], tmp_path: Path
) -> None:
    sampler.tokenizer.chat_template = None
    sample(sampler, prompts[:1], tmp_path / "c.jsonl", DRAWING, Quiet())
    assert written(tmp_path / "c.jsonl")[0]["prompt"] == prompts[0].turns[0]["content"]
    path = write_jsonl(tmp_path / "chat.jsonl", [{"prompt": [{"role": "user", "content": "hello"}]}])
    with pytest.raises(DataError, match="has no chat template"):
        sample(sampler, read_prompts(str(path), None, None, Quiet()), tmp_path / "d.jsonl", DRAWING, Quiet())


def test_a_trained_run_answers_otherwise_and_says_so(
    train: Callable[..., Any], sampler: Sampler, prompts: list[Any], tmp_path: Path
) -> None:
    train(train__steps="8", train__learning_rate="1e-2")
    tuned = run_sampler(tmp_path / "runs" / "run", [], Quiet())
    sample(sampler, prompts, tmp_path / "base.jsonl", DRAWING, Quiet())
    sample(tuned, prompts, tmp_path / "tuned.jsonl", DRAWING, Quiet())
    one, other = ([[a["text"] for a in line["answers"]] for line in written(tmp_path / f"{name}.jsonl")]
                  for name in ("base", "tuned"))  # fmt: skip
    assert one != other
    origin = written(tmp_path / "tuned.jsonl")[0]["answers"][0]["from"]
    assert origin["run"] == "run" and len(origin["adapter"]) == 64 and origin["weights"] == sampler.origin.weights
    with pytest.raises(ConfigError, match=", not of .* with run as it is loaded now"):
        sample(tuned, prompts, tmp_path / "base.jsonl", DRAWING, Quiet())


def test_the_adapter_that_training_would_start_from_answers(
    train: Callable[..., Any], words: list[str], prompts: list[Any], tmp_path: Path
) -> None:
    """The same answers as those of the run that made it."""
    train(train__steps="8", train__learning_rate="1e-2")
    run = tmp_path / "runs" / "run"
    started = base_sampler([*words, f"adapter.start={run / 'adapter'}"], Quiet())
    tuned = run_sampler(run, [], Quiet())
    assert started.origin.adapter == tuned.origin.adapter and started.origin.run == "run/adapter"
    for name, sampler in (("started", started), ("tuned", tuned)):
        sample(sampler, prompts, tmp_path / f"{name}.jsonl", DRAWING, Quiet())
    one, other = ([[a["text"] for a in line["answers"]] for line in written(tmp_path / f"{name}.jsonl")]
                  for name in ("started", "tuned"))  # fmt: skip
    assert one == other
    with pytest.raises(ConfigError, match="is not an adapter folder"):
        base_sampler([*words, f"adapter.start={tmp_path}"], Quiet())


def test_the_command_line(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("tell me about the river\n\ntell me about the stone\n")
    command = ["sample", "p.txt", "--out", "c.jsonl", "--max-new-tokens", "8", "--n", "2", *words]
    found = qdpo(*command, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "4 answers to 2 prompts" in found.stdout and "qdpo label c.jsonl" in found.stdout
    again = qdpo(*command, cwd=tmp_path)
    assert "nothing to do: all 2 prompts are answered" in again.stdout
    refused = qdpo(*command, "--seed", "3", cwd=tmp_path)
    assert refused.returncode == 2 and "drawn with seed=0, but this command has seed=3" in refused.stderr
