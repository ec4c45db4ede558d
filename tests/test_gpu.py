"""What only a CUDA device can show: the same numbers as on the CPU, and a run in bf16 with a paged optimizer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qdpo.model.logps import Head, plain_logps, response_logps
from tests.conftest import Quiet

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
Train = Callable[..., tuple[dict[str, Any], Quiet]]


def test_the_head_never_rounds_logits_to_bf16() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(5000, 256, device="cuda", dtype=torch.bfloat16)
    label = torch.randint(0, 5000, (64,), device="cuda")
    exact = plain_logps(hidden.double() @ weight.double().T, label)
    found = response_logps(hidden, label, Head(weight), tile_mib=1, metrics=False).logp
    assert (found - exact).abs().max() < 1e-3


def test_fp32_training_equals_the_cpu(train: Train) -> None:
    on_cpu, _ = train(train__steps="5", output__name="cpu")
    on_gpu, _ = train(train__steps="5", output__name="gpu", model__device="cuda")
    for name, value in on_cpu["after"].items():
        assert on_gpu["after"][name] == pytest.approx(value, rel=2e-3, abs=2e-4), name


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_4_bit_run_learns_and_starts_at_its_reference(train: Train, dtype: str) -> None:
    result, watcher = train(
        train__epochs="3", model__device="cuda", model__quantization="nf4", model__dtype=dtype, train__optimizer="auto"
    )
    assert abs(result["before"]["rewards/margins"]) < 0.02 and result["after"]["rewards/accuracies"] >= 0.8
    assert "reference offset" in watcher.text
