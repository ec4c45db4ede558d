"""Originals in FP8 and MXFP4: the very weights that transformers makes of them, one at a time; damage by its name."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from qdpo.errors import ConfigError
from qdpo.families.stored_form import StoredForm, stored_form
from qdpo.model.base import dequantise, quant
from qdpo.model.base.dequantise import Dequantised, Lazily, plain_tensors
from qdpo.model.base.expected import check_folder
from qdpo.model.base.expert_stack import FourBitStack, quantised
from qdpo.model.base.load import load_base
from qdpo.model.base.quant import FourBit
from tests.model.multimodal import Names, save_folder, whole_model
from tests.model.packed import (
    BLOCKS,
    MINISTRAL,
    ORIGINALS,
    STATIC,
    edit,
    in_eight_bits,
    pack,
    rewrite,
    save_original,
    stated,
)

CPU = torch.device("cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# transformers takes the size of a block from weight and scales, so it must divide the weight's.
EVEN = {"deepseek_v3": {"weight_block_size": [8, 8]}}
Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    return lambda name, **changes: save_original(name, tmp_path / name, **changes)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_original(name, tmp_path_factory.mktemp("shipped") / name) for name in ORIGINALS}


@pytest.fixture
def copy(shipped: dict[str, Path], tmp_path: Path) -> Save:
    return lambda name: Path(shutil.copytree(shipped[name], tmp_path / name))


def opened(folder: Path, *, quantization: str = "none", dtype: str = "bf16", said: list[str] | None = None) -> Any:
    check_folder(folder)
    return load_base(
        folder, quantization=quantization, double_quant=True, dtype=dtype, device=CPU, attention_name=None,
        announce=[].append if said is None else said.append,
    )  # fmt: skip


def by_transformers(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    method = json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
    form = {"fp8": hf.FineGrainedFP8Config, "mxfp4": hf.Mxfp4Config}[method](dequantize=True)
    model = hf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=form, dtype=dtype)
    found: dict[str, Tensor] = model.state_dict()
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ORIGINALS)
def test_weights_are_those_of_transformers_bit_by_bit(name: str, dtype: str, save: Save) -> None:
    folder = save(name, **EVEN.get(name, {}))
    ours, theirs = opened(folder, dtype=dtype).state_dict(), by_transformers(folder, DTYPES[dtype])
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert value.dtype == ours[key].dtype and torch.equal(value, ours[key]), key


@pytest.mark.parametrize("settings", [STATIC, BLOCKS, {**BLOCKS, "weight_block_size": [1, 1000]}], ids=str)
def test_each_code_is_multiplied_by_the_scale_of_its_block(settings: dict[str, Any], save: Save) -> None:
    folder = save("deepseek_v3", **settings)
    stored, high, wide = load_file(folder / "model.safetensors"), *(settings["weight_block_size"] or (10**9, 10**9))
    packed = [one for one in plain_tensors(folder).values() if isinstance(one, Dequantised)]
    assert len(packed) > 20
    for one in packed:
        codes = stored[one.name].double()
        scales = stored[f"{one.name}_scale_inv"].double().reshape(-(-codes.shape[0] // high), -1)
        i, j = (torch.arange(size) // edge for size, edge in zip(codes.shape, (high, wide), strict=True))
        assert torch.equal(one.whole(), (codes * scales[i[:, None], j[None]]).float())


def test_every_code_and_exponent_of_mxfp4(tmp_path: Path) -> None:
    """All but the largest exponents, with which 6 would be infinite."""
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 253, 1, 1)
    scales = torch.arange(253, dtype=torch.uint8).view(1, 253, 1).repeat(1, 1, 16)
    folder = save_original("gpt_oss", tmp_path / "base")
    save_file({"x_blocks": blocks, "x_scales": scales}, folder / "model.safetensors")
    found = plain_tensors(folder)["x"]
    assert isinstance(found, Dequantised)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(found.whole(dtype), convert_moe_packed_tensors(blocks, scales, dtype=dtype))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 1, 1), (3, 2, 1)], ids=str)
def test_a_stack_of_matrices_has_a_scale_for_each_or_one(shape: tuple[int, ...], tmp_path: Path) -> None:
    codes = torch.randn(3, 6, 5).to(torch.float8_e4m3fn)
    scales = torch.rand(shape) + 0.5
    folder = save_original("ministral3", tmp_path / "base")
    save_file({"x": codes, "x_scale_inv": scales}, folder / "model.safetensors")
    found = plain_tensors(folder)["x"].whole()
    rows = scales.repeat_interleave(3, dim=1) if shape == (3, 2, 1) else scales.reshape(-1, 1, 1)
    assert torch.equal(found, codes.float() * rows)


def test_scales_that_are_powers_of_two(save: Save) -> None:
    def in_powers(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if name.endswith("_scale_inv")]:
            weights[name] = torch.exp2(torch.log2(weights[name]).round()).to(torch.float8_e8m0fnu)

    folder = save("deepseek_v3", weight_block_size=[8, 8], scale_fmt="ue8m0")
    rewrite(folder, in_powers)
    theirs = by_transformers(folder, torch.bfloat16)
    assert all(torch.equal(value, theirs[key]) for key, value in opened(folder).state_dict().items())


@pytest.mark.parametrize("names", ["inner", "outer"])
def test_a_multimodal_original_gives_its_text_model(names: Names, tmp_path: Path) -> None:
    """Ministral 3 is shipped so: the text part in FP8 with activation scales, tower and projector in 16 bits."""
    plain = save_folder(whole_model("mistral3").bfloat16(), tmp_path / "plain", names)
    folder = pack(plain, tmp_path / "packed", {**STATIC, "modules_to_not_convert": MINISTRAL})
    weights = {
        name: one.whole(torch.bfloat16) if isinstance(one, Dequantised) else one.whole()
        for name, one in plain_tensors(folder).items()
    }
    assert weights.keys() == load_file(plain / "model.safetensors").keys()
    save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
    ours, theirs = opened(folder).state_dict(), opened(plain).state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("name", ORIGINALS)
def test_the_rest_becomes_nf4_of_the_dequantised_weights(name: str, shipped: dict[str, Path]) -> None:
    said: list[str] = []
    plain, four = opened(shipped[name]), opened(shipped[name], quantization="nf4", said=said)
    experts = name != "ministral3"
    assert "dequantised one by one while loading" in said[0] and len(said) == 1 + experts
    layers = dict(quant.four_bit_layers(four))
    assert len(layers) >= 8
    for module, layer in layers.items():
        weight = plain.get_submodule(module).weight
        expected, _mark = quant.round_trip(weight, FourBit("nf4", True, torch.bfloat16), CPU)
        assert torch.equal(quant.dense_weight(layer, torch.bfloat16), expected), module
    stacks = {key: one for key, one in four.named_modules() if isinstance(one, FourBitStack)}
    assert bool(stacks) == experts
    for key, stack in stacks.items():
        for expert, weight in enumerate(plain.get_parameter(key)):
            assert torch.equal(stack[expert], quantised(weight, stack.form)[0]), (key, expert)


def test_one_weight_at_a_time_is_held(shipped: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Tensor]] = []
    most, read = [0], Lazily.__getitem__

    def counted(self: Lazily, item: Any) -> Tensor:
        gc.collect()
        most[0] = max(most[0], sum(one() is not None for one in held))
        weight = read(self, item)
        if weight.dim() == 2 and "proj" in self._tensor.name:
            held.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(Lazily, "__getitem__", counted)
    opened(shipped["ministral3"], quantization="nf4")
    assert len(held) == 14 and most[0] <= 1


def test_tiles_of_any_size_give_the_same_weights(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ORIGINALS:
        folder = save(name)
        whole = {key: one.whole() for key, one in plain_tensors(folder).items() if isinstance(one, Dequantised)}
        monkeypatch.setattr(dequantise, "TILE", 300)
        assert all(torch.equal(one.whole(), whole[key]) for key, one in plain_tensors(folder).items() if key in whole)
        monkeypatch.undo()


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        rewrite(folder, lambda weights: weights.update({name: change(weights[name])}))

    return damage


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda weights: weights.__delitem__(name))


def settings(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: stated(folder, **changes)


def set_to(place: tuple[int, ...], value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[place] = value
        return tensor

    return change


def made_plain(folder: Path) -> None:
    shutil.copy(folder.with_name(folder.name + "-plain") / "model.safetensors", folder)


def without_config(folder: Path) -> None:
    edit(folder, quantization_config=None)


Q = "model.layers.1.self_attn.q_proj.weight"
A = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
E = "model.layers.1.mlp.experts.gate_up_proj"
NAN = 127  # of E4M3, and 255
DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "scale missing": ("ministral3", drop(f"{Q}_scale_inv"), rf"'{Q}' is stored in fp8, but its scales .* are missing"),
    "weight missing": ("ministral3", drop(Q), rf"'{Q}_scale_inv' is a scale, but no tensor"),
    "scales missing": ("gpt_oss", drop(f"{E}_scales"), rf"'{E}_blocks' is stored in mxfp4, but its scales"),
    "blocks missing": ("gpt_oss", drop(f"{E}_blocks"), rf"'{E}_scales' is a scale, but no tensor"),
    "grid": ("deepseek_v3", put(f"{A}_scale_inv", lambda one: one[:, :1].clone()), r"shape \[1, 1\]"),
    "turned": ("deepseek_v3", put(f"{A}_scale_inv", lambda one: one.T.contiguous()), r"shape \[2, 1\]"),
    "no block size": ("deepseek_v3", settings(weight_block_size=None), r"not fit .* and no weight_block"),
    "other block size": ("deepseek_v3", settings(weight_block_size=[64, 64]), r"not fit .*\[64, 64\]"),
    "odd block size": ("deepseek_v3", settings(weight_block_size=[48, 0]), r"is \[48, 0\], not two"),
    "NaN scale": ("ministral3", put(f"{Q}_scale_inv", lambda one: one * torch.nan), rf"'{Q}_scale_inv' hold nan"),
    "negative scale": ("ministral3", put(f"{Q}_scale_inv", lambda one: -one), rf"'{Q}_scale_inv' hold -"),
    "no scale": ("ministral3", put(f"{Q}_scale_inv", lambda one: one * 0), rf"'{Q}_scale_inv' are 0 for a whole"),
    "NaN exponent": ("gpt_oss", put(f"{E}_scales", set_to((1, 2, 0), 255)), rf"'{E}_scales' hold inf"),
    "NaN code": (
        "ministral3", put(Q, lambda one: set_to((3, 4), NAN)(one.view(torch.uint8)).view(torch.float8_e4m3fn)),
        rf"the weight '{Q}' with its scales gives NaN",
    ),
    "blocks of 15": ("gpt_oss", put(f"{E}_blocks", lambda one: one[..., :15].clone()), r"one scale for each 16 bytes"),
    "experts fewer": ("gpt_oss", put(f"{E}_scales", lambda one: one[:3].clone()), r"its scales \[3, 256, 2\]"),
    "other type": ("ministral3", put(Q, lambda one: one.float().to(torch.float8_e5m2)), r"is of the type F8_E5M2"),
    "integers": ("ministral3", put(Q, lambda one: one.float().to(torch.int8)), r"type I8|is a scale"),
    "scales of integers": ("ministral3", put(f"{Q}_scale_inv", lambda one: one.int()), r"scales of the type I32"),
    "fp8 without config": ("ministral3", without_config, r"form of fp8, but config\.json has no"),
    "mxfp4 without config": ("gpt_oss", without_config, r"form of mxfp4, but config\.json has no"),
    "fp8 for mxfp4": ("gpt_oss", settings(quant_method="fp8"), r"in a form of mxfp4, but config\.json says fp8"),
    "mxfp4 for fp8": ("ministral3", settings(quant_method="mxfp4"), r"in a form of fp8, but config\.json says mxfp4"),
    "plain but for config": ("gpt_oss", made_plain, r"says mxfp4, but no tensor of the files is stored so"),
    "plain fp8": ("ministral3", made_plain, r"says fp8, but no tensor of the files is stored so"),
    "kept": ("ministral3", settings(modules_to_not_convert=["model.layers.1.self_attn"]), r"among the modules"),
    "all kept": ("gpt_oss", settings(modules_to_not_convert=["model.layers.*.mlp"]), r"among the modules that are not"),
    "no list": ("gpt_oss", settings(modules_to_not_convert=["lm_head", 7]), r"not a list of module names"),
    "e5m2": ("deepseek_v3", settings(fmt="e5m2"), r"fmt in quantization_config .* is 'e5m2'"),
    "fp4 experts": ("deepseek_v3", settings(expert_dtype="fp4"), r"expert_dtype in .* is 'fp4'"),
    "other width": ("gpt_oss", lambda folder: edit(folder, hidden_size=128), r"config\.json describes"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_by_name(case: str, shipped: dict[str, Path], tmp_path: Path) -> None:
    name, damage, words = DAMAGE[case]
    folder = Path(shutil.copytree(shipped[name], tmp_path / name))
    shutil.copytree(shipped[name].with_name(f"{name}-plain"), tmp_path / f"{name}-plain")
    damage(folder)
    with pytest.raises(ConfigError, match=words):
        opened(folder, quantization="nf4")


def test_values_beyond_fp16_are_named(copy: Save) -> None:
    folder = copy("ministral3")
    put(f"{Q}_scale_inv", lambda one: one * 0 + 1000)(folder)
    opened(folder)
    with pytest.raises(ConfigError, match=r"q_proj\.weight' has values that float16 does not hold.*model\.dtype=bf16"):
        opened(folder, dtype="fp16")


KEPT = StoredForm("fp8", kept=("model.vision_tower", "model.layers.*.self_attn", "lm_head", "mlp.gate"))


@pytest.mark.parametrize(("module", "is_kept"), [
    ("vision_tower.layers.0.proj", True), ("model.vision_tower.proj", True), ("lm_head", True),
    ("language_model.lm_head", True), ("model.layers.11.self_attn.q_proj", True), ("model.layers.3.mlp.gate", True),
    ("model.layers.3.mlp.gate_proj", False), ("my_lm_head", False), ("model.layers.0.mlp.down_proj", False),
])  # fmt: skip
def test_modules_that_are_kept(module: str, is_kept: bool) -> None:
    assert KEPT.keeps(module) == is_kept


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "'Qwen2.5-7B-Instruct'"),
    "awq": ({"quant_method": "awq"}, "TheBloke/Llama-2-7B-AWQ", "'Llama-2-7B'"),
    "compressed": ({"quant_method": "compressed-tensors"}, "RedHatAI/Qwen3-8B-FP8-dynamic", "'Qwen3-8B'"),
    "8 bits": ({"load_in_8bit": True}, "someone/Llama-3.1-8B-bnb-8bit", "'Llama-3.1-8B'"),
    "no ending": ({"quant_method": "hqq"}, "someone/mine", "the ending, such as -GPTQ"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_forms_of_others_are_refused_with_the_name_of_the_original(case: str) -> None:
    about, name, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        stored_form({"quantization_config": about}, f"The repository {name!r}", name)


def test_settings_in_the_text_part_count() -> None:
    found = stored_form({"text_config": {"quantization_config": STATIC}}, "x")
    assert found is not None and found.block is None and found.words == "FP8"


def test_packed_weights_of_the_tests_are_close_to_plain_ones() -> None:
    weight = torch.randn(30, 50)
    codes, scales = in_eight_bits(weight, (16, 16))
    grid = scales.repeat_interleave(16, 0)[:30].repeat_interleave(16, 1)[:, :50]
    assert float((codes.float() * grid - weight).norm() / weight.norm()) < 0.04
