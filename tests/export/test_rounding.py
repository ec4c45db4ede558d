"""Rounding to 16 bits keeps on average what is far below a grid step."""

import pytest
import torch

from qdpo.export.merge.rounding import rounded

STEP = {torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("part", [0.01, 0.3, 0.5, 0.99])
def test_the_mean_is_kept_and_both_neighbours_are_used(dtype: torch.dtype, part: float) -> None:
    for sign in (1, -1):
        value = torch.full((100, 1000), sign * (1 + part * STEP[dtype]))
        found = rounded(value, dtype, 0).double()
        assert {abs(x) for x in found.unique().tolist()} == {1.0, 1.0 + STEP[dtype]}
        taken = (found.abs() - 1) / STEP[dtype]
        assert taken.mean() == pytest.approx(part, abs=1e-3)
        assert (taken.mean(1) - part).abs().max() < 0.01  # in every row, not only in all
        assert value.to(dtype).double().abs().mean() in (1, 1 + STEP[dtype])  # the nearest loses it


@pytest.mark.parametrize("dtype", STEP)
def test_values_on_the_grid_stay_and_others_move_less_than_a_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    value = torch.randn(64, 64)
    grid = value.to(dtype)
    assert torch.equal(rounded(grid.float(), dtype, 5), grid)
    moved = (rounded(value, dtype, 0).double() - value.double()).abs()
    assert (moved <= STEP[dtype] * value.abs() + 1e-7).all()


def test_the_result_does_not_depend_on_how_a_tensor_is_cut() -> None:
    torch.manual_seed(0)
    value = torch.randn(40, 8)
    parts = [rounded(value[start : start + 8], torch.bfloat16, start * 8) for start in range(0, 40, 8)]
    assert torch.equal(torch.cat(parts), rounded(value, torch.bfloat16, 0))
    assert torch.equal(rounded(value, torch.float32, 0), value)
