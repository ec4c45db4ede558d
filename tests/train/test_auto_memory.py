"""Fitting a run into memory: the forecast's choice, and the worst row tried at the start."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from qdpo.errors import ConfigError, OutOfMemoryError
from qdpo.model.base.load import embeddings_to_host
from qdpo.run.disk import read_json
from qdpo.run.folder import RunDir
from qdpo.run.record import Result
from qdpo.train.start import auto_memory
from tests.conftest import Quiet
from tests.train.test_step import make


def test_a_run_records_what_it_found_and_keeps_it(
    train: Callable[..., tuple[Result, Quiet]], settings: dict[str, str]
) -> None:
    _, watcher = train(train__steps="1")
    assert "GiB forecast of" in watcher.text and "2 of 2 layers kept" in watcher.text
    run = RunDir(Path(settings["output.dir"]) / "run")
    found = read_json(run.record)["found"]
    assert found["memory.kept_layers"] == 2 and found["memory.tokens_per_row"] > 0 and not found["memory.offload"]
    assert "kept_layers = 2  # default; found at the first start" in run.config.read_text()
    assert "kept_layers = 2  # found at the first start" in run.config.read_text() or "2" in run.config.read_text()


def test_a_run_that_cannot_fit_stops_before_anything_is_loaded(
    train: Callable[..., tuple[Result, Quiet]], settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*arguments: Any, **more: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("qdpo.train.policy.build.load_base", loads)
    with pytest.raises(OutOfMemoryError) as failure:
        train(memory__limit_gib="0.0008", memory__kept_layers="all", memory__tokens_per_row="4096")
    text = str(failure.value)
    assert "memory.limit_gib=0.0008" in text and "Nothing was loaded" in text and failure.value.exit_code == 5
    assert not (Path(settings["output.dir"]) / "run").exists()
    with pytest.raises(AssertionError, match="was loaded"):
        train(memory__limit_gib="1")


def test_the_embedding_table_on_the_host_changes_no_number(
    train: Callable[..., tuple[Result, Quiet]], tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "untied"
    shutil.copytree(tiny_base, base)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(base)
    results = [
        train(model__path=str(base), memory__embeddings=place, train__steps="3", output__name=place)[0].after
        for place in ("device", "host")
    ]
    assert results[0] == results[1]


def test_a_tied_table_stays_on_the_device(tiny_base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    model.lm_head.weight = model.get_input_embeddings().weight
    with pytest.raises(ConfigError, match="the same table"):
        embeddings_to_host(model)


def test_layers_are_given_up_until_the_longest_row_fits(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, pairs = make_loaded(settings)
    said: list[str] = []
    trial, failures = auto_memory._try, [2]

    def full_twice(*arguments: Any) -> None:
        if failures[0]:
            failures[0] -= 1
            raise torch.cuda.OutOfMemoryError("out of memory\nmore")
        trial(*arguments)

    monkeypatch.setattr(auto_memory, "_try", full_twice)
    ask: dict[str, Any] = {"tokens_per_row": 100, "kept_layers": "all", "optimizer_bytes": 10, "say": said.append}
    assert auto_memory.try_worst_row(loaded, pairs, may_lower=True, **ask) == 0
    assert len(said) == 2 and "does not fit with 2 layers kept; trying 1" in said[0]
    failures[0] = 1
    with pytest.raises(OutOfMemoryError, match="Nothing was trained. Lower data.max_tokens"):
        auto_memory.try_worst_row(loaded, pairs, may_lower=False, **ask)
    assert all(p.grad is None for p in loaded.policy.adapter_parameters().values())


def make_loaded(settings: dict[str, str]) -> tuple[Any, Any]:
    from qdpo.settings import layered
    from qdpo.train.policy.build import load_policy
    from tests.conftest import arguments

    _, pairs = make(settings)
    config = layered.resolve(arguments(settings)).config
    loaded = load_policy(
        config, Path(str(config.model.path)), device=torch.device("cpu"), dtype="fp32", probe_with=pairs[:2],
        say=lambda line: None,
    )  # fmt: skip
    return loaded, pairs


def test_the_worst_row_is_the_fullest(settings: dict[str, str]) -> None:
    _, pairs = make(settings)
    longest = max(pair.tokens for pair in pairs)
    (alone,) = auto_memory.worst_rows(pairs, 0)
    assert alone.tokens == longest
    (full,) = auto_memory.worst_rows(pairs, 3 * longest)
    assert 2 * longest < full.tokens <= 3 * longest
    (longer,) = auto_memory.worst_rows(pairs, longest - 5)
    assert longer.tokens == longest


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler warns of its own code and of what it traces
def test_compiled_layers_train_as_plain_ones_do(train: Callable[..., tuple[Result, Quiet]]) -> None:
    for kept in ("all", "1"):
        plain, _ = train(train__steps="4", memory__kept_layers=kept, output__name=f"plain-{kept}")
        compiled, watcher = train(
            train__steps="4", memory__kept_layers=kept, train__compile="true", output__name=f"compiled-{kept}"
        )
        assert "compile: kept layers are compiled" in watcher.text
        for name, value in plain.after.items():
            assert compiled.after[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
