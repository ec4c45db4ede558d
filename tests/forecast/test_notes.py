"""What a plan says about itself: settings that it does not count, and times that need kernels."""

from dataclasses import replace

import pytest

from qdpo.families.shapes import known_shape
from qdpo.families.traced import TracedShape
from qdpo.forecast import notes, timing
from qdpo.forecast.memory import MemorySettings, RowSize
from qdpo.settings.schema import AdapterConfig


def shape(*, states: bool) -> TracedShape:
    found = known_shape("mistralai/Ministral-3-3B-Instruct-2512")
    assert isinstance(found, TracedShape)
    return replace(found, states=states)


@pytest.mark.parametrize(
    ("states", "timed", "is_said"), [(False, True, False), (True, True, True), (True, False, False)]
)
def test_a_time_that_needs_kernels_says_so(
    states: bool, timed: bool, is_said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notes, "is_installed", lambda package: package == "fla")
    said = notes.notes(AdapterConfig(), shape(states=states), timed=timed)
    assert bool(said) == is_said
    assert all("(not installed here: causal-conv1d, mamba-ssm)" in line for line in said)


def test_other_targets_are_said_to_be_forecast_as_the_default() -> None:
    (line,) = notes.notes(AdapterConfig(targets=["q_proj", "v_proj"]), shape(states=False), timed=True)
    assert line.startswith("adapter.targets=q_proj,v_proj: ")


def test_answers_computed_one_by_one_pass_through_the_layers_as_often() -> None:
    """Short answers take the time to launch their layers, each again."""
    row = RowSize(64, 0, 4)
    card, unshared = timing.CARDS["h100"], replace(shape(states=True), shared=False)
    one, more = (timing.row_seconds(unshared, MemorySettings(), replace(row, pairs=pairs), card) for pairs in (1, 4))
    assert more == pytest.approx(4 * one)
