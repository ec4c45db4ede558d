"""An adapter of another kit is trained as plain PEFT means it, merges and exports so, or is refused before loading."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from qdpo.errors import ConfigError, VerificationError
from qdpo.export import plain_peft
from qdpo.export.gguf.adapter import write_gguf_adapter
from qdpo.export.merge.lora import read_lora
from qdpo.export.merge.source import open_source
from qdpo.export.trained import TrainedRun
from qdpo.model.base import quant
from qdpo.model.base.fetch import BaseFolder
from qdpo.model.base.load import model_config
from qdpo.model.base.text_model import text_model
from qdpo.model.fast.logps import Head
from qdpo.model.policy import adapter, lora_fit
from qdpo.model.policy.adapter_source import check_adapter, model_name
from qdpo.review.open import reopen
from qdpo.run.finished import finished_run
from qdpo.run.folder import RunDir
from qdpo.run.record import read_record, write_record
from qdpo.train.start.open_run import _check_weights
from tests.conftest import Quiet, save_tiny_base
from tests.export.runs import adapt
from tests.model.adapters import CONFIG, WEIGHTS, edited, load, logits, make, with_tensors, write_config
from tests.model.multimodal import save_folder, whole_model
from tests.run.made import write_records

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT thinks little of some of these itself
Q, A, B = "base_model.model.model.layers.0.self_attn.q_proj", ".lora_A.weight", ".lora_B.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_base(tmp_path_factory.mktemp("others") / "base")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make(tmp_path_factory.mktemp("others") / "plain", base)


def check(folder: Path, base: Path, **changes: Any) -> list[str]:
    lines: list[str] = []
    fields = {"folder": base, "source": str(base), "name": str(base), "commit": None, "license": None, "revision": None}
    check_adapter(str(folder), ["all-linear"], BaseFolder(**{**fields, **changes}), lines.append)
    return lines


def policy_of(model: Any) -> adapter.Policy:
    causal = model.get_base_model()
    return adapter.Policy(model, causal.base_model, Head.of(causal), torch.device("cpu"), "separate", 64)


TRAINED: dict[str, dict[str, Any]] = {
    "plain": {},
    "gaussian": {"init_lora_weights": "gaussian"},
    "eva": {"init_lora_weights": "eva"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "no start": {"init_lora_weights": False},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"v_proj": 9}, "alpha_pattern": {"q_proj": 5}},
    "patterns as regular expressions": {"rank_pattern": {r"^model\.layers\.1\..*": 3}, "alpha_pattern": {".*_proj": 7}},
    "one layer": {"layers_to_transform": [1]},
    "a layer as a number": {"layers_to_transform": 0},
    "layers by pattern": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "layers by patterns": {"layers_to_transform": [1], "layers_pattern": ["blocks", "layers"]},
    "without some": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "model.layers.0.mlp.up_proj"]},
    "without a pattern": {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"},
    "a regular expression": {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"},
    "all linear": {"target_modules": "all-linear"},
    "no task": {"task_type": None},
    "turned": {"fan_in_fan_out": True},
    "dropout": {"lora_dropout": 0.3},
    "a layer by its weight": {"target_parameters": ["self_attn.k_proj.weight"]},
    "layers by their weights alone": {"target_modules": None, "target_parameters": ["k_proj.weight", "up_proj.weight"]},
    "of whole names": {"target_modules": ["model.layers.0.self_attn.q_proj", "o_proj"]},
}


@pytest.mark.parametrize("variant", TRAINED)
def test_it_is_what_plain_peft_makes_of_it(variant: str, base: Path, tmp_path: Path) -> None:
    start = make(tmp_path / "start", base, **TRAINED[variant])
    assert check(start, base) == []
    untouched = load(base)
    checksum = quant.weights_checksum(untouched)
    expected, bare = logits(PeftModel.from_pretrained(load(base), start)), logits(untouched)
    model = adapter.start_adapter(untouched, start)
    # PEFT adds B·A to a weight that is named as a parameter, which rounds in another order.
    tolerance = 2e-5 if "target_parameters" in TRAINED[variant] else 0.0
    assert (logits(model) - expected).abs().max() <= tolerance and (expected - bare).abs().max() > 0.1
    assert quant.weights_checksum(model.get_base_model()) == checksum
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
    assert all(one.dtype == torch.float32 for one in model.parameters() if one.requires_grad)

    saved = tmp_path / "saved"
    adapter.save_adapter(policy_of(model), saved, base_name=str(base), revision=None)
    assert (logits(PeftModel.from_pretrained(load(base), saved)) - expected).abs().max() <= tolerance
    before, after = (json.loads((folder / CONFIG).read_text()) for folder in (start, saved))
    for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "r"):
        assert isinstance(after[name], type(before[name])), name
        assert after[name] == (
            sorted(before[name]) if name.endswith("_modules") and isinstance(before[name], list) else before[name]
        )

    plain_peft.write_normal(saved, base, tmp_path / "normal")
    assert (logits(PeftModel.from_pretrained(load(base), tmp_path / "normal")) - expected).abs().max() < 2e-5
    merged = load(base)
    for name, layer in read_lora(saved).layers.items():
        merged.get_submodule(name).weight.data += layer.delta_NK
    assert (logits(merged) - expected).abs().max() < 2e-5
    assert write_gguf_adapter(saved, base, tmp_path / "adapter.gguf", quant="f32", name="tuned") < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_16_bits_are_taken_as_they_are(dtype: torch.dtype, base: Path, plain: Path, tmp_path: Path) -> None:
    make(tmp_path, base)
    with_tensors(tmp_path, **{name: one.to(dtype) for name, one in load_file(plain / WEIGHTS).items()})
    model = adapter.start_adapter(load(base, torch.bfloat16), tmp_path)
    held = load_file(tmp_path / WEIGHTS)
    for name, tensor in lora_fit.saved_state(model).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, held[name].float())


# Made by PEFT itself; how the message names what is wrong.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights='olora'.*path_initial_model_for_weight_conversion"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'.*path_initial_model_for_weight_conversion"),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
    "mica": ({"init_lora_weights": "mica"}, "init_lora_weights='mica'"),
    "dora": ({"use_dora": True}, "use_dora"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "all biases": ({"bias": "all"}, "bias='all'"),
    "its biases": ({"bias": "lora_only"}, "bias='lora_only'"),
    "whole layers": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "the embeddings, whole": ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    "rows of the table": ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "alora": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
    "the head": ({"target_modules": ["q_proj", "lm_head"]}, "output head lm_head, which must stay frozen"),
    "the head by a pattern": ({"target_modules": ".*(q_proj|lm_head)"}, "output head lm_head, which must stay frozen"),
    "the embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    "layers twice": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "tied": ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    "monteclora": ({"monteclora_config": {"num_samples": 2}}, "monteclora_config"),
}  # fmt: skip


@pytest.mark.parametrize("variant", REFUSED)
def test_what_needs_more_than_a_and_b_is_refused_before_loading(variant: str, base: Path, tmp_path: Path) -> None:
    changes, message = REFUSED[variant]
    start = make(tmp_path / "start", base, **changes)
    with pytest.raises(ConfigError, match=r"adapter_config\.json|adapter_model\.safetensors") as refused:
        check(start, base)
    refused.match(message)


def rows(base: Path, folder: Path) -> Path:
    """The adapter of a model whose vocabulary was resized: PEFT saves embeddings and head with it."""
    table = torch.randn(310, 64)
    return with_tensors(
        folder, **{f"base_model.model.{n}.weight": table.clone() for n in ("model.embed_tokens", "lm_head")}
    )


def layer(folder: Path, old: str, new: str, inputs: int, outputs: int) -> Path:
    """The adapter with one layer more."""
    name = Q.replace(old, new)
    return with_tensors(folder, **{name + A: torch.ones(4, inputs), name + B: torch.ones(outputs, 4)})


def folder_instead(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def targets(folder: Path, *more: str) -> Path:
    return edited(folder, target_modules=["q_proj", "v_proj", *more])


Fault = Callable[[Path, Path], Any]
FAULTS: dict[str, tuple[Fault, str]] = {
    "a resized vocabulary": (lambda f, b: rows(b, f), "vocabulary was resized"),
    "a tensor too few": (lambda f, b: with_tensors(f, **{Q + B: None}), rf"{WEIGHTS}.*lacks the tensor .*q_proj"),
    "a layer too few": (lambda f, b: with_tensors(f, **{Q + A: None, Q + B: None}), "lacks 2 that"),
    "a layer too many": (lambda f, b: layer(f, "q_", "k_", 64, 32), "holds 2 that .* does not name"),
    "a layer that the base has not": (lambda f, b: layer(f, ".0.", ".7.", 64, 64), "such as .*layers.7"),
    "the name of the adapter in the keys": (
        lambda f, b: with_tensors(f, **{Q + ".lora_A.default.weight": torch.ones(4, 64)}), "not the A or B",
    ),
    "a bias": (lambda f, b: with_tensors(f, **{Q + ".lora_B.bias": torch.ones(64)}), "not the A or B"),
    "a magnitude": (lambda f, b: with_tensors(f, **{Q + ".lora_magnitude_vector": torch.ones(64)}), "not the A or B"),
    "another rank": (lambda f, b: edited(f, r=8), r"shape \[4, 64\].*want \[8, 64\]"),
    "a rank of billions": (lambda f, b: edited(f, r=2**20), "want"),
    "ranks that differ": (lambda f, b: with_tensors(f, **{Q + A: torch.ones(3, 64)}), "ranks of A .* differ"),
    "another width": (lambda f, b: with_tensors(f, **{Q + A: torch.ones(4, 65)}), r"\[4, 65\].*want \[4, 64\]"),
    "a vector": (lambda f, b: with_tensors(f, **{Q + A: torch.ones(64)}), "not a matrix"),
    "an empty tensor": (lambda f, b: with_tensors(f, **{Q + A: torch.ones(0, 64)}), "not a matrix"),
    "float64": (lambda f, b: with_tensors(f, **{Q + A: torch.ones(4, 64, dtype=torch.float64)}), "as F64"),
    "integers": (lambda f, b: with_tensors(f, **{Q + A: torch.ones(4, 64, dtype=torch.int8)}), "as I8"),
    "no tensors": (lambda f, b: (f / WEIGHTS).write_bytes(b"\x02\0\0\0\0\0\0\0{}"), "no tensors"),
    "cut": (lambda f, b: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "not a sound safetensors file"),
    "no safetensors": (lambda f, b: (f / WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(99)), "not a sound safetensors"),
    "empty": (lambda f, b: (f / WEIGHTS).write_bytes(b""), "not a sound safetensors file"),
    "pickle": (lambda f, b: (f / WEIGHTS).rename(f / "adapter_model.bin"), "Only safetensors files are read"),
    "a folder": (lambda f, b: folder_instead(f), "Only safetensors files are read"),
    "a misspelt target": (lambda f, b: targets(f, "v_prj"), "names v_prj.*mean v_proj"),
    "a target of another family": (lambda f, b: targets(f, "c_attn"), "names c_attn"),
    "a target that is no layer": (lambda f, b: targets(f, "self_attn"), "does not fit"),
    "the letters of a pattern": (lambda f, b: edited(f, target_modules=[*"_jopqr"]), "names _, j, o"),
    "a layer named twice": (
        lambda f, b: edited(f, target_parameters=["self_attn.q_proj.weight"]), "names .*q_proj, which target_modules",
    ),
    "a pattern that ends early": (lambda f, b: edited(f, target_modules=".*(q_proj"), "cannot be used"),
    "a pattern that matches nothing": (lambda f, b: edited(f, target_modules="q_proj"), "does not fit"),
    "a broken key": (lambda f, b: edited(f, alpha_pattern={"q_(": 3}), "cannot be used"),
    "a layer out of range": (lambda f, b: edited(f, layers_to_transform=[0, 1, 2]), r"no layer 2"),
    "a layer below 0": (lambda f, b: edited(f, layers_to_transform=[0, -1]), "no layer -1"),
    "no layer at all": (lambda f, b: edited(f, layers_to_transform=[9]), "does not fit"),
    "layers beside a pattern": (
        lambda f, b: edited(f, layers_to_transform=[0], target_modules=".*q_proj"), "layers_to_transform",
    ),
    "layers of a list that is not there": (
        lambda f, b: edited(f, layers_to_transform=[0], layers_pattern="h"), "does not fit",
    ),
    "all excluded": (lambda f, b: edited(f, exclude_modules=["q_proj", "v_proj"]), "does not fit"),
    "experts of a dense model": (lambda f, b: edited(f, target_parameters=["mlp.experts"]), "target_parameters"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_does_not_fit_is_refused_before_loading(
    fault: str, base: Path, plain: Path, tmp_path: Path
) -> None:
    make(tmp_path, base)
    damage, message = FAULTS[fault]
    damage(tmp_path, base)
    with pytest.raises(ConfigError, match=message):
        check(tmp_path, base)


def test_a_pattern_that_never_ends_is_stopped(
    base: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora_fit, "MATCH_S", 1.0)
    edited(make(tmp_path, base), target_modules=r"((\w|\.)+)+\d\d$")
    with pytest.raises(ConfigError, match="do not end on the base's"):
        check(tmp_path, base)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_are_refused(value: float, base: Path, plain: Path, tmp_path: Path) -> None:
    bad = load_file(plain / WEIGHTS)[Q + B]
    bad[3, 1] = value
    with_tensors(make(tmp_path, base), **{Q + B: bad})
    with pytest.raises(ConfigError, match=f"{WEIGHTS} holds {Q}{B}, of which 1 numbers"):
        adapter.start_adapter(load(base), tmp_path)
    with pytest.raises(ConfigError, match="NaN"):
        read_lora(tmp_path)


def test_a_misspelt_name_beside_a_right_one_is_refused(base: Path) -> None:
    bare = lora_fit.skeleton(model_config(base))
    for targets in (["q_proj", "v_prj"], ["v_prj"], ["q_proj", "qkv_projj"]):
        with pytest.raises(ConfigError, match=r"adapter\.targets names .*prj|projj.*Did you mean [qv]_proj"):
            adapter.choose_targets(bare, targets)
    adapter.choose_targets(bare, ["q_proj", "v_proj"])
    adapter.choose_targets(bare, ["all-linear"])


def test_a_base_that_peft_changed_is_noticed(base: Path, tmp_path: Path) -> None:
    """The guard behind the refusal: whatever PEFT does as it attaches an adapter, the base's bytes are the same."""
    from qdpo.train.policy.build import check_base_unchanged

    bare = load(base)
    checksum = quant.weights_checksum(bare)
    changed = PeftModel.from_pretrained(bare, make(tmp_path, base, init_lora_weights="olora"))
    with pytest.raises(VerificationError, match="changed the base's weights"):
        check_base_unchanged(changed, checksum)


def test_what_is_written_is_loaded_once(
    base: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(adapter.start_adapter(load(base), plain))
    for field, value in {"target_modules": ["q", "_"], "use_rslora": True, "init_lora_weights": "olora"}.items():
        write = Path.write_text

        def spoilt(path: Path, text: str, **options: Any) -> int:
            content = json.dumps(json.loads(text) | {field: value}) if path.name == CONFIG else text  # noqa: B023
            return write(path, content, **options)  # noqa: B023

        with monkeypatch.context() as patched, pytest.raises(VerificationError, match="written"):
            patched.setattr(Path, "write_text", spoilt)
            adapter.save_adapter(policy, tmp_path / field, base_name=str(base), revision=None)


def test_a_damaged_folder_of_a_run_is_named(base: Path, plain: Path, tmp_path: Path) -> None:
    policy = policy_of(adapter.start_adapter(load(base), plain))
    adapter.load_adapter_folder(policy, plain)
    folder = make(tmp_path, base)
    for change in ({"lora_alpha": 13}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 5}}):
        edited(make(tmp_path, base), **change)
        with pytest.raises(VerificationError, match=f"{CONFIG} scales"):
            adapter.load_adapter_folder(policy, folder)
    with_tensors(make(tmp_path, base), **{Q + A: None, Q + B: None})
    with pytest.raises(VerificationError, match="does not belong"):
        adapter.load_adapter_folder(policy, folder)
    with_tensors(make(tmp_path, base), **{Q + A: torch.ones(5, 64), Q + B: torch.ones(64, 5)})
    with pytest.raises(VerificationError, match="does not belong"):
        adapter.load_adapter_folder(policy, folder)


def test_the_base_that_the_adapter_names_is_compared(base: Path, plain: Path, tmp_path: Path) -> None:
    other = save_tiny_base(tmp_path / "other", initializer_range=0.3)
    copy = save_tiny_base(tmp_path / "copy")
    with pytest.raises(ConfigError, match="trained over .*base, and model.path is another model"):
        check(plain, other, name=str(other))
    assert check(plain, copy, name=str(copy)) == []
    named = make(tmp_path / "named", base)

    def said(name: Any, hub: str) -> str:
        return "\n".join(check(edited(named, base_model_name_or_path=name), base, name=hub, source=hub))

    llama = "meta-llama/Llama-3.1-8B-Instruct"
    assert said(llama, llama) == said(llama.lower(), llama) == ""
    assert said("/home/me/hub/models--meta-llama--Llama-3.1-8B-Instruct/snapshots/0a/", llama) == ""
    assert said("/data/models/Llama-3.1-8B-Instruct", llama) == ""
    for rename in ("unsloth/Llama-3.1-8B-Instruct-bnb-4bit", "unsloth/Meta-Llama-3.1-8B-Instruct-unsloth-bnb-4bit"):
        assert "warning" in said(rename, llama) and "the same model in another form" in said(rename, llama)
    for lost in (None, ""):
        assert "does not name the base" in said(lost, llama)
    assert "not on this machine" in said("/data/checkpoint-300", llama)
    assert "cannot be compared with the folder" in said(llama, str(base))
    for another in ("meta-llama/Llama-3.1-8B", "Qwen/Qwen2.5-7B-Instruct", "models/sft"):
        with pytest.raises(ConfigError, match=r"another model.*base_model_name_or_path in .*adapter_config\.json"):
            said(another, llama)


def test_names_of_a_model_in_other_forms() -> None:
    assert model_name("unsloth/Qwen3-8B-unsloth-bnb-4bit") == model_name("Qwen/Qwen3-8B") == "qwen3-8b"
    assert model_name("TheBloke/Mistral-7B-v0.1-AWQ") == model_name("/x/mistral-7b-v0.1/")
    assert model_name("Qwen/Qwen3-8B") != model_name("Qwen/Qwen3-8B-Base")


def test_another_scale_is_another_reference(base: Path, plain: Path, tmp_path: Path) -> None:
    from qdpo.train.policy.build import adapter_identity

    folder = make(tmp_path, base)
    names = {adapter_identity(folder)}
    for change in ({"lora_alpha": 13}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 5}}):
        names.add(adapter_identity(edited(make(tmp_path, base), **change)))
    assert len(names) == 4
    assert adapter_identity(edited(make(tmp_path, base), base_model_name_or_path="x")) in names


def test_a_config_alone_is_no_adapter(base: Path, tmp_path: Path) -> None:
    write_config(tmp_path)
    with pytest.raises(ConfigError, match="not a sound safetensors file"):
        check(tmp_path, base)


def test_an_adapter_over_a_whole_checkpoint_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    base = save_folder(whole_model("gemma3"), tmp_path / "base")
    auto: Any = AutoModelForImageTextToText
    over = auto.from_pretrained(base)
    adapt(over, target_modules=r".*language_model.*\.(q_proj|down_proj)").save_pretrained(tmp_path / "whole")
    run = make_records(tmp_path / "run", base, tmp_path / "whole")
    place = BaseFolder(base, str(base), str(base), None, None, None)
    for act in (
        lambda: check_adapter(str(tmp_path / "whole"), ["all-linear"], place, print),
        lambda: reopen(run.path, ["memory.tokens_per_row=512"], Quiet()),
        lambda: open_source(finished_run(run.path), print),
        lambda: plain_peft.write_normal(run.adapter, base, tmp_path / "out"),
    ):
        with pytest.raises(
            ConfigError, match=r"over the whole checkpoint \(Gemma3ForConditionalGeneration\).* 8 of its 8"
        ):
            act()
    loaded: Any = SimpleNamespace(weights="other", marks={})
    write_record(run, replace(read_record(run), weights="one"))
    with pytest.raises(ConfigError, match=r"qdpo 0\.1 loaded the whole checkpoint \(Gemma3ForConditionalGeneration\)"):
        _check_weights(run, place, loaded, text_model(base))


def make_records(path: Path, base: Path, adapter: Path) -> RunDir:
    """A finished run as 0.1.0 left it over a multimodal checkpoint."""
    run = RunDir(path)
    run.path.mkdir()
    shutil.copytree(adapter, run.adapter)
    write_records(run, base, ["data.path=unused.jsonl", "model.device=cpu", "model.quantization=none"], marks={})
    return run


def test_a_base_that_was_moved_is_not_looked_for_on_the_hub(base: Path, plain: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    run = make_records(tmp_path / "run", moved, plain)
    for act in (
        lambda: reopen(run.path, ["memory.tokens_per_row=512"], Quiet()),
        lambda: open_source(finished_run(run.path), print),
        lambda: TrainedRun(finished_run(run.path)).base(print),
    ):
        with pytest.raises(ConfigError, match=r"The base of .* is not there: it was trained over the folder .*moved"):
            act()
