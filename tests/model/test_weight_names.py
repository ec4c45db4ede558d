"""The tensor that each layer's weight is read from, and the layer of the served class that reads the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from qdpo.errors import ConfigError
from qdpo.export.proof.served import bare_model
from qdpo.model.base.weight_names import float32_parameters, folder_names, served_class, served_skeleton
from tests.export.runs import save_base
from tests.model.families import SEPARATE, SHARED, SIZE
from tests.model.multimodal import save_folder, whole_model

PLAIN = ("gpt2", "mixtral", "phi3", "gpt-neox", "gemma3-window")
MOE = {**SIZE, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.mark.parametrize("family", [*PLAIN, "qwen3-next"])
def test_the_named_tensor_is_the_weight_that_transformers_loads(tmp_path: Path, family: str) -> None:
    base = save_base(tmp_path / "base", {**SHARED, **SEPARATE}[family]())
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    stored = load_file(base / "model.safetensors")
    names = folder_names(base)
    layers = [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not model.get_output_embeddings()
    ]
    assert layers
    for layer, key in names.in_files(layers).items():
        assert torch.equal(stored[key], model.get_submodule(layer).weight), layer
    assert not names.trained.others and names.is_served_as_trained
    joined = {key for name in names.trained.converted for key in names.trained.sources[name]}
    assert all(".experts." in key for key in joined) and bool(joined) == (family in ("mixtral", "qwen3-next"))


@pytest.mark.parametrize("names", ["saved", "outer", "inner"])
def test_a_part_has_the_names_of_its_files_and_of_the_whole_class(tmp_path: Path, names: Any) -> None:
    base = save_folder(whole_model("gemma3"), tmp_path / "base", names)
    found = folder_names(base)
    layer = "model.layers.1.mlp.up_proj"
    beginning = "model.language_model." if names == "inner" else "language_model.model."
    assert found.text.cls is hf.Gemma3ForCausalLM and found.served is hf.Gemma3ForConditionalGeneration
    assert found.in_files([layer]) == {layer: f"{beginning}layers.1.mlp.up_proj.weight"}
    served = served_skeleton(found)
    assert found.on_servers(served, [layer]) == {layer: "model.language_model.layers.1.mlp.up_proj"}
    assert all("vision" in name or "projector" in name for name in found.trained.others) and found.trained.others


def test_layers_of_another_base_are_named(tmp_path: Path) -> None:
    found = folder_names(save_base(tmp_path / "base", hf.LlamaConfig(**SIZE)))
    lost = ["gpt_neox.layers.0.mlp.up", "gpt_neox.layers.1.mlp.up"]
    with pytest.raises(ConfigError, match=r"do not hold .*: gpt_neox.layers.0.mlp.up.weight and 1 more"):
        found.in_files([*lost, "model.layers.0.mlp.up_proj"])
    with pytest.raises(ConfigError, match="belongs to another base"):
        found.on_servers(served_skeleton(found), lost)


def test_a_weight_that_is_made_at_load_is_told_from_one_that_is_missing(tmp_path: Path) -> None:
    config = hf.AutoConfig.for_model("hrm_text", **SIZE)
    found = folder_names(save_base(tmp_path / "base", config))
    made = next(name.removesuffix(".weight") for name in found.trained.converted if name.endswith("proj.weight"))
    with pytest.raises(ConfigError, match=f"{made} cannot be merged: transformers makes its weight at load from"):
        found.in_files([made])


def test_what_transformers_keeps_in_float32_is_known() -> None:
    config = hf.DeepseekV3Config(
        **MOE, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, n_group=1, topk_group=1,
    )  # fmt: skip
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    kept = float32_parameters(model, torch.bfloat16)
    assert "model.layers.1.mlp.gate.e_score_correction_bias" in kept
    assert not any("proj" in name for name in kept) and not float32_parameters(model, torch.float32)


@pytest.mark.parametrize("named", [None, [], ["NoSuchForCausalLM"], ["LlamaModel"], [3], "LlamaForCausalLM"])
def test_a_class_that_servers_cannot_load_is_none(named: Any) -> None:
    assert served_class({"architectures": named}) is None
    assert served_class({"architectures": ["LlamaForCausalLM"]}) is hf.LlamaForCausalLM


def test_a_text_model_that_names_the_whole_class_is_served_as_it_is(tmp_path: Path) -> None:
    """As one that was cut out of a multimodal checkpoint and kept its `architectures`."""
    base = save_base(tmp_path / "base", SHARED["gemma3-window"]())
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["Gemma3ForConditionalGeneration"]}))
    found = folder_names(base)
    assert found.served is hf.Gemma3ForCausalLM and found.is_served_as_trained
    assert type(bare_model(str(base))) is hf.Gemma3ForCausalLM
