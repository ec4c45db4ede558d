"""The loss against its formula, its golden values, and its invariants."""

import json
import math
from pathlib import Path

import pytest
import torch

from qdpo.train.loss import sigmoid_loss

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "losses.json"


def test_zero_margin_is_ln_2_whatever_the_smoothing() -> None:
    a = torch.tensor([-3.0, 0.0, 250.0])
    for smoothing in (0.0, 0.1, 0.4):
        assert torch.allclose(sigmoid_loss(a, a, beta=0.1, label_smoothing=smoothing), torch.full((3,), math.log(2)))


def test_swapping_the_answers_swaps_the_labels() -> None:
    a, b = torch.randn(2, 8, dtype=torch.float64)
    smoothed = sigmoid_loss(a, b, beta=0.5, label_smoothing=0.3)
    mixed = 0.7 * sigmoid_loss(a, b, beta=0.5) + 0.3 * sigmoid_loss(b, a, beta=0.5)
    assert torch.allclose(smoothed, mixed)


@pytest.mark.parametrize("margin", [-1000.0, 1000.0])
def test_huge_log_ratios_stay_finite(margin: float) -> None:
    a = torch.tensor([margin], requires_grad=True)
    loss = sigmoid_loss(a, torch.zeros(1), beta=0.5, label_smoothing=0.1).sum()
    loss.backward()
    assert loss.isfinite() and a.grad is not None and a.grad.isfinite().all()


def test_gradient_matches_finite_differences() -> None:
    a, b = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, y: sigmoid_loss(x, y, beta=0.3, label_smoothing=0.2), (a, b))


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden file is not beside this checkout")
def test_golden_values_of_the_incumbent() -> None:
    plain = {"loss": "sigmoid", "f_divergence": "reverse_kl", "ld_alpha": None, "use_weighting": False}
    cases = [case for case in json.loads(GOLDEN.read_text())["cases"] if plain.items() <= case.items()]
    assert len(cases) >= 3
    for case in cases:
        dtype = getattr(torch, case["precision"])
        policy = {
            side: [torch.tensor(answer, dtype=dtype, requires_grad=True) for answer in answers]
            for side, answers in case["policy_token_logps"].items()
        }
        reference = case["reference_token_logps"]
        a, b = (
            torch.stack(
                [(p - torch.tensor(r, dtype=dtype)).sum() for p, r in zip(policy[side], reference[side], strict=True)]
            )
            for side in ("chosen", "rejected")
        )
        loss = sigmoid_loss(a, b, beta=case["beta"]).mean()
        loss.backward()
        tolerance = 1e-9 if dtype == torch.float64 else 1e-5
        assert loss.item() == pytest.approx(case["expected"]["loss"], rel=tolerance)
        for side, answers in case["expected"]["grad"].items():
            for found, expected in zip(policy[side], answers, strict=True):
                assert found.grad is not None and found.grad.tolist() == pytest.approx(
                    expected, rel=tolerance, abs=1e-12
                )
