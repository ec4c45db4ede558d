"""data.max_tokens and the positions of a model: lowered and said, refused, or warned about; never passed over."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from qdpo.data.positions import within_positions
from qdpo.errors import ConfigError
from qdpo.families import known
from qdpo.families.config_fields import Positions, positions
from qdpo.forecast.model_table import fit_table
from qdpo.run.record import Result
from qdpo.settings import layered
from tests.conftest import Quiet, qdpo, save_tiny_base, tiny_rows, tiny_tokenizer, write_jsonl

TABLE, ROTARY = Positions(64, has_table=True), Positions(64, has_table=False)
LONG = [{**row, "rejected": f"{row['rejected']} {row['rejected']}"} for row in tiny_rows(24)]


def save_with_table(folder: Path, kind: str) -> Path:
    """A tiny model of 64 positions, each of which has a row of its own."""
    tokenizer = tiny_tokenizer()
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    if kind == "gpt2":
        model: Any = GPT2LMHeadModel(GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2, **ids))
    else:
        model = OPTForCausalLM(
            OPTConfig(
                max_position_embeddings=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
                word_embed_proj_dim=32, **ids,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "gpt2", "n_positions": 1024}, Positions(1024, has_table=True)),
        ({"model_type": "opt", "max_position_embeddings": 2048}, Positions(2048, has_table=True)),
        ({"model_type": "llama", "max_position_embeddings": 8192}, Positions(8192, has_table=False)),
        ({"model_type": "llama", "max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}},
         Positions(16384, has_table=False)),
        ({"model_type": "qwen2", "max_position_embeddings": 32768,
          "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
         Positions(131072, has_table=False)),
        ({"model_type": "llama", "max_position_embeddings": 131072,
          "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}},
         Positions(131072, has_table=False)),
        ({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "max_position_embeddings": 131072,
          "rope_scaling": {"rope_type": "linear", "factor": 8.0}}}, Positions(131072, has_table=False)),
        ({"model_type": "bloom", "seq_length": 2048}, None),
        ({"model_type": "mamba"}, None),
        ({"model_type": "llama", "max_position_embeddings": "many"}, None),
        ({"model_type": "llama", "max_position_embeddings": -1}, None),
    ],
)  # fmt: skip
def test_positions_are_read_as_scaled(config: dict[str, Any], expected: Positions | None) -> None:
    assert positions(config) == expected


def test_transformers_own_configs_say_the_same() -> None:
    assert positions(GPT2Config(n_positions=77)) == Positions(77, has_table=True)
    assert positions(OPTConfig(max_position_embeddings=77)) == Positions(77, has_table=True)


@pytest.mark.parametrize("limit", [TABLE, ROTARY])
@pytest.mark.parametrize("words", [[], ["preset=demo"]])
def test_what_nobody_set_is_lowered_and_said(limit: Positions, words: list[str]) -> None:
    said: list[str] = []
    found = within_positions(layered.resolve([*words, "model.path=m", "data.path=d"]), limit, said.append)
    assert found.data.max_tokens == 64 and len(said) == 1 and said[0].startswith("data.max_tokens: 64")


def test_what_was_set_by_hand_is_refused_or_warned_about() -> None:
    resolved, said = layered.resolve(["model.path=m", "data.path=d", "data.max_tokens=65"]), list[str]()
    with pytest.raises(ConfigError, match=r"data\.max_tokens=65 \(the command line\).*64 positions"):
        within_positions(resolved, TABLE, said.append)
    assert not said
    assert within_positions(resolved, ROTARY, said.append).data.max_tokens == 65
    assert len(said) == 1 and said[0].startswith("warning: ")
    kept = layered.resolve(["model.path=m", "data.path=d", "data.max_tokens=64"])
    assert within_positions(kept, TABLE, said.append) is kept.config and len(said) == 1


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_a_model_with_a_table_trains_on_longer_pairs(
    kind: str, tmp_path: Path, train: Callable[..., tuple[Result, Quiet]]
) -> None:
    base, data = save_with_table(tmp_path / kind, kind), write_jsonl(tmp_path / "long.jsonl", LONG)
    words = {"model__path": str(base), "data__path": str(data), "train__steps": "2", "samples__max_new_tokens": "80",
             "memory__tokens_per_row": "300", "data__max_drop_fraction": "1"}  # fmt: skip
    result, watcher = train(**words)
    assert result.steps == 2 and watcher.text.count("data.max_tokens: 64, the positions of") == 1
    assert watcher.text.count("accuracy will mean nothing below 50") == 1
    with pytest.raises(ConfigError, match="64 positions"):
        train(**words, data__max_tokens="65", output__name="other")


def test_a_check_knows_the_positions(tmp_path: Path) -> None:
    base, data = save_tiny_base(tmp_path / "base", max_position_embeddings=64), tmp_path / "long.jsonl"
    write_jsonl(data, LONG)
    found = qdpo("data", "check", str(data), f"model.path={base}", "data.max_drop_fraction=1", cwd=tmp_path)
    assert found.returncode == 0 and "data.max_tokens: 64, the positions of" in found.stdout, found.stderr


def test_fit_promises_no_pair_beyond_the_positions() -> None:
    for fit in fit_table(140e9, card="rtx-4090", longest=2000, mean=600):
        assert fit.longest_pair <= (known.facts(fit.model).context or 0)


def test_a_plan_ends_at_the_positions(tmp_path: Path) -> None:
    found = qdpo("plan", "preset=7b-24gb", "model.path=google/gemma-2-9b", "data.max_tokens=60000", cwd=tmp_path)
    assert "above the 8,192 positions" in found.stdout, found.stderr
