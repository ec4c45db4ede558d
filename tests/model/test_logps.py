"""The tiled head against full logits: values, gradients, and what is kept for the backward pass."""

from typing import Any

import pytest
import torch

from qdpo.model.fast.logps import Head, plain_logps, response_logps

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "all": {"bias": True, "scale": 0.7, "softcap": 3.0},
}


def problem(dtype: torch.dtype, *, bias: bool = False, **settings: Any) -> tuple[torch.Tensor, torch.Tensor, Head]:
    torch.manual_seed(3)
    hidden, weight = torch.randn(100, 24, dtype=dtype), torch.randn(9000, 24, dtype=dtype)
    head = Head(weight, torch.randn(9000, dtype=dtype) if bias else None, **settings)
    return hidden.requires_grad_(), torch.randint(0, 9000, (100,)), head


def full_logits(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    logits = hidden @ head.weight_VD.T
    logits = (logits if head.bias_V is None else logits + head.bias_V) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiles_equal_full_logits(variant: str) -> None:
    hidden, label, head = problem(torch.float32, **VARIANTS[variant])
    # 1 MiB allows 16 rows (the least) of 9,000 logits: the 100 rows take 7 tiles.
    with torch.no_grad():
        label[::2] = full_logits(hidden, head)[::2].argmax(-1)  # half of the labels are the most likely token
    found = response_logps(hidden, label, head, tile_mib=1, metrics=True, squares=True)
    slope = torch.randn(100)
    (gradient,) = torch.autograd.grad((found.logp * slope).sum(), hidden)
    logits = full_logits(hidden, head)
    expected = plain_logps(logits, label)
    (expected_gradient,) = torch.autograd.grad((expected * slope).sum(), hidden)
    assert torch.allclose(found.logp, expected, atol=1e-5)
    assert (gradient - expected_gradient).abs().max() <= 3e-6 * expected_gradient.abs().max()
    assert found.mean_logit is not None and found.entropy is not None
    assert torch.allclose(found.mean_logit, logits.mean(-1), atol=1e-5)
    assert torch.allclose(found.entropy, torch.distributions.Categorical(logits=logits).entropy(), atol=1e-4)
    assert found.hit is not None and found.log_square is not None
    assert torch.equal(found.hit, (logits.argmax(-1) == label).float()) and 50 <= found.hit.sum() < 100
    assert torch.allclose(found.log_square, logits.softmax(-1).pow(2).sum(-1).log(), atol=1e-4)


def test_bf16_tiles_are_no_worse_than_full_logits_in_bf16() -> None:
    hidden, label, head = problem(torch.bfloat16)
    exact = plain_logps(hidden.float() @ head.weight_VD.float().T, label)
    plain = plain_logps(hidden @ head.weight_VD.T, label)
    ours = response_logps(hidden, label, head, tile_mib=1, metrics=False).logp
    assert ((ours - exact).abs() <= (plain - exact).abs() + 1e-3).all()


def test_nothing_as_wide_as_the_vocabulary_is_kept() -> None:
    hidden, label, head = problem(torch.float32)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        response_logps(hidden, label, head, tile_mib=1, metrics=True)
    assert kept == [(100, 24)]


def test_a_trained_head_is_refused() -> None:
    hidden, label, head = problem(torch.float32)
    head.weight_VD.requires_grad_()
    with pytest.raises(NotImplementedError, match="frozen"):
        response_logps(hidden, label, head, tile_mib=1, metrics=False)
