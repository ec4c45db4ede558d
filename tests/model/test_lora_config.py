"""Every field of PEFT's LoraConfig has a decision: kept, without effect, or refused where it is on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors.torch import save_file

from qdpo.errors import ConfigError
from qdpo.model.policy.lora_config import INERT, KEPT, OFF, WEIGHTS, check_adapter_folder
from tests.model.adapters import edited, write_config

DEFAULTS = json.loads(json.dumps(LoraConfig().to_dict(), default=list))
# For each field a value that the file of another kit may hold.
ON: dict[str, list[Any]] = {
    "bias": ["all", "lora_only", None, 1],
    "modules_to_save": [["lm_head"], ["embed_tokens", "lm_head"], "lm_head"],
    "trainable_token_indices": [[1, 2], {"embed_tokens": [3]}],
    "use_dora": [True, "yes", 1],
    "use_qalora": [True],
    "lora_bias": [True],
    "layer_replication": [[[0, 2], [1, 2]]],
    "megatron_config": [{"tensor_model_parallel_size": 2}],
    "velora_config": [{"num_groups": 8, "scale": 1.0, "init_type": "random"}],
    "monteclora_config": [{"num_samples": 4}],
    "kasa_config": [{"beta": 1e-4}],
    "use_bdlora": [{"target_modules_bd_a": ["q_proj"], "nblocks": 2}],
    "arrow_config": [{"top_k": 2}],
    "alora_invocation_tokens": [[5, 6]],
    "ensure_weight_tying": [True],
    "init_lora_weights": [
        "olora", "OLoRA", "pissa", "pissa_niter_16", "corda", "loftq", "lora_ga", "mica", "true", "later", 1, [True],
    ],
    "task_type": ["SEQ_CLS", "SEQ_2_SEQ_LM", "TOKEN_CLS", "FEATURE_EXTRACTION", 3],
    "peft_type": ["LOHA", "ADALORA", "PREFIX_TUNING", "IA3", "lora", None, 7, ["LORA"]],
    "r": [0, -4, 2.5, "8", None, True, 10**40, [8]],
    "lora_alpha": [0, -1, "16", None, True, float("nan"), float("inf"), 1e300, [16]],
    "lora_dropout": [1.5, -0.1, "0.1", float("nan"), True],
    "use_rslora": [1, "true", []],
    "target_modules": [None, [], "", [""], [1], {"q_proj": 1}, 5, True, [None]],
    "exclude_modules": [5, [1], {"q_proj": 1}, True],
    "layers_to_transform": ["1", [1.5], ["1"], True, {"0": 1}],
    "layers_pattern": [7, [7], {"layers": 1}, "layers"],
    "rank_pattern": [{"q_proj": 0}, {"q_proj": "4"}, ["q_proj"], {"": 4}, {"q_proj": True}, 4],
    "alpha_pattern": [{"q_proj": 0}, {"q_proj": float("nan")}, ["q_proj"], 4],
    "fan_in_fan_out": ["false", 1],
    "target_parameters": ["mlp.experts", [1], {"a": 1}],
    "base_model_name_or_path": [5, ["a"], {}, True],
    "revision": [7, ["main"]],
    "inference_mode": ["true", 1],
    "auto_mapping": ["LlamaForCausalLM", [1]],
    "peft_version": [0.21, ["0.21"]],
    "megatron_core": [1, ["megatron"]],
    "loftq_config": ["x", [1]],
    "eva_config": ["x", 1],
    "corda_config": ["x", 1],
    "lora_ga_config": ["x", 1],
    "runtime_config": ["x", 1],
    "qalora_group_size": ["16", 1.5],
}  # fmt: skip


@pytest.mark.parametrize("name", sorted({field.name for field in dataclasses.fields(LoraConfig)}))
def test_every_field_of_this_peft_is_decided(name: str, tmp_path: Path) -> None:
    """A field that is new in a later PEFT fails here until someone has read what it does."""
    assert [name in table for table in (KEPT, INERT, OFF)].count(True) == 1, f"decide what {name} means for a run"
    assert ON[name], "try what is refused, or is of another type"
    for value in ON[name]:
        write_config(tmp_path, **{name: value})
        with pytest.raises(ConfigError) as refused:
            check_adapter_folder(tmp_path)
        message = str(refused.value)
        assert "adapter_config.json" in message and name in message, message


def test_the_tables_name_no_field_that_peft_lacks() -> None:
    assert {*KEPT, *INERT, *OFF} == {field.name for field in dataclasses.fields(LoraConfig)} == set(ON)


def test_what_peft_writes_by_default_passes(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert check_adapter_folder(tmp_path)["r"] == 8
    for name, value in DEFAULTS.items():
        if name not in ("r", "target_modules", "lora_alpha", "peft_type"):
            edited(write_config(tmp_path), **{name: value})
            check_adapter_folder(tmp_path)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_a_field_of_a_later_peft_passes_where_it_is_off(value: Any, tmp_path: Path) -> None:
    write_config(tmp_path, variant_of_2027=value)
    assert "variant_of_2027" not in check_adapter_folder(tmp_path)


@pytest.mark.parametrize("value", [True, 16, "on", [1], {"on": False}, 0.5])
def test_a_field_of_a_later_peft_is_refused_where_it_may_be_on(value: Any, tmp_path: Path) -> None:
    write_config(tmp_path, variant_of_2027=value)
    with pytest.raises(ConfigError, match=r"variant_of_2027=.*does not know.*PEFT"):
        check_adapter_folder(tmp_path)


BROKEN: dict[str, bytes] = {
    "empty": b"",
    "a list": b"[]",
    "a number": b"5",
    "null": b"null",
    "cut": b'{"r": 8, "peft_type": "LO',
    "not UTF-8": b'{"r": "\xff\xfe"}',
    "deep": b'{"r":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "a long number": b'{"r": ' + b"9" * 10_000 + b"}",
    "a key twice": b'{"r": 8, "r": 16, "peft_type": "LORA"}',
    "zeros": bytes(100),
    "large": b'{"r": "' + b"x" * 9_000_000 + b'"}',
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_named(fault: str, tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(BROKEN[fault])
    with pytest.raises(ConfigError, match=r"adapter_config\.json") as refused:
        check_adapter_folder(tmp_path)
    assert len(str(refused.value)) < 600


def test_adapters_in_folders_below_are_named(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_config(tmp_path / name)
        save_file({}, tmp_path / name / WEIGHTS)
    with pytest.raises(ConfigError, match="holds 2 adapters: give one of its folders first, second"):
        check_adapter_folder(tmp_path)
