"""Runs that begin at an adapter of another kit, and the adapter of a run that was changed later."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from qdpo.errors import ConfigError, QdpoError, VerificationError
from qdpo.export.merge.merge import merge_run
from qdpo.export.trained import trained_run
from qdpo.model.base.fetch import locate_base
from qdpo.model.policy import adapter
from qdpo.model.policy.adapter_source import check_adapter
from qdpo.review.score import rescore
from qdpo.run.finished import finished_run
from qdpo.run.folder import RunDir
from qdpo.run.record import Result
from qdpo.train.policy import build
from tests.conftest import Quiet
from tests.matrix.members import Member, save_member
from tests.model.adapters import CONFIG, WEIGHTS, edited, load, logits, make, with_tensors

Train = Callable[..., tuple[Result, Quiet]]
pytestmark = pytest.mark.filterwarnings("ignore")


def folder_of(settings: dict[str, str], name: str = "run") -> Path:
    return Path(settings["output.dir"]) / name


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_base(*_: Any, **__: Any) -> Any:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr(build, "load_base", load_base)


def test_an_adapter_with_one_regular_expression_comes_out_as_one(
    train: Train, settings: dict[str, str], tiny_base: Path, tmp_path: Path
) -> None:
    pattern = r".*layers\.1\.self_attn\.(q|v)_proj"
    start = make(tmp_path / "start", tiny_base, target_modules=pattern, use_rslora=True)
    train(train__steps="2", adapter__start=str(start))
    run = folder_of(settings)
    assert json.loads((run / "adapter" / CONFIG).read_text())["target_modules"] == pattern
    tuned = logits(PeftModel.from_pretrained(load(tiny_base), run / "adapter"))
    began = logits(PeftModel.from_pretrained(load(tiny_base), start))
    assert not torch.equal(tuned, began)
    merge_run(RunDir(run), tmp_path / "merged", base="dequantized", dtype="fp32", watcher=Quiet())
    assert (logits(load(tmp_path / "merged")) - tuned).abs().max() < 2e-5
    assert rescore(run, [], Quiet()).pairs > 0


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("start", ["olora", "pissa"])
def test_an_adapter_that_changes_the_base_is_refused_and_nothing_is_left(
    start: str, train: Train, settings: dict[str, str], tiny_base: Path, tmp_path: Path
) -> None:
    made = make(tmp_path / "start", tiny_base, init_lora_weights=start)
    with pytest.raises(ConfigError, match=f"init_lora_weights='{start}'"):
        train(train__steps="2", adapter__start=str(made))
    assert not folder_of(settings).exists() and not list(Path(settings["cache.dir"]).glob("references/*"))


def test_one_that_was_converted_is_trained(train: Train, tiny_base: Path, tmp_path: Path) -> None:
    """The way out that the refusal names."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora", task_type="CAUSAL_LM")
    model = get_peft_model(load(tiny_base), lora)
    model.save_pretrained(tmp_path / "first")
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    edited(tmp_path / "first", init_lora_weights=True)
    model.save_pretrained(tmp_path / "start", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    started = adapter.start_adapter(load(tiny_base), tmp_path / "start")
    assert (logits(started) - logits(model)).abs().max() < 1e-4
    train(train__steps="1", adapter__start=str(tmp_path / "start"))


@pytest.mark.usefixtures("never_loads")
def test_a_misspelt_target_is_refused_before_loading(train: Train, settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.targets names v_prj.*Did you mean v_proj"):
        train(adapter__targets="q_proj+v_prj")
    assert not folder_of(settings).exists()


def test_the_settings_of_a_start_adapter_may_not_change_during_a_run(
    train: Train, settings: dict[str, str], tiny_base: Path, tmp_path: Path
) -> None:
    start = make(tmp_path / "start", tiny_base)
    train(train__steps="2", adapter__start=str(start))
    (folder_of(settings) / "result.json").unlink()
    shutil.rmtree(folder_of(settings) / "adapter")
    edited(start, lora_alpha=13)
    with pytest.raises(QdpoError, match=CONFIG):
        train(train__steps="2", adapter__start=str(start))


def bit(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-2] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def spoilt(folder: Path) -> None:
    name, tensor = next(iter(load_file(folder / WEIGHTS).items()))
    with_tensors(folder, **{name: tensor * float("nan")})


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (bit, WEIGHTS),
    "nan": (spoilt, WEIGHTS),
    "alpha": (lambda folder: edited(folder, lora_alpha=31), CONFIG),
    "targets": (lambda folder: edited(folder, target_modules=["q_proj"]), CONFIG),
}


def test_an_adapter_that_was_changed_after_its_run_is_not_used(
    train: Train, settings: dict[str, str], tmp_path: Path
) -> None:
    train(train__steps="2")
    run = folder_of(settings)
    shutil.copytree(run / "adapter", tmp_path / "kept")
    edited(run / "adapter", base_model_name_or_path="org/name", revision="main")
    assert finished_run(run).result.adapter_weights
    for damage, named in DAMAGE.values():
        shutil.rmtree(run / "adapter")
        shutil.copytree(tmp_path / "kept", run / "adapter")
        damage(run / "adapter")
        for use in (lambda: trained_run(run), lambda: rescore(run, [], Quiet())):
            with pytest.raises(VerificationError, match=f"{named} is not the one that the run"):
                use()
    (run / "adapter" / CONFIG).write_text("{")
    with pytest.raises(ConfigError, match=CONFIG):
        rescore(run, [], Quiet())


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("layers", ["layers.1.self_attn.q_proj", ""])
def test_an_adapter_that_cannot_learn_is_refused_by_its_name(
    train: Train, settings: dict[str, str], tiny_base: Path, tmp_path: Path, layers: str
) -> None:
    start = make(tmp_path / "start", tiny_base)
    tensors = {name: tensor * 0 for name, tensor in load_file(start / WEIGHTS).items() if layers in name}
    with_tensors(start, **tensors)
    with pytest.raises(ConfigError, match=rf"adapter\.start=.*start: A and B of {len(tensors) // 2} of its \d+ layers"):
        train(train__steps="2", adapter__start=str(start))
    assert not folder_of(settings).exists()


def test_an_adapter_with_a_router_is_told_at_the_start(tmp_path: Path) -> None:
    base, lines = tmp_path / "base", list[str]()
    save_member(Member("text", "qwen3_moe"), base)
    start = make(tmp_path / "start", base, target_modules=["q_proj", "gate"])
    place = locate_base(str(base), revision=None, cache_dir=tmp_path, announce=lines.append)
    check_adapter(str(start), ["all-linear"], place, lines.append, rank=16)
    told = "\n".join(lines)
    assert "adapts what is left alone by default (router)" in told and "cannot be exported for other programs" in told
