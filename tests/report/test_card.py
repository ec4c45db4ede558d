"""The model card: the code in it loads what was trained."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qdpo.report.card import card_text
from qdpo.review.open import reopen, tuned
from qdpo.run.finished import finished_run
from tests.conftest import Quiet, save_tiny_base
from tests.export.runs import make_run

IDS = torch.tensor([[5, 9, 40, 7, 11, 23]])


def code_of(card: str, base: Path, adapter: Path) -> str:
    found = re.search(r"```python\n(.*?)\n```", card, re.DOTALL)
    assert found
    return found[1].replace("path/to/its/base", str(base)).replace("path/to/this/adapter", str(adapter))


@pytest.mark.parametrize(
    ("quantization", "double_quant", "dtype"), [("nf4", True, "fp32"), ("fp4", False, "bf16"), ("none", True, "bf16")]
)
def test_the_code_of_the_card_loads_what_was_trained(
    tmp_path: Path, quantization: str, double_quant: bool, dtype: str
) -> None:
    base = save_tiny_base(tmp_path / "base")
    run = make_run(tmp_path / "run", base, quantization=quantization, double_quant=double_quant, dtype=dtype)
    card = card_text(finished_run(run.path))
    names: dict[str, Any] = {}
    exec(code_of(card, base, run.adapter), names)
    with torch.no_grad():
        shown = names["model"](IDS).logits.float()
        policy, _ = tuned(reopen(run.path, [], Quiet()), Quiet())
        own = policy.peft(IDS).logits.float()
        with policy.reference():
            bare = policy.peft(IDS).logits.float()
    assert (shown - own).abs().max() < 1e-4 < (bare - own).abs().max()
    assert ("qdpo merge" in card) == (quantization != "none")


def test_an_accuracy_stands_with_its_pairs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", save_tiny_base(tmp_path / "base"))
    pairs = finished_run(run.path).record.data.held_out_pairs
    line = next(one for one in card_text(finished_run(run.path)).splitlines() if one.startswith("| reward accuracy"))
    assert line.count(f"(n={pairs})") == 2 and not re.search(r"\d\.\d{4}", line)
