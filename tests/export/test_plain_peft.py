"""The normalised adapter means the same as the trained one, to a loader that knows nothing but alpha over rank."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers as hf
from peft import PeftModel

from qdpo.errors import ConfigError
from qdpo.export import plain_peft
from qdpo.export.merge import lora
from tests.export.made import SHAPE, load, logits, save_adapter, save_base

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"o_proj": 9}, "alpha_pattern": {"o_proj": 5}},
    "one layer": {"layers_to_transform": [1], "target_modules": ["q_proj", "v_proj"]},
    "a regular expression": {"target_modules": r".*\.layers\.0\.self_attn\.[kv]_proj"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("normal") / "base", hf.LlamaConfig(**SHAPE))


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_peft_gives_the_same_logits(variant: str, base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, **VARIANTS[variant])
    written = plain_peft.write_normal(adapter, base, tmp_path / "out")
    expected = logits(PeftModel.from_pretrained(load(base), adapter))
    found = logits(PeftModel.from_pretrained(load(base), tmp_path / "out"))
    assert (found - expected).abs().max() < 2e-5
    assert (expected - logits(load(base))).abs().max() > 0.1
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == written.lora.rank and not config["use_rslora"]
    assert not config["rank_pattern"] and not config["alpha_pattern"] and config["layers_to_transform"] is None
    assert isinstance(config["target_modules"], list) and config["target_modules"] == sorted(config["target_modules"])
    # alpha over rank, with nothing else known, gives the trained delta.
    trained, again = lora.read_lora(adapter), lora.read_lora(tmp_path / "out")
    for module, layer in trained.layers.items():
        assert (again.layers[module].delta_NK == layer.delta_NK).all()


def test_the_same_adapter_gives_the_same_bytes(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, use_rslora=True)
    for name in ("one", "two"):
        plain_peft.write_normal(adapter, base, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        assert path.stat().st_mode & 0o044, "servers run as another user"


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT thinks little of some of these itself
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "biases"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding"),
    ],
)
def test_adapters_that_are_more_than_a_and_b_are_refused(
    changes: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, **changes)
    with pytest.raises(ConfigError, match=message):
        plain_peft.write_normal(adapter, base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_layers_that_the_base_lacks_are_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base)
    other = save_base(tmp_path / "other", hf.Phi3Config(**SHAPE))
    with pytest.raises(ConfigError, match="do not hold weights that the adapter or the run names: .*gate_proj"):
        plain_peft.write_normal(adapter, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
