"""What a run decided about the conversation ships: template, end of answers; with a base that has another or none."""

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from qdpo.errors import ConfigError
from qdpo.export import push, targets
from qdpo.export.merge.merge import merge_run
from qdpo.export.targets import Order
from qdpo.export.trained import TrainedRun, trained_run
from qdpo.run.folder import RunDir
from qdpo.settings import layered
from qdpo.train.loop import run_training
from tests.conftest import CHATML, Quiet, arguments, save_tiny_base, tiny_rows, tiny_tokenizer, write_jsonl

END, IM_END = 0, 2
OWN = CHATML.replace("{% for", "{% if messages[0].role != 'system' %}You are old.\n{% endif %}{% for", 1)
TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


def make_trained(folder: Path, template: Any, **changes: str) -> TrainedRun:
    """A finished run over a base whose text ends with <|end|>, with this template; trained on ChatML."""
    base = save_tiny_base(folder / "base", eos_token_id=END)
    (base / "chat_template.jinja").unlink()
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = "<|end|>", template
    tokenizer.save_pretrained(base)
    settings = {
        "model.path": str(base),
        "model.quantization": "none",
        "model.dtype": "fp32",
        "model.device": "cpu",
        "data.path": str(write_jsonl(folder / "pairs.jsonl", tiny_rows(8))),
        "data.template": "chatml",
        "data.eval_fraction": "0.3",
        "train.steps": "1",
        "train.optimizer": "adamw",
        "samples.count": "0",
        "output.dir": str(folder / "runs"),
        "output.name": "run",
        "cache.dir": str(folder / "cache"),
    }
    run_training(layered.resolve(arguments(settings, **changes)), Quiet())
    return trained_run(folder / "runs" / "run")


@pytest.fixture(scope="module", params=["none", "old", "several"])
def shipped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainedRun]:
    template = {"none": None, "old": OWN, "several": {"default": OWN, "tool_use": OWN + "x"}}[request.param]
    trained = make_trained(tmp_path_factory.mktemp("ship"), template)
    merge_run(trained.run, trained.run.merged, base="dequantized", dtype=None, watcher=Quiet())
    yield trained


def order(trained: TrainedRun, out: Path | None = None, **changes: Any) -> tuple[Order, list[str]]:
    said: list[str] = []
    settings = {"quant": "f32", "merged": None, "lora": False, "name": "tuned", "force": True, **changes}
    return Order(trained=trained, out=out, say=said.append, **settings), said


def chat(tokenizer: Any) -> str:
    return str(tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True))


def trained_text(trained: TrainedRun) -> str:
    return chat(AutoTokenizer.from_pretrained(trained.run.adapter))


def test_the_merged_model_chats_and_stops_as_trained(shipped: TrainedRun) -> None:
    merged = shipped.run.merged
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert chat(tokenizer) == trained_text(shipped) and "You are old" not in chat(tokenizer)
    assert tokenizer.eos_token == "<|im_end|>" and isinstance(tokenizer.chat_template, str)
    assert set(GenerationConfig.from_pretrained(merged).eos_token_id) == {END, IM_END}
    assert set(json.loads((merged / "config.json").read_text())["eos_token_id"]) == {END, IM_END}
    model = AutoModelForCausalLM.from_pretrained(merged)
    with torch.no_grad():
        model.lm_head.weight[:] = 0
        model.lm_head.weight[IM_END] = 1  # any state with a positive sum ends
        model.model.norm.weight[:] = 0
        model.model.norm.register_forward_hook(lambda _module, _inputs, output: torch.ones_like(output))
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(ids, max_new_tokens=9, do_sample=False)[0].tolist() == [5, 6, 7, IM_END]


def test_a_gguf_has_the_trained_template_and_end(shipped: TrainedRun, tmp_path: Path) -> None:
    what, _ = order(shipped, tmp_path / "model.gguf")
    targets.export_gguf(what)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    source = fields["tokenizer.chat_template"].contents()
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    assert chat(tokenizer) == trained_text(shipped)
    ends = {
        fields[name].contents() for name in fields if name.endswith(("eos_token_id", "eot_token_id", "eom_token_id"))
    }
    assert ends == {END, IM_END}


@pytest.mark.parametrize("lora", [False, True])
def test_a_modelfile_has_the_trained_template_and_ends(shipped: TrainedRun, tmp_path: Path, lora: bool) -> None:
    what, _ = order(shipped, tmp_path / "ollama", lora=lora)
    targets.export_ollama(what)
    text = (tmp_path / "ollama" / "Modelfile").read_text()
    assert "You are old" not in text and "<|im_start|>" in text
    assert 'PARAMETER stop "<|im_end|>"' in text and 'PARAMETER stop "<|end|>"' in text


def test_vllm_is_told_what_the_base_does_not_say(shipped: TrainedRun) -> None:
    what, said = order(shipped)
    targets.export_vllm(what)
    assert "--chat-template" not in said[-1] and "--generation-config" not in said[-1]
    what, said = order(shipped, lora=True)
    targets.export_vllm(what)
    words = shlex.split(said[-1])
    template = Path(words[words.index("--chat-template") + 1])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template.read_text()
    assert chat(tokenizer) == trained_text(shipped)
    ends = GenerationConfig.from_pretrained(words[words.index("--generation-config") + 1]).eos_token_id
    assert set(ends) == {END, IM_END}


def as_merged_before(trained: TrainedRun, folder: Path) -> Path:
    """A merged model as versions before 0.2 wrote it: with the base's conversation."""
    shutil.copytree(trained.run.merged, folder)
    (folder / "chat_template.jinja").unlink()
    base = Path(trained.record.base.folder)
    for path in base.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copyfile(path, folder / path.name)
    return folder


def test_a_model_merged_before_ships_the_trained_conversation(shipped: TrainedRun, tmp_path: Path) -> None:
    merged = as_merged_before(shipped, tmp_path / "merged")
    what, said = order(shipped, tmp_path / "model.gguf", merged=merged)
    targets.export_gguf(what)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert "You are old" not in fields["tokenizer.chat_template"].contents()
    assert fields["tokenizer.ggml.eos_token_id"].contents() == IM_END and "chat template and end token" in said[0]
    what, said = order(shipped, merged=merged)
    targets.export_vllm(what)
    assert "--chat-template" in said[-1] and "--generation-config" in said[-1]


def test_an_older_merged_model_is_not_pushed(
    shipped: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "_full_name", lambda repo: repo)
    run = RunDir(shutil.copytree(shipped.run.path, tmp_path / "run"))
    shutil.rmtree(run.merged)
    as_merged_before(shipped, run.merged)
    with pytest.raises(ConfigError, match="qdpo merge"):
        push.pack(trained_run(run.path), "me/model", merged=True, public=False, say=lambda line: None)


def test_bare_text_is_served_as_such(tmp_path: Path) -> None:
    trained = make_trained(tmp_path, OWN, data__template="plain")
    merge_run(trained.run, trained.run.merged, base="dequantized", dtype=None, watcher=Quiet())
    assert AutoTokenizer.from_pretrained(trained.run.merged).chat_template is None
    what, said = order(trained, lora=True)
    targets.export_vllm(what)
    assert any("bare text" in line for line in said) and "--chat-template" not in said[-1]
    what, _ = order(trained, tmp_path / "ollama")
    with pytest.raises(ConfigError, match="bare text"):
        targets.export_ollama(what)
