"""Folders whose experts do not belong together, or do not fit 4 bits: refused by name, or left with a line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from qdpo.errors import ConfigError
from qdpo.model.base.expected import check_folder
from qdpo.model.base.expert_stack import FourBitStack
from qdpo.model.base.load import load_base
from tests.export.runs import save_base
from tests.model.families import SIZE
from tests.model.packed import rewrite

LAYER = "model.layers.1.mlp.experts"
Change = Callable[[dict[str, Tensor]], None]


def qwen3_moe(**changes: Any) -> Any:
    given = {
        **SIZE, "hidden_size": 64, "vocab_size": 402, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }  # fmt: skip
    return hf.Qwen3MoeConfig(**{**given, **changes})


def load(folder: Path, dtype: str = "bf16") -> tuple[Any, list[str]]:
    lines: list[str] = []
    model = load_base(
        folder, quantization="nf4", double_quant=True, dtype=dtype, device=torch.device("cpu"), attention_name=None,
        announce=lines.append,
    )  # fmt: skip
    return model, lines


def renumbered(first: int, then: int, *kinds: str) -> Change:
    def change(weights: dict[str, Tensor]) -> None:
        for kind in kinds:
            weights[f"{LAYER}.{then}.{kind}_proj.weight"] = weights.pop(f"{LAYER}.{first}.{kind}_proj.weight")

    return change


def dropped(weights: dict[str, Tensor]) -> None:
    del weights[f"{LAYER}.2.up_proj.weight"]


def added(weights: dict[str, Tensor]) -> None:
    for kind in ("gate", "up", "down"):
        weights[f"{LAYER}.4.{kind}_proj.weight"] = weights[f"{LAYER}.3.{kind}_proj.weight"].clone()


def reshaped(expert: int, kind: str, *shape: int) -> Change:
    def change(weights: dict[str, Tensor]) -> None:
        name = f"{LAYER}.{expert}.{kind}_proj.weight"
        weights[name] = weights[name].reshape(shape)

    return change


DAMAGED: dict[str, tuple[Change, str]] = {
    "an expert is missing": (dropped, "experts 0 to 3.*up_"),
    "an expert too many": (added, "experts 0 to 3, .* 5 tensors"),
    "a gap in the numbers": (renumbered(3, 7, "gate", "up", "down"), "experts 0 to 3, .*7.down_proj"),
    # transformers would pair gate 1 with up 2, 2 with 3, and 3 with 7.
    "numbers of gate and up differ": (renumbered(1, 7, "up"), "experts 0 to 3, .*7.up_proj"),
    "as many numbers in another shape": (reshaped(2, "down", 32, 64), r"2.down_proj.* shape \[32, 64\]"),
    "flat": (reshaped(1, "gate", 2048), r"1.gate_proj.* shape \[2048\]"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", DAMAGED)
def test_experts_that_do_not_belong_together_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    base, (change, why) = save_base(tmp_path / "base", qwen3_moe()), DAMAGED[kind]
    check_folder(base)
    rewrite(base, change)
    with pytest.raises(ConfigError, match=why):
        check_folder(base)


@pytest.mark.filterwarnings("ignore")
def test_a_matrix_of_another_shape_never_becomes_an_expert(tmp_path: Path) -> None:
    """Files may change after the door: a row of 4-bit numbers has no shape, so any matrix of that size would fit."""
    base = save_base(tmp_path / "base", qwen3_moe())
    rewrite(base, reshaped(2, "down", 32, 64))
    with pytest.raises(ConfigError, match="cannot load"):
        load(base)


@pytest.mark.filterwarnings("ignore")
def test_stacks_that_do_not_fit_four_bits_are_named(tmp_path: Path) -> None:
    odd = qwen3_moe(hidden_size=40, moe_intermediate_size=20)  # matrices of 40 x 40 and 40 x 20
    model, lines = load(save_base(tmp_path / "some", odd), "fp32")
    assert sum(isinstance(one, FourBitStack) for one in model.modules()) == odd.num_hidden_layers
    assert any("2 of 4 stacks stay in 32 bits" in line and "down_proj: a matrix" in line for line in lines)
    model, lines = load(save_base(tmp_path / "none", qwen3_moe(hidden_size=20, moe_intermediate_size=20)))
    assert not any(isinstance(one, FourBitStack) for one in model.modules())
    assert any("4 of 4 stacks stay in 16 bits" in line and "whole blocks of 64" in line for line in lines)
