"""The first steps of a run find adapted layers that learn nothing, before they are saved as trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from qdpo.errors import ConfigError, VerificationError
from qdpo.model.policy import adapter, adapter_source
from qdpo.review.score import rescore
from qdpo.run.folder import RunDir
from qdpo.run.record import Result, read_record
from qdpo.train.step.reach import check_reach
from tests.conftest import Quiet, save_tiny_base, tiny_tokenizer
from tests.matrix.configs import TEXT, TINY, text_config

Train = Callable[..., tuple[Result, Quiet]]
A, B = "base_model.model.{}.lora_A.default.weight", "base_model.model.{}.lora_B.default.weight"
pytestmark = pytest.mark.filterwarnings("ignore")


def parameters(**slopes: float | None) -> dict[str, nn.Parameter]:
    """An A and a B a layer; B's gradient is filled with the number, or missing."""
    found = {}
    for layer, slope in slopes.items():
        for name in (A, B):
            found[name.format(layer)] = parameter = nn.Parameter(torch.zeros(2, 2))
            parameter.grad = None if slope is None else torch.full((2, 2), slope if name == B else 0.0)
    return found


def test_a_layer_without_a_gradient_is_named_at_once() -> None:
    assert check_reach(parameters(q=1.0, v=0.5), steps_before=0, last=True) == []
    with pytest.raises(VerificationError, match=r"1 adapted layers .* no gradient reaches them: tower\.q\."):
        check_reach(parameters(v=1.0, **{"tower.q": None}), steps_before=0, last=False)


def test_a_gradient_of_zero_is_decided_by_the_second_step() -> None:
    """Behind a block whose output is 0, as added ones are, the first step has a gradient of 0, and the second not."""
    assert check_reach(parameters(q=0.0, v=1.0), steps_before=0, last=False) == ["q"]
    for case in ({"steps_before": 1, "last": False}, {"steps_before": 0, "last": True}):
        with pytest.raises(VerificationError, match="is exactly 0: q"):
            check_reach(parameters(q=0.0, v=1.0), **case)


def folder_of(settings: dict[str, str]) -> RunDir:
    return RunDir(Path(settings["output.dir"]) / "run")


def test_a_dead_layer_ends_the_run_before_it_is_saved(
    train: Train, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its output is used without a gradient, as an indexer's is."""
    new = adapter.new_adapter

    def unused(base: Any, **options: Any) -> Any:
        model = new(base, **options)
        layer = model.get_base_model().model.layers[1].self_attn.v_proj
        layer.register_forward_hook(lambda _module, _inputs, output: output.detach())
        return model

    monkeypatch.setattr(adapter, "new_adapter", unused)
    with pytest.raises(VerificationError, match=r"1 adapted layers .*: model\.layers\.1\.self_attn\.v_proj\."):
        train(train__steps="3")
    run = folder_of(settings)
    assert not run.adapter.exists() and not list(run.checkpoints.glob("*"))


def test_added_blocks_of_zeros_are_trained(train: Train, settings: dict[str, str], tmp_path: Path) -> None:
    base = save_tiny_base(tmp_path / "grown")
    model = AutoModelForCausalLM.from_pretrained(base)
    block = model.model.layers[1]
    for layer in (block.self_attn.o_proj, block.mlp.down_proj):
        nn.init.zeros_(layer.weight)
    model.save_pretrained(base)
    _, said = train(model__path=str(base), model__quantization="none", train__steps="3")
    assert any(line.startswith("step 1: the gradient of 5 adapted layers, such as") for line in said.lines)
    with pytest.raises(VerificationError, match="5 adapted layers"):
        train(model__path=str(base), model__quantization="none", train__steps="1", output__name="one")


def test_what_is_adapted_is_said_and_recorded(train: Train, settings: dict[str, str]) -> None:
    _, said = train(train__steps="2")
    line = next(line for line in said.lines if line.startswith("adapter: "))
    assert line.startswith(
        "adapter: 14 linear layers (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj), 32,768 trained"
    )
    found = read_record(folder_of(settings)).found.adapted
    assert found is not None and len(found) == 14
    config = json.loads((folder_of(settings).adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert not config["target_parameters"]


def tiny_folder(family: str, folder: Path) -> Path:
    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(text_config(TEXT[family], TINY, **ids), dtype=torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["falcon_h1", "nemotron_h"])
def test_state_space_models_train_with_defaults(
    family: str, train: Train, settings: dict[str, str], tmp_path: Path
) -> None:
    base = tiny_folder(family, tmp_path / family)
    _, said = train(model__path=str(base), train__steps="2", model__dtype="fp32")
    assert any("left alone: state-space output" in line for line in said.lines)
    assert folder_of(settings).adapter.is_dir()


def test_a_run_goes_on_with_the_layers_that_it_began_with(
    train: Train, settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later version may choose others."""
    train(train__steps="2", data__eval_limit="4")
    run = folder_of(settings)
    before = (run.adapter / "adapter_model.safetensors").read_bytes()
    run.result.unlink()

    def other(*_: Any, **__: Any) -> Any:
        raise AssertionError("the layers were chosen again")

    monkeypatch.setattr(adapter, "lora_targets", other)
    train(train__steps="2", data__eval_limit="4")
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.slow
def test_a_run_of_0_1_keeps_the_layers_that_peft_chose(
    train: Train, settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record names none: a mixture of experts goes on with experts and router, and is scored."""
    base = tiny_folder("qwen3_moe", tmp_path / "moe")
    options = {"model__path": str(base), "train__steps": "2", "data__limit": "8"}
    with monkeypatch.context() as patched:
        patched.setattr(adapter_source, "check_adapter", lambda *_, **__: None)
        train(**options)
    run = folder_of(settings)
    assert read_record(run).found.adapted is None
    before = (run.adapter / "adapter_model.safetensors").read_bytes()
    assert sorted(json.loads((run.adapter / "adapter_config.json").read_text())["target_parameters"]) == [
        "down_proj", "gate.weight", "gate_up_proj",
    ]  # fmt: skip
    assert rescore(run.path, [], Quiet()).pairs > 0
    run.result.unlink()
    train(**options)
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == before


def test_a_router_by_name_is_refused_before_loading(train: Train, settings: dict[str, str], tmp_path: Path) -> None:
    base = tiny_folder("llama4 (text)", tmp_path / "llama4")
    with pytest.raises(ConfigError, match=r"adapter\.targets names router.*decides which experts"):
        train(model__path=str(base), adapter__targets="q_proj+router")
