"""The layers that get LoRA, in every family: on skeletons, as plain PEFT reads them, and in steps of tiny models."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from qdpo.errors import ConfigError
from qdpo.export.merge.lora import read_lora
from qdpo.model.base.text_model import decoder_path
from qdpo.model.policy import adapter
from qdpo.model.policy.peft_names import peft_names
from qdpo.model.policy.targets import LoraTargets, is_plain, lora_targets, unusual
from tests.matrix.configs import TEXT, TINY, text_config
from tests.matrix.folders import FOLDERS
from tests.matrix.members import randomise

pytestmark = pytest.mark.filterwarnings("ignore")
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# What may be left alone, by the names that transformers gives it: whatever else is linear is adapted.
LEFT = re.compile(
    r".*\.(router(\.proj|\.classifier|\.gate)?|gate\.wg|shared_expert_gate|indexer\..*|compressor\..*|\w*hyper_connection\w*\..*|"
    r"altup\.\w+|dt_proj|self_attn\.o_a_proj)"
)
MIXERS_OUTPUT = re.compile(r".*\.(mamba|mixer)\.out_proj")
DENSE = (
    "llama",
    "mistral",
    "qwen3",
    "gemma3 (text)",
    "gemma4 (text)",
    "phi3",
    "glm4",
    "olmo3",
    "starcoder2",
    "minicpm3",
)
# Of each kind of mixing layer, of PEFT's rewriting, and of special linear classes.
KINDS = ("granitemoehybrid", "falcon_h1", "nemotron_h", "lfm2", "llama4 (text)", "glm4_moe_lite")


def skeleton(family: str) -> Any:
    with torch.device("meta"):
        return hf.AutoModelForCausalLM.from_config(text_config(TEXT[family], TINY, **IDS))


def layers_of(model: Any) -> set[str]:
    """The layers that a PEFT model adapts, as modules or as parameters."""
    return {
        name.replace(".base_layer", "")
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }


def settings_of(model: Any, chosen: LoraTargets) -> dict[str, Any]:
    names = peft_names(model, chosen.adapted)
    fields = {"target_modules": names.modules or None, "target_parameters": names.parameters or None}
    return {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **fields}


@pytest.mark.parametrize("family", TEXT)
def test_everything_linear_is_adapted_but_what_decides_or_cannot_learn(family: str) -> None:
    model = skeleton(family)
    chosen = lora_targets(model)
    linear = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    head = next(name for name, one in linear.items() if one is model.get_output_embeddings())
    assert head not in chosen.adapted
    allowed = {name for name in linear if LEFT.fullmatch(name)} | {head}
    if family in ("falcon_h1", "nemotron_h"):
        allowed |= {name for name in linear if MIXERS_OUTPUT.fullmatch(name)}
    assert set(chosen.adapted) == set(linear) - allowed
    assert {name: (linear[name].in_features, linear[name].out_features) for name in chosen.adapted} == chosen.adapted
    assert all(is_plain(linear[name]) for name in chosen.adapted)
    shared = [
        name for name in linear if re.search(r"shared_(expert|experts|mlp)\.\w+$|layers\.0\.mlp\.\w+_proj$", name)
    ]
    assert set(shared) <= set(chosen.adapted)


@pytest.mark.parametrize("family", TEXT)
def test_plain_peft_adapts_exactly_the_chosen_layers(family: str) -> None:
    """No stacked expert and no router, whatever PEFT makes of names in this family."""
    model = skeleton(family)
    chosen = lora_targets(model)
    settings = settings_of(model, chosen)
    plain = get_peft_model(skeleton(family), LoraConfig(**settings), low_cpu_mem_usage=True)
    assert layers_of(plain) == set(chosen.adapted)
    weights = [f".{name}.weight" for name in chosen.adapted]
    for one in settings["target_parameters"] or []:
        assert any(weight.endswith(f".{one}") for weight in weights)
    ours = adapter.new_adapter(skeleton(family), rank=4, alpha=8, targets=["all-linear"], rslora=False, seed=0)
    shapes = [{k: v.shape for k, v in one.named_parameters() if v.requires_grad} for one in (ours, plain)]
    assert shapes[0] == shapes[1] and sum(shape.numel() for shape in shapes[0].values()) == chosen.numbers(4)


@pytest.mark.parametrize("family", DENSE)
def test_dense_families_get_what_all_linear_gave_before(family: str) -> None:
    ours = adapter.new_adapter(skeleton(family), rank=4, alpha=8, targets=["all-linear"], rslora=False, seed=0)
    before = adapter.adapter_of_0_1(skeleton(family), rank=4, alpha=8, targets=["all-linear"], rslora=False, seed=0)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in before.named_parameters()]
    assert not ours.peft_config["default"].target_parameters


@pytest.mark.parametrize("name", FOLDERS)
def test_nothing_outside_the_text_decoder_is_adapted(name: str) -> None:
    config = FOLDERS[name](TINY, IDS)
    try:
        with torch.device("meta"):
            model = hf.AutoModelForImageTextToText.from_config(config)
    except (ImportError, ValueError) as error:
        pytest.skip(f"transformers builds no whole class: {error}")
    inside = decoder_path(model)
    chosen = lora_targets(model)
    assert inside and chosen.adapted and all(path.startswith(f"{inside}.") for path in chosen.adapted)
    outside = [n for n, one in model.named_modules() if isinstance(one, nn.Linear) and not n.startswith(f"{inside}.")]
    said = {path for paths in chosen.left.values() for path in paths}
    assert {path for path in outside if model.get_submodule(path) is not model.get_output_embeddings()} <= said
    assert layers_of(get_peft_model(model, LoraConfig(**settings_of(model, chosen)), low_cpu_mem_usage=True)) == set(
        chosen.adapted
    )


def tiny(family: str) -> Any:
    """A model whose weights are large enough that every part shows in its output."""
    torch.manual_seed(1)
    model = hf.AutoModelForCausalLM.from_config(text_config(TEXT[family], TINY, **IDS), dtype=torch.float32)
    randomise(model)
    return model.eval().requires_grad_(False)


def slopes(model: Any) -> Iterator[tuple[str, torch.Tensor | None]]:
    """The gradient of each B of an untouched adapter, by layer."""
    ids = torch.randint(3, TINY.vocabulary, (2, 40), generator=torch.Generator().manual_seed(3))
    logits = model(input_ids=ids, use_cache=False).logits
    (logits.float() * torch.randn(logits.shape, generator=torch.Generator().manual_seed(4))).sum().backward()
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            yield name.partition(".lora_B.")[0].removeprefix("base_model.model."), parameter.grad


def check_learns(family: str, folder: Path) -> None:
    model = adapter.new_adapter(tiny(family), rank=4, alpha=8, targets=["all-linear"], rslora=False, seed=0)
    chosen = lora_targets(skeleton(family))
    reached = {name for name, slope in slopes(model) if slope is not None and slope.any()}
    assert reached == set(chosen.adapted)
    ids = torch.randint(3, TINY.vocabulary, (1, 30), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        bare = model(input_ids=ids).logits
        for name in sorted({re.sub(r"\.\d+\.", ".#.", name): name for name in chosen.adapted}.values()):
            b_NR = model.get_submodule(f"base_model.model.{name}").lora_B["default"].weight
            b_NR.normal_(std=0.3, generator=torch.Generator().manual_seed(6))
            assert not torch.equal(model(input_ids=ids).logits, bare), name
            b_NR.zero_()
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
        tuned = model(input_ids=ids).logits
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(tiny(family), folder)
        # A weight named as a parameter is added to before the product.
        assert (again.eval()(input_ids=ids).logits - tuned).abs().max() <= 2e-4 * tuned.abs().max()
    assert layers_of(again) == set(chosen.adapted) == set(read_lora(folder).layers)


@pytest.mark.parametrize("family", KINDS)
def test_each_adapted_layer_changes_the_output_and_learns(family: str, tmp_path: Path) -> None:
    check_learns(family, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in TEXT if name not in KINDS])
def test_each_adapted_layer_of_every_family_learns(family: str, tmp_path: Path) -> None:
    check_learns(family, tmp_path)


REFUSED = {
    ("llama4 (text)", "router"): "decides which experts",
    ("falcon_h1", "out_proj"): "plain PEFT refuses LoRA",
    ("deepseek_v32", "wq_b"): "it only chooses keys",
    ("llama", "embed_tokens"): "not a linear layer",
    ("qwen3_moe", "gate"): "decides which experts",
    ("qwen3_moe", "experts"): "each sees few tokens",
}


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_a_name_that_cannot_learn_is_refused_with_its_reason(family: str, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"adapter\.targets names {name},.*({REFUSED[family, name]})"):
        adapter.choose_targets(skeleton(family), [name])


def test_names_of_the_user_are_his_within_the_decoder() -> None:
    model = skeleton("qwen2_moe")
    chosen = adapter.choose_targets(model, ["v_proj", "shared_expert_gate"])
    assert {name.rpartition(".")[2] for name in chosen.adapted} == {"v_proj", "shared_expert_gate"}
    assert list(unusual(model, chosen)) == ["expert gate"] and not chosen.left
    whole = adapter.choose_targets(skeleton("llama"), ["model.layers.1.mlp.up_proj"])
    assert list(whole.adapted) == ["model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize("names", [["gate_proj", "up_proj", "down_proj"], ["down_proj"], ["shared_experts.up_proj"]])
def test_names_that_peft_takes_for_experts_mean_the_layers_of_that_name(names: list[str]) -> None:
    model = adapter.new_adapter(skeleton("glm4_moe_lite"), rank=4, alpha=8, targets=names, rslora=False, seed=0)
    found = layers_of(model)
    every = [name for name, one in skeleton("glm4_moe_lite").named_modules() if isinstance(one, nn.Linear)]
    assert found == {name for name in every if name.endswith(tuple(f".{one}" for one in names))}


class Tuple(nn.Linear):
    """A linear layer of a family unknown here, which returns more than a product."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


class Block(nn.Module):
    def __init__(self, *, experts: bool) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(8, 16), nn.Linear(8, 16)
        self.special = Tuple(8, 8)
        if experts:
            self.experts = nn.ModuleList([nn.ModuleDict({"w1": nn.Linear(8, 8)}) for _ in range(2)])


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Module()
        self.text.table = nn.Embedding(4, 8)
        self.text.blocks = nn.ModuleList([Block(experts=False), Block(experts=True)])
        self.eye = nn.Linear(8, 8)
        self.config = SimpleNamespace(model_type="unknown")

    def get_input_embeddings(self) -> nn.Module:
        return self.text.table

    def get_output_embeddings(self) -> None:
        return None


def test_an_unknown_family_is_read_by_its_structure() -> None:
    """A gate is a router next to experts, and a projection elsewhere; special classes and parts outside are left."""
    chosen = lora_targets(Unknown(), "text")
    assert list(chosen.adapted) == ["text.blocks.0.gate", "text.blocks.0.up", "text.blocks.1.up"]
    assert {label: len(found) for label, found in chosen.left.items()} == {
        "special linear layer": 2, "router": 1, "experts": 2, "eye": 1,
    }  # fmt: skip


def test_a_class_of_its_own_that_computes_as_a_linear_layer_is_one() -> None:
    """Falcon's layers are a subclass that multiplies in another order; Llama 4's router returns a tuple."""
    with torch.device("meta"):
        falcon = hf.AutoModelForCausalLM.from_config(
            hf.FalconConfig(vocab_size=160, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        )
    layers = {name for name, module in falcon.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"}
    assert type(falcon.transformer.h[0].mlp.dense_h_to_4h) is not nn.Linear
    assert set(lora_targets(falcon).adapted) == layers and len(layers) == 8


def test_the_line_on_screen() -> None:
    line = lora_targets(skeleton("qwen3_moe")).sentence(16)
    assert line == (
        "adapter: 16 linear layers (q_proj, k_proj, v_proj, o_proj), 28,672 trained numbers; left alone: experts (4), "
        "router (4)"
    )
    assert adapter.adapted(text_config(TEXT["llama"], TINY, **IDS))["model.layers.0.mlp.down_proj"] == (128, 64)


def test_all_linear_stands_alone() -> None:
    with pytest.raises(ConfigError, match=r"adapter.targets=all-linear\+q_proj: all-linear must be the only name"):
        adapter.choose_targets(skeleton("llama"), ["all-linear", "q_proj"])
