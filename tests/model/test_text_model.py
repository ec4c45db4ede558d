"""Of a multimodal folder the text model alone is loaded, with the logits of the whole one, or nothing is."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, BitsAndBytesConfig

from qdpo.errors import ConfigError
from qdpo.model.base import quant, text_model
from qdpo.model.base.expected import check_folder
from qdpo.model.base.load import load_base
from qdpo.model.base.tokenizer import load_tokenizer
from qdpo.model.policy import adapter, lora_fit, recompute
from tests.conftest import Quiet
from tests.model import multimodal
from tests.model.families import CPU
from tests.model.multimodal import CONFIGS, LOOKING_AHEAD, Names, save_folder, text_logits, whole_model, write_weights

FAST: list[tuple[str, Names]] = [
    ("gemma3", "saved"), ("gemma4", "inner"), ("mistral3", "outer"), ("mistral3-untied", "outer"),
    ("mistral4", "inner"), ("qwen3_vl", "inner"), ("qwen2_5_vl", "saved"), ("qwen3_5_moe", "saved"),
    ("lfm2_vl", "saved"), ("idefics3", "outer"), ("llama4", "outer"),
]  # fmt: skip
EVERY: list[tuple[str, Names]] = [
    (name, names) for name in CONFIGS if name != LOOKING_AHEAD for names in ("inner", "outer", "saved")
]
# The whole class of transformers scales no logits, as its text class and its config say.
UNSCALED = {"aya_vision", "cohere2_vision"}


def load(folder: Path, **over: Any) -> Any:
    check_folder(folder)
    settings = {"quantization": "none", "double_quant": False, "dtype": "fp32", **over}
    return load_base(folder, device=CPU, attention_name=None, announce=lambda line: None, **settings)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("name", "names"),
    [pytest.param(*one, marks=[] if one in FAST else [pytest.mark.slow]) for one in EVERY],
)
def test_logits_are_those_of_the_whole_model(name: str, names: Names, tmp_path: Path) -> None:
    if name == "gemma3n":
        pytest.skip("the tower needs another package; see the test below")
    whole = whole_model(name)
    folder = save_folder(whole, tmp_path / "base", names)
    found = load(folder)
    assert not [part for part, _module in found.named_modules() if "vision" in part or "visual" in part]
    expected = text_logits(whole)
    if name in UNSCALED:
        expected = expected * found.config.logit_scale
    assert (text_logits(found) - expected).abs().max() == 0


def test_a_checkpoint_whose_text_attends_to_later_tokens_is_refused(tmp_path: Path) -> None:
    whole = whole_model(LOOKING_AHEAD)
    token = torch.arange(10, 20)[None]
    other = torch.cat([token[:, :-1], token[:, -1:] + 1], dim=1)
    first, second = (whole(input_ids=ids).logits[0, :5] for ids in (token, other))
    assert (first - second).abs().max() > 0.01
    with pytest.raises(ConfigError, match="by use_bidirectional_attention in its config"):
        load(save_folder(whole, tmp_path / "base"))


def test_a_tower_that_needs_another_package_is_not_built(tmp_path: Path) -> None:
    """Gemma 3n's vision tower is timm's; its text model is loaded all the same."""
    config = CONFIGS["gemma3n"]()
    torch.manual_seed(3)
    model = hf.Gemma3nForCausalLM(config.text_config).eval()
    expected = text_logits(model)
    named = {name.replace("model.", "model.language_model.", 1): one for name, one in model.state_dict().items()}
    named.pop("lm_head.weight")
    named["model.vision_tower.timm_model.conv_stem.conv.weight"] = torch.zeros(4, 3, 3, 3)
    config.save_pretrained(tmp_path)
    write_weights(tmp_path, {name: one.contiguous() for name, one in named.items()})
    multimodal.tiny_tokenizer().save_pretrained(tmp_path)
    assert torch.equal(text_logits(load(tmp_path)), expected)


@pytest.mark.parametrize("name", ["gemma4", "qwen3_vl"])
def test_4_bits_and_lora_stay_in_the_decoder(name: str, tmp_path: Path) -> None:
    folder = save_folder(whole_model(name), tmp_path / "base", "outer")
    text = text_model.text_model(folder)
    model = load(folder, quantization="nf4", double_quant=True, dtype="bf16")
    four_bit = {layer for layer, _ in quant.four_bit_layers(model)}
    peft = adapter.new_adapter(model, rank=2, alpha=2, targets=["all-linear"], rslora=False, seed=0)
    adapted = set(lora_fit.adapted_layers(peft))
    assert adapted and four_bit and all(one.startswith(f"{text.decoder}.") for one in adapted | four_bit)
    assert len(recompute.decoder_layers(text_model.decoder_of(model))) == 4
    # The skeletons of adapters and forecasts are of the same model.
    assert {one for one, _ in lora_fit.skeleton(model.config).named_modules()} >= adapted


@pytest.mark.parametrize("names", ["inner", "outer"])
def test_a_missing_tensor_is_refused_and_never_filled(names: Names, tmp_path: Path) -> None:
    folder = save_folder(whole_model("gemma4"), tmp_path / "base", names)
    kept = tensors(folder)
    gone = next(name for name in kept if name.endswith("layers.2.mlp.up_proj.weight") and "language_model" in name)
    del kept[gone]
    write_weights(folder, kept)
    with pytest.raises(ConfigError, match=r"1 tensors are missing, such as model\.layers\.2\.mlp\.up_proj\.weight"):
        check_folder(folder)
    with pytest.raises(ConfigError, match="tensors are missing"):
        text_model.text_model(folder)


def test_a_config_of_fewer_layers_is_refused(tmp_path: Path) -> None:
    folder = save_folder(whole_model("mistral3"), tmp_path / "base", "outer")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_config(folder, text_config=text | {"num_hidden_layers": 3, "layer_types": None})
    with pytest.raises(ConfigError, match=r"have no place in it, such as model\.layers\.3\."):
        load(folder)


def test_a_tensor_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = save_folder(whole_model("mistral3"), tmp_path / "base", "outer")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_config(folder, text_config=text | {"intermediate_size": 64})
    with pytest.raises(ConfigError, match="'language_model.model.layers.0.mlp.*has the shape"):
        check_folder(folder)


@pytest.mark.parametrize("second", ["whole", "one tensor", "head"])
def test_names_of_both_styles_in_one_folder_are_refused(second: str, tmp_path: Path) -> None:
    name = "mistral3-untied"
    folder = save_folder(whole_model(name), tmp_path / "base", "inner")
    held, other = tensors(folder), multimodal.weights_of(whole_model(name, seed=4))
    added = {
        "whole": {multimodal.renamed(one, "outer"): tensor for one, tensor in other.items()},
        "one tensor": {"language_model.model.layers.0.mlp.up_proj.weight": torch.zeros(128, 64)},
        "head": {"language_model.lm_head.weight": torch.zeros(408, 64)},
    }[second]
    write_weights(folder, held | added)
    with pytest.raises(ConfigError, match=r"tensors? of the text model twice, such as '.*' and '.*'"):
        check_folder(folder)


@pytest.mark.parametrize("names", ["inner", "outer"])
def test_the_outer_config_says_whether_tables_are_tied(names: Names, tmp_path: Path) -> None:
    tied = save_folder(whole_model("mistral3"), tmp_path / "tied", names)
    model = load(tied)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not CONFIGS["mistral3"]().text_config.tie_word_embeddings
    change_config(tied, tie_word_embeddings=False)
    with pytest.raises(ConfigError, match=r"missing, such as lm_head\.weight"):
        check_folder(tied)

    whole = whole_model("mistral3-untied")
    own = save_folder(whole, tmp_path / "own", names)
    change_config(own, tie_word_embeddings=True)  # wrong: the files have a head of its own, which transformers keeps
    assert torch.equal(text_logits(load(own)), text_logits(whole))
    assert (
        not text_model.text_model(own).config.tie_word_embeddings
        and text_model.text_model_of(text_model.model_config(own)).config.tie_word_embeddings
    )


def test_a_text_part_without_a_model_type_is_what_transformers_takes_it_for(tmp_path: Path) -> None:
    whole = whole_model("mistral3-untied")
    folder = save_folder(whole, tmp_path / "base", "outer")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    del text["model_type"]
    change_config(folder, text_config=text)
    assert torch.equal(text_logits(load(folder)), text_logits(whole))


def test_a_text_part_under_the_name_of_another_family_is_refused() -> None:
    content = CONFIGS["gemma4"]().to_dict()
    text_model.check_text_model(content, "owner/name")
    content["text_config"]["model_type"] = "llama"
    with pytest.raises(ConfigError, match=r"model_type of text_config .*'llama'.*'gemma4_text'"):
        text_model.check_text_model(content, "owner/name")


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_shards_and_a_folder_of_the_language_part_alone(name: str, tmp_path: Path) -> None:
    whole = whole_model(name)
    folder = save_folder(whole, tmp_path / "base", "outer", shards=3)
    expected = text_logits(whole)
    assert torch.equal(text_logits(load(folder)), expected)
    for path in folder.glob("model*"):
        path.unlink()
    kept = {multimodal.renamed(one, "outer"): tensor for one, tensor in multimodal.weights_of(whole).items()}
    write_weights(folder, {one: tensor for one, tensor in kept.items() if one.startswith("language_model.")})
    assert torch.equal(text_logits(load(folder)), expected)


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_a_folder_in_4_bits_keeps_what_it_left_in_16(name: str, tmp_path: Path) -> None:
    plain = save_folder(whole_model(name), tmp_path / "plain", "inner")
    left = ["vision", "visual", "multi_modal_projector", "lm_head", "model.language_model.layers.1.mlp.up_proj"]
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=left)
    auto: Any = AutoModelForImageTextToText
    whole = auto.from_pretrained(plain, quantization_config=settings, dtype=torch.float32)
    quant.settle(whole, torch.float32)
    expected = text_logits(whole)
    folder = tmp_path / "base"
    whole.save_pretrained(folder)
    for path in plain.iterdir():
        if "token" in path.name or path.suffix == ".jinja":
            shutil.copy(path, folder)
    model = load(folder, quantization="nf4")
    names = {layer.rpartition("layers.")[2] for layer, _ in quant.four_bit_layers(model)}
    assert "0.mlp.up_proj" in names and "1.mlp.up_proj" not in names
    assert torch.equal(text_logits(model), expected)
    # The files decide: the list has the names of the release that wrote it, and may name what became 4-bit after all.
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "language_model.model.layers.2.mlp"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(text_logits(load(folder, quantization="nf4")), expected)


def test_the_decoder_of_llama_4_gives_hidden_states() -> None:
    text = text_model.text_model_of(CONFIGS["llama4"]().text_config)
    model = text.cls(text.config)
    decoder = text_model.decoder_of(model)
    assert model.base_model is model and decoder is model.model
    assert decoder(input_ids=torch.tensor([[5, 6]]), use_cache=False).last_hidden_state.shape == (1, 2, 64)


@pytest.mark.parametrize("kind", ["florence2", "blip", "diffusion_gemma", "t5gemma2", "whisper", "pix2struct"])
def test_what_predicts_no_text_from_text_is_refused_by_name(kind: str) -> None:
    config = CONFIG_MAPPING[kind]().to_dict()
    with pytest.raises(ConfigError, match=rf"no language model of its own for model_type '{kind}'"):
        text_model.check_text_model(config, "owner/name")


def test_infinite_numbers_are_read_as_transformers_writes_them() -> None:
    """Falcon-H1's time_step_limit, in the content of a config.json that was not read by transformers."""
    written = json.loads(hf.FalconH1Config(num_hidden_layers=1).to_json_string())
    assert written["time_step_limit"][1] == {"__float__": "Infinity"}
    assert text_model.config_of_json(written).time_step_limit[1] == float("inf")
    text_model.check_text_model(written, "falcon")


def test_it_is_refused_before_the_weights_are_looked_for() -> None:
    for name in ("gemma4", "mistral4", "qwen3_vl", "llama4", "mllama"):
        text_model.check_text_model(CONFIGS[name]().to_dict(), name)


def test_a_tokenizer_needs_no_image_processor(tmp_path: Path) -> None:
    folder = save_folder(whole_model("mistral3"), tmp_path / "base", "outer")
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        content = {"image_processor_type": "NoSuchProcessor", "processor_class": "NoSuchProcessor"}
        (folder / name).write_text(json.dumps(content))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"processor_class": "NoSuchProcessor"}))
    template = load_tokenizer(folder).chat_template
    assert template
    (folder / "chat_template.jinja").unlink()
    assert load_tokenizer(folder).chat_template is None
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert load_tokenizer(folder).chat_template == template


@pytest.mark.slow
@pytest.mark.parametrize(("name", "names"), [("gemma4", "inner"), ("mistral3", "outer"), ("qwen3_vl", "outer")])
def test_a_run_on_a_multimodal_folder(name: str, names: Names, train: Any, tmp_path: Path) -> None:
    folder = save_folder(whole_model(name), tmp_path / "multimodal", names)
    said: Quiet
    result, said = train(
        model__path=str(folder), model__quantization="nf4", model__dtype="bf16", train__steps="2", data__max_tokens="96"
    )
    assert result.steps == 2
    assert "model: the text model of" in said.text and "fast parts:" in said.text
    kept = load_file(tmp_path / "runs" / "run" / "adapter" / "adapter_model.safetensors")
    assert kept and not [one for one in kept if "vision" in one or "visual" in one or "projector" in one]
