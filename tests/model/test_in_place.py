"""No gradient function of ours changes what it was given, or kept: other modules may read the same tensors."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qdpo.model.fast
from qdpo.model.fast import attention, experts, linear, mlp, norm, row_scan
from qdpo.model.fast.activation import ACTIVATIONS, Activation
from qdpo.model.fast.logps import Head, response_logps
from qdpo.model.fast.scored_attention import scored_attention
from qdpo.model.trace import rows

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
TOKENS, WIDTH, INNER = 6, 8, 12
Call = tuple[Callable[..., Tensor], list[Tensor]]
"""A function and the tensors that it is differentiated by."""


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def layer(inputs: int, outputs: int, dtype: torch.dtype) -> linear.AdaptedLinear:
    base = nn.Linear(inputs, outputs).to(dtype).requires_grad_(False)
    return linear.AdaptedLinear(base, nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2)), 2.0)


def normed(dtype: torch.dtype, form: norm.NormForm) -> Call:
    weight = None if form.weigh is None else torch.randn(2, WIDTH // 2).to(dtype)
    if form.gate is None:
        return lambda x: norm.norm(x, weight, 1e-6, form), [drawn(1, TOKENS, WIDTH, dtype=dtype)]
    return lambda x, gate: norm.norm(x, weight, 1e-6, form, gate=gate), [
        drawn(1, TOKENS, WIDTH, dtype=dtype), drawn(1, TOKENS, WIDTH, dtype=dtype)
    ]  # fmt: skip


def adapted(dtype: torch.dtype) -> Call:
    whole = layer(WIDTH, INNER, dtype)
    return lambda x, a, b: linear.adapted_linear(x, whole), [
        drawn(1, TOKENS, WIDTH, dtype=dtype),
        whole.a_RK,
        whole.b_NR,
    ]


def whole_mlp(dtype: torch.dtype, act: Activation, kind: mlp.Kind) -> Call:
    """The whole MLP: its function may overwrite the outputs of gate and up, which no other module receives."""
    wide = 2 * INNER if kind == "fused" else INNER
    parts: list[nn.Module] = [
        nn.Linear(WIDTH, wide).to(dtype).requires_grad_(False) for _ in range(2 if kind == "gated" else 1)
    ]
    down = layer(INNER, WIDTH, dtype)
    return lambda x, a, b: mlp.lean_mlp(x, parts, down, act, kind=kind), [
        drawn(1, TOKENS, WIDTH, dtype=dtype), down.a_RK, down.b_NR
    ]  # fmt: skip


def attended(dtype: torch.dtype, softcap: float | None) -> Call:
    sink = torch.randn(2).to(dtype) if softcap is None else None
    parts = [drawn(1, 2, TOKENS, WIDTH, dtype=dtype) for _ in range(3)]
    return (
        lambda q, k, v: scored_attention(q, k, v, scale=0.3, window=4, softcap=softcap, sink_H=sink), parts
    )  # fmt: skip


def logps(dtype: torch.dtype) -> Call:
    head = Head(torch.randn(20, WIDTH).to(dtype), torch.randn(20).to(dtype), 0.5, 3.0)
    label = torch.randint(20, (TOKENS,))
    return (
        lambda x: response_logps(x, label, head, tile_mib=1, metrics=True, squares=True).logp
    ), [drawn(TOKENS, WIDTH, dtype=dtype)]  # fmt: skip


def scanned(dtype: torch.dtype) -> Call:
    """A running sum that begins with a state: the simplest scan, in a row of two pairs."""

    def running(x: Tensor, initial_state: Tensor | None, output_final_state: bool) -> tuple[Tensor, Tensor]:
        sums = x.square().cumsum(1) + (0 if initial_state is None else initial_state[:, None])
        return sums, sums[:, -1]

    names = row_scan.ScanNames("initial_state", "output_final_state", always=True, varlen=False)
    spans = attention.PairSpans([rows.EvenSpan(0, 1, 1, 1), rows.EvenSpan(3, 1, 1, 1)])
    return lambda x: row_scan.loop(row_scan.Scan(running, names, {"x": x}), spans), [
        drawn(1, TOKENS, WIDTH, dtype=dtype)
    ]


def of_experts(dtype: torch.dtype) -> Call:
    """Three experts, of which one sees every token and one sees none."""
    first, last = (torch.randn(3, *shape).to(dtype) for shape in ((2 * INNER, WIDTH), (WIDTH, INNER)))
    module = Gate()
    parts = experts.Experts(module=module, first=experts.PlainStack(first), last=experts.PlainStack(last))
    place = torch.tensor([[1, 0]] * TOKENS)
    return lambda x, share: experts.experts_output(x, place, share, parts), [
        drawn(TOKENS, WIDTH, dtype=dtype), drawn(TOKENS, 2, dtype=dtype)
    ]  # fmt: skip


class Gate(nn.Module):
    """The activation between the products of experts, as in transformers."""

    def _apply_gate(self, first: Tensor) -> Tensor:
        gate, up = first.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


CASES: dict[str, Callable[[torch.dtype], Call]] = {
    **{
        f"_Norm {place}": lambda dtype, form=form: normed(dtype, form)
        for place, form in enumerate(
            [
                *norm.forms(has_weight=True, has_gate=False),
                *norm.forms(has_weight=False, has_gate=False),
                *norm.forms(has_weight=True, has_gate=True)[:6],
            ]
        )
    },
    "_Shrink Expand": adapted,
    **{
        f"_MlpShrink {kind} {act.name}": lambda dtype, act=act, kind=kind: whole_mlp(dtype, act, kind)
        for act in ACTIVATIONS
        for kind in ("gated", "fused", "ungated")
    },
    "_Scored cap": lambda dtype: attended(dtype, 2.0),
    "_Scored sink": lambda dtype: attended(dtype, None),
    "_ResponseLogps": logps,
    "_Block": scanned,
    "_Experts": of_experts,
}


def functions() -> set[str]:
    """Every autograd function of the fast parts."""
    for found in pkgutil.iter_modules(qdpo.model.fast.__path__, "qdpo.model.fast."):
        importlib.import_module(found.name)
    mine = torch.autograd.Function.__subclasses__()
    return {one.__name__ for one in mine if one.__module__.startswith("qdpo.model.fast.")}


def test_every_function_has_a_case() -> None:
    named = {word for case in CASES for word in case.split()}
    assert functions() <= named and len(functions()) > 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_inputs_and_incoming_gradients_stay(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    function, given = CASES[case](dtype)
    before = [one.detach().clone() for one in given]
    output = function(*given)
    slope = torch.randn(output.shape).to(output)
    came = slope.clone()
    torch.autograd.grad(output, given, slope)
    assert torch.equal(slope, came)
    assert all(torch.equal(one, was) for one, was in zip(given, before, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_tensor_that_others_read_too(case: str, dtype: torch.dtype) -> None:
    """Twice the function, and a product that keeps the tensor, on one input: the gradient is the sum of the three."""
    torch.manual_seed(0)
    function, given = CASES[case](dtype)
    shared, *rest = given

    def gradients(*parts: int) -> Tensor:
        middle = shared * 1  # not a leaf, as between two modules
        readers: list[Callable[[], Any]] = [
            lambda: (middle * middle).sum(), *[lambda: function(middle, *rest).square().sum()] * 2
        ]  # fmt: skip
        total = sum(readers[part]() for part in parts)
        return torch.autograd.grad(total, shared)[0].double()

    together, alone = gradients(0, 1, 2), sum(gradients(part) for part in range(3))
    bound = 0.03 if dtype == torch.bfloat16 else 1e-5
    assert (together - alone).norm() <= bound * together.norm()


def test_a_gate_that_keeps_its_own_output_is_noticed() -> None:
    """Gate and up are overwritten by their gradients: autograd stops where another module has kept one of them."""
    down = layer(INNER, WIDTH, torch.float32)
    gate = nn.Sequential(nn.Linear(WIDTH, INNER), nn.Sigmoid())  # the sigmoid's gradient reads its output
    x = drawn(1, TOKENS, WIDTH, dtype=torch.float32)
    output = mlp.lean_mlp(x, [gate, nn.Linear(WIDTH, INNER)], down, ACTIVATIONS[0], kind="gated")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
