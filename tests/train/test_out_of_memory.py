"""A step that does not fit: the same gradient from smaller rows, recorded and replayed; or a stop with all saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qdpo.data.tokens.pack import pack_rows
from qdpo.errors import OutOfMemoryError
from qdpo.run.disk import read_json
from qdpo.run.folder import RunDir
from qdpo.run.record import Result
from qdpo.settings.schema import LossConfig
from qdpo.train import loop
from qdpo.train.step.feed import ready
from qdpo.train.step.out_of_memory import HALVES, NAMES, SIDED, SINGLE, WHOLE, Recovery, split
from qdpo.train.step.step import RowTooLarge, train_step
from tests.conftest import Quiet
from tests.train.test_step import LISTS, make, near

Train = Callable[..., tuple[Result, Quiet]]
CPU = torch.device("cpu")
LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {}, "simpo": {"name": "simpo"}, "aot": {"name": "aot"}, "sigmoid_norm": {"name": "sigmoid_norm"}, **LISTS
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_every_level_gives_the_same_step(settings: dict[str, str], name: str) -> None:
    policy, pairs = make(settings)
    generator = torch.Generator().manual_seed(2)
    for parameter in policy.adapter_parameters().values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    loss, reference = LossConfig(**LOSSES[name]), None if name == "simpo" else near(policy, pairs)
    rows = [ready(row, reference) for row in pack_rows(pairs, 120)]
    results = {}
    for level in range(SIDED + 1):
        parameters = policy.adapter_parameters()
        optimizer = torch.optim.SGD(parameters.values(), lr=0.0)
        report = train_step(
            policy, list(parameters.values()), optimizer, torch.amp.GradScaler("cpu", enabled=False),
            split(rows, level), loss, max_grad_norm=1e9, sided=level == SIDED,
        )  # fmt: skip
        results[level] = report, {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    report, expected = results[WHOLE]
    largest = max(gradient.abs().max() for gradient in expected.values())
    for other, gradients in results.values():
        assert other.values == pytest.approx(report.values, rel=2e-5, abs=1e-5) and other.pairs == 8
        assert gradients.keys() == expected.keys()
        assert all((gradients[n] - g).abs().max() <= 3e-6 * largest for n, g in expected.items())


def test_rows_become_smaller(settings: dict[str, str]) -> None:
    _, pairs = make(settings)
    rows = [ready(row, None) for row in pack_rows(pairs, 10_000)]
    counts = [[len(part.row.pairs) for part in split(rows, level)] for level in (WHOLE, HALVES, SINGLE)]
    assert counts == [[8], [4, 4], [1] * 8]


def test_a_level_is_found_once_and_stays() -> None:
    said: list[str] = []
    kept: list[dict[str, int]] = []
    recovery = Recovery({}, CPU, said.append, lambda found: kept.append(dict(found)))
    failures = [3]

    def compute(rows: Any, sided: bool) -> str:
        if failures[0]:
            failures[0] -= 1
            raise RowTooLarge("no memory")
        return "sided" if sided else "done"

    assert recovery.run_step(4, [], compute) == "done"  # type: ignore[comparison-overlap]
    assert "trying once more" in said[0] and NAMES[HALVES] in said[1] and NAMES[SINGLE] in said[2]
    assert kept[-1] == {"4": SINGLE} and recovery.level(3) == WHOLE and recovery.level(9) == SINGLE
    again = Recovery(kept[-1], CPU, said.append, kept.append)
    assert again.level(4) == SINGLE
    failures[0] = 99
    with pytest.raises(OutOfMemoryError, match="Step 6 does not fit even one answer at a time: no memory"):
        again.run_step(5, [], compute)


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A card on which, from the third step on, no row with more than `most` pairs fits."""
    limits: dict[str, Any] = {"most": 99, "calls": 0}
    whole = loop.train_step

    def step(policy: Any, parameters: Any, optimizer: Any, scaler: Any, rows: Any, *rest: Any, **more: Any) -> Any:
        limits["calls"] += 1
        fits = more["sided"] or max(len(row.row.pairs) for row in rows) <= limits["most"]
        if limits["calls"] > 2 and not fits:
            raise RowTooLarge("CUDA out of memory")
        return whole(policy, parameters, optimizer, scaler, rows, *rest, **more)

    monkeypatch.setattr(loop, "train_step", step)
    return limits


def test_a_run_goes_on_with_smaller_rows(train: Train, settings: dict[str, str], crowded: dict[str, Any]) -> None:
    row = {"memory__tokens_per_row": "4000", "train__steps": "5"}
    whole, _ = train(output__name="whole", **row)
    crowded.update(most=1, calls=0)
    smaller, watcher = train(**row)
    assert "from here on rows of one pair at a time" in watcher.text
    for name, value in whole.after.items():
        assert smaller.after[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    folder = Path(settings["output.dir"]) / "run"
    assert read_json(RunDir(folder).record)["found"]["row_splits"] == {"2": SINGLE}


def test_what_does_not_fit_at_all_stops_with_everything_saved(
    train: Train, settings: dict[str, str], crowded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"memory__tokens_per_row": "4000", "train__steps": "5"}
    train(output__name="golden", **row)
    inner = loop.train_step

    def never(*arguments: Any, **more: Any) -> Any:
        if crowded["calls"] >= 2:
            raise RowTooLarge("CUDA out of memory")
        return inner(*arguments, **more)

    crowded.update(calls=0)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", never)
        with pytest.raises(OutOfMemoryError) as failure:
            train(**row)
    text = str(failure.value)
    assert "Step 3 does not fit" in text and "The adapter after step 2 is saved" in text and "longest pair" in text
    assert text.count("memory.") >= 2 and "data.max_tokens" in text and failure.value.exit_code == 5
    crowded.update(calls=-99)
    _, watcher = train(memory__kept_layers="0", **row)
    assert "resuming after step 2" in watcher.text
    folder = Path(settings["output.dir"])
    assert read_json(RunDir(folder / "run").record)["found"]["memory.kept_layers"] == 0
    adapters = [(folder / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("golden", "run")]
    assert len(adapters[0]) == len(adapters[1])


def test_kept_layers_change_no_number(train: Train, settings: dict[str, str]) -> None:
    folder = Path(settings["output.dir"])
    for name, kept in (("all", "all"), ("nothing", "0")):
        train(train__steps="3", memory__kept_layers=kept, output__name=name)
    adapters = [(folder / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("all", "nothing")]
    assert adapters[0] == adapters[1]
