"""What only a CUDA device can show of experts: blocks as one grouped product, and a base that is loaded there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdpo.model.base.expert_stack import FourBitStack, quantised
from qdpo.model.base.load import load_base
from qdpo.model.base.quant import FourBit
from qdpo.model.fast import experts
from qdpo.model.fast.experts import experts_of, experts_output
from qdpo.model.policy.compare import apart
from tests.model.test_experts import FAMILIES, Module, folder_of, places, stacks

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")
__all__ = ["folder_of"]


def differentiated(module: Any, x: torch.Tensor, place: torch.Tensor, share: torch.Tensor) -> list[torch.Tensor]:
    x, share = x.clone().requires_grad_(), share.clone().requires_grad_()
    output = experts_output(x, place, share, experts_of(module))
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    return [output.detach(), *torch.autograd.grad(output, [x, share], slope)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_output_and_gradients_are_those_of_the_cpu(dtype: torch.dtype, transposed: bool) -> None:
    torch.manual_seed(0)
    module = Module(16, 256, 128, biased=transposed, transposed=transposed, gated=True).to(dtype)
    x, place, share = torch.randn(600, 256).to(dtype), places(600, 16, 4, "lonely"), torch.rand(600, 4).to(dtype)
    expected = differentiated(module, x, place, share)
    found = differentiated(module.to(CUDA), x.to(CUDA), place.to(CUDA), share.to(CUDA))
    assert experts.is_grouped(x.to(CUDA), x.to(CUDA).expand(2, 600, 256)) == (dtype == torch.bfloat16)
    for one, other in zip(expected, found, strict=True):
        assert apart(one, other.cpu()) < (1e-4 if dtype == torch.float32 else 2e-2)


def test_a_step_on_the_card_is_repeated_to_the_byte() -> None:
    module = Module(8, 128, 64, biased=False, transposed=False, gated=True).to(CUDA, torch.bfloat16)
    x, place, share = torch.randn(400, 128), places(400, 8, 3, "random"), torch.rand(400, 3)
    given = [one.to(CUDA) if one is place else one.to(CUDA, torch.bfloat16) for one in (x, place, share)]
    for one, other in zip(differentiated(module, *given), differentiated(module, *given), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_stack_is_quantised_on_the_card_and_read_back_in_blocks(double_quant: bool) -> None:
    form = FourBit("nf4", double_quant, torch.bfloat16)
    matrices = torch.randn(6, 96, 256, generator=torch.Generator().manual_seed(0)).bfloat16().to(CUDA)
    stack = FourBitStack(matrices.shape, form, CUDA)
    for expert, matrix in enumerate(matrices):
        stack.put(expert, matrix)
    whole = stack.dense(0, 6, torch.bfloat16)
    for expert, matrix in enumerate(matrices):
        alone = quantised(matrix, form)
        assert torch.equal(whole[expert], alone[0]) and torch.equal(stack[expert], alone[0])
        assert alone.digest(0) == stack.digest(expert)
        assert apart(quantised(matrix.cpu(), form)[0], alone[0].cpu()) < 1e-2


@pytest.mark.parametrize("key", FAMILIES[:6])
def test_a_model_is_loaded_on_the_card_without_a_stack_in_sixteen_bits(
    folder_of: Callable[[str], Path], key: str
) -> None:
    model = load_base(
        folder_of(key), quantization="nf4", double_quant=True, dtype="bf16", device=CUDA, attention_name=None,
        announce=lambda line: None,
    )  # fmt: skip
    assert stacks(model) and all(one.is_cuda for one in [*model.parameters(), *model.buffers()])
    ids = torch.randint(3, 1000, (1, 40), generator=torch.Generator().manual_seed(0)).to(CUDA)
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
