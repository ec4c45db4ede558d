"""Shapes from config.json, and those that ship."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, Gemma2Config, LlamaConfig

from qdpo.errors import ConfigError
from qdpo.families import known
from qdpo.families.config_fields import positions
from qdpo.families.family import FAMILIES
from qdpo.families.shapes import from_config, known_shape, of_model

QWEN: dict[str, Any] = {
    "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip


def test_a_config_gives_the_known_shape() -> None:
    assert from_config(QWEN, "here") == known_shape("Qwen/Qwen2.5-7B")
    assert from_config({"model_type": "x", "text_config": QWEN}, "here") == known_shape("Qwen/Qwen2.5-7B")


def test_known_shapes_agree_with_transformers_defaults() -> None:
    """Two classes whose defaults are the values of a released model."""
    assert from_config(LlamaConfig().to_dict(), "") == known_shape("meta-llama/Llama-2-7b-hf")
    assert from_config(Gemma2Config().to_dict(), "") == known_shape("google/gemma-2-2b")


def test_parameters_of_known_shapes_are_those_of_their_names() -> None:
    """Billions in a model's name, within what norms, biases and rounded names allow."""
    for name, billions in {
        "HuggingFaceTB/SmolLM2-135M": 0.135, "meta-llama/Llama-2-13b-hf": 13.0, "meta-llama/Meta-Llama-3-8B": 8.03,
        "mistralai/Mistral-Nemo-Instruct-2407": 12.2, "Qwen/Qwen2.5-14B": 14.8, "Qwen/Qwen2.5-32B": 32.8,
        "Qwen/Qwen3-4B": 4.0, "Qwen/Qwen3-32B": 32.8, "google/gemma-2-9b": 9.24, "microsoft/phi-4": 14.7,
        "HuggingFaceTB/SmolLM3-3B": 3.08, "allenai/OLMo-2-1124-13B": 13.7, "Qwen/Qwen2.5-0.5B": 0.494,
        "meta-llama/Llama-3.2-1B": 1.24, "meta-llama/Llama-3.2-3B": 3.21, "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1.1,
        "mistralai/Mistral-Small-3.2-24B-Instruct-2506": 23.6, "google/gemma-3-12b-it": 11.8,
    }.items():  # fmt: skip
        shape = known_shape(name)
        parameters = shape.linear_weights + shape.table_weights * (1 if shape.tied else 2)
        assert parameters / 1e9 == pytest.approx(billions, rel=0.012), name


@pytest.mark.parametrize("name", known.names())
def test_a_shape_ends_at_the_context_that_its_maker_states(name: str) -> None:
    try:
        shape = known_shape(name)
    except ConfigError as error:
        assert "There is no forecast for model_type=" in str(error) or "mixture-of-experts" in str(error)
        return
    assert shape.positions == known.facts(name).context


def test_what_a_config_leaves_out_is_as_in_the_class(tmp_path: Path) -> None:
    """google/gemma-3-4b-it states five numbers of its text part; the others are those of the class."""
    for name, family in FAMILIES.items():
        defaults = CONFIG_MAPPING[name]().to_dict() if family.defaults else {}
        assert {field: defaults[field] for field in family.defaults} == family.defaults, name
    stated = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    config = {"model_type": "gemma3", "text_config": {**stated, "sliding_window": 1024}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    shape, _ = of_model(str(tmp_path))
    assert shape == known_shape("google/gemma-3-4b-it") and shape.positions == 131072
    found = positions(config)
    assert found is not None and found.count == 131072


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    shape, source = of_model(str(tmp_path))
    assert shape == known_shape("Qwen/Qwen2.5-7B") and source.endswith("config.json")
    with pytest.raises(ConfigError, match=r"No config.json of model.path=someone/else .*`qdpo plan --fetch`"):
        of_model("someone/else")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 8}, r"no forecast for model_type='qwen2' of here without a trace of its layers"),
        ({"model_type": "bloom"}, r"no forecast for model_type='bloom' of here without a trace of its layers"),
        ({"hidden_size": None, "vocab_size": 0}, r"here lacks hidden_size, vocab_size"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_config({**QWEN, **change}, "here")
    if "model_type" in change:
        assert from_config({**QWEN, **change}, "here", like="qwen2") == known_shape("Qwen/Qwen2.5-7B")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not JSON"),
        ("[]", "holds no JSON object"),
        ('{"text_config": [1]}', r"text_config is \[1\], not an object"),
        (json.dumps({**QWEN, "num_key_value_heads": [2, 2]}), r"num_key_value_heads is \[2, 2\], not a whole number"),
        (json.dumps({**QWEN, "head_dim": "16"}), "head_dim is '16', not a whole number"),
    ],
)
def test_a_malformed_config_is_refused_by_its_file(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/config.json.*{said}"):
        of_model(str(tmp_path))


def test_an_infinite_rope_factor_scales_no_positions(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": float("inf")}
    (tmp_path / "config.json").write_text(json.dumps({**QWEN, "rope_scaling": rope, "max_position_embeddings": 64}))
    assert of_model(str(tmp_path))[0].positions == 64
