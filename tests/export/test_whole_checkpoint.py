"""A checkpoint with other parts than its text model ships whole: text merged, all else as it was, for servers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import save_file

from qdpo.export import targets
from qdpo.export.gguf import model as gguf_model
from qdpo.export.gguf.adapter import write_gguf_adapter
from qdpo.export.merge.merge import merge_run
from qdpo.export.plain_peft import write_normal
from qdpo.export.targets import Order
from qdpo.export.trained import trained_run
from qdpo.model.base.text_model import text_model
from qdpo.model.base.weight_names import folder_names
from qdpo.report.card import card_text
from qdpo.run.folder import RunDir
from tests.conftest import Quiet, tiny_tokenizer
from tests.export.runs import SETTINGS, adapt
from tests.model.multimodal import CONFIGS, LOOKING_AHEAD, part, save_folder, text_logits, whole_model
from tests.run.made import write_records

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "in_proj_qkv", "w1")
DENSE = ("gate_proj", "up_proj", "down_proj")
# Families whose whole class, in transformers 5.24, computes text otherwise than the text class; see `verify.UNLIKE`.
UNLIKE = {"aya_vision", "cohere2_vision", "llama4"}
GGUF = hf.GgufConfig(dequantize=True)
# gemma3n's tower comes from timm; llava's is refused at the door.
FAMILIES = sorted(CONFIGS.keys() - {"gemma3n", "llava", LOOKING_AHEAD})
QUICK = {"gemma3", "gemma4", "qwen3_5_moe", "qwen3_vl"}


def trained(base: Path, path: Path) -> tuple[RunDir, torch.Tensor]:
    """A run whose adapter changes the text model of `base`, and the logits of its model."""
    text = text_model(base)
    model = text.cls.from_pretrained(base, config=text.config, key_mapping=text.key_mapping, dtype=torch.float32)
    ends = ADAPTED if "moe" in text.config.model_type or "llama4" in text.config.model_type else (*ADAPTED, *DENSE)
    names = [
        name
        for name, module in model.named_modules()
        if type(module) is torch.nn.Linear and name.startswith(text.decoder) and name.rpartition(".")[2] in ends
    ]
    peft = adapt(model, target_modules=names)
    run = RunDir(path)
    run.path.mkdir(parents=True)
    peft.save_pretrained(run.adapter)
    write_records(run, base, ["model.quantization=none", *SETTINGS])
    return run, text_logits(peft)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("family", "names"),
    [
        pytest.param(family, names, marks=[] if family in QUICK and names == "saved" else [pytest.mark.slow])
        for family in FAMILIES
        for names in (["saved", "outer"] if family in ("gemma3", "mistral3", "mistral3-untied") else ["saved"])
    ],
)
def test_merged_whole_and_adapter_under_the_names_that_servers_load(tmp_path: Path, family: str, names: Any) -> None:
    base = save_folder(whole_model(family), tmp_path / "base", names)
    run, wanted = trained(base, tmp_path / "run")
    merge_run(run, run.merged, base="dequantized", dtype=None, watcher=Quiet())
    before, after = stored(base), stored(run.merged)
    assert before.keys() == after.keys()
    known = folder_names(base)
    changed = {name for name in before if before[name].numpy().tobytes() != after[name].numpy().tobytes()}
    assert changed and not changed & set(known.trained.others)
    if known.text.is_part:
        assert known.trained.others
    written = write_normal(run.adapter, base, tmp_path / "peft")
    assert written.served == known.served.__name__ and len(written.lora.layers) == len(changed)
    if family in UNLIKE:
        return
    served = known.served.from_pretrained(run.merged, dtype=torch.float32).eval()
    assert (text_logits(served) - wanted).abs().max() <= 1e-3
    over = PeftModel.from_pretrained(known.served.from_pretrained(base, dtype=torch.float32).eval(), tmp_path / "peft")
    assert (text_logits(over) - wanted).abs().max() <= 1e-3
    assert (text_logits(known.served.from_pretrained(base, dtype=torch.float32).eval()) - wanted).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore")
def test_the_processor_goes_along(tmp_path: Path) -> None:
    base = save_folder(whole_model("gemma3"), tmp_path / "base")
    plain = tiny_tokenizer()
    special = {"boi_token": "<|im_start|>", "eoi_token": "<|im_end|>", "image_token": "<|im_end|>"}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, eos_token=plain.eos_token, pad_token=plain.pad_token,
        extra_special_tokens=special,
    )  # fmt: skip
    tokenizer.chat_template = plain.chat_template
    hf.Gemma3Processor(image_processor=hf.Gemma3ImageProcessorPil(), tokenizer=tokenizer).save_pretrained(base)
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (base / name).write_text(json.dumps({"of": name}))
    run, _logits = trained(base, tmp_path / "run")
    merge_run(run, run.merged, base="dequantized", dtype=None, watcher=Quiet())
    assert type(hf.AutoProcessor.from_pretrained(run.merged)) is hf.Gemma3Processor
    for path in base.glob("*processor_config.json"):
        assert (run.merged / path.name).read_bytes() == path.read_bytes()
    before, after = (json.loads((place / "config.json").read_text()) for place in (base, run.merged))
    assert after["vision_config"] == before["vision_config"] and after.keys() == before.keys()
    different = {name for name, value in after["text_config"].items() if before["text_config"][name] != value}
    assert different <= {"eos_token_id"}


def test_other_parts_and_what_stays_in_float32_keep_every_byte(tmp_path: Path) -> None:
    """Also with a type asked for, in a base of 16 bits."""
    model = whole_model("gemma3").to(torch.bfloat16)
    base = save_folder(model, tmp_path / "base")
    run, _logits = trained(base, tmp_path / "run")
    watcher = Quiet()
    merge_run(run, run.merged, base="dequantized", dtype="fp16", watcher=watcher)
    before, after = stored(base), stored(run.merged)
    others = folder_names(base).trained.others
    assert "copied as they are (not trained): multi_modal_projector, vision_tower" in watcher.text
    for name, tensor in after.items():
        assert tensor.dtype == (torch.bfloat16 if name in others else torch.float16)
        if name in others:
            assert torch.equal(tensor, before[name])


def test_drafting_heads_are_copied_and_said(tmp_path: Path) -> None:
    base = save_folder(whole_model("qwen3_5"), tmp_path / "base")
    tensors = {**stored(base), "mtp.fc.weight": torch.randn(8, 8).bfloat16()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    run, _logits = trained(base, tmp_path / "run")
    watcher = Quiet()
    merge_run(run, run.merged, base="dequantized", dtype=None, watcher=watcher)
    assert torch.equal(stored(run.merged)["mtp.fc.weight"], tensors["mtp.fc.weight"])
    assert "copied as they are: mtp (heads that draft tokens" in watcher.text


@pytest.mark.filterwarnings("ignore")
def test_the_card_loads_the_adapter_onto_the_class_of_its_names(tmp_path: Path) -> None:
    base = save_folder(whole_model("gemma3"), tmp_path / "base", "outer")
    run, wanted = trained(base, tmp_path / "run")
    text = card_text(trained_run(run.path).finished)
    code = text.partition("```python\n")[2].partition("```")[0]
    code = code.replace("path/to/its/base", str(base)).replace("path/to/this/adapter", str(run.adapter))
    names: dict[str, Any] = {}
    exec(code, names)
    assert type(names["base"]) is hf.Gemma3ForCausalLM
    assert (text_logits(names["model"].float()) - wanted).abs().max() <= 1e-3
    merged = card_text(trained_run(run.path).finished, is_merged=True)
    assert "Gemma3ForConditionalGeneration.from_pretrained" in merged


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_the_card_of_an_exported_adapter_loads_the_class_that_servers_load(tmp_path: Path, family: str) -> None:
    base = save_folder(whole_model(family), tmp_path / "base", "outer" if family == "gemma3" else "inner")
    run, wanted = trained(base, tmp_path / "run")
    (run.adapter / "README.md").write_text("the card of the class that was trained", encoding="utf-8")
    out = tmp_path / "peft"
    targets.export_peft(
        Order(
            trained=trained_run(run.path), out=out, quant=None, merged=None, lora=False, name="tuned", force=False,
            say=lambda line: None,
        )
    )  # fmt: skip
    code = (out / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("path/to/its/base", str(base)).replace("path/to/this/adapter", str(out)), names)
    assert type(names["base"]) is folder_names(base).served
    assert (text_logits(names["model"].float()) - wanted).abs().max() <= 1e-3
    assert "--to peft" not in code and "key_mapping" not in code


@pytest.mark.filterwarnings("ignore")
def test_gguf_of_gemma_3_holds_its_text_model(tmp_path: Path) -> None:
    """By transformers' own reader of GGUF; and the adapter's file is compared with the trained delta."""
    text = hf.Gemma3TextConfig(**part("gemma3_text", num_hidden_layers=6, query_pre_attn_scalar=16))
    base = save_folder(whole_model("gemma3", text_config=text), tmp_path / "base", "outer")
    run, wanted = trained(base, tmp_path / "run")
    merge_run(run, run.merged, base="dequantized", dtype=None, watcher=Quiet())
    out = tmp_path / "model.gguf"
    gguf_model.write_gguf(run.merged, out, quant="f32", name="tuned", base_gguf=None)
    found = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path, config=text_model(run.merged).config, gguf_file=out.name, quantization_config=GGUF
    )
    assert (text_logits(found.float().eval()) - wanted).abs().max() <= 1e-3
    assert write_gguf_adapter(run.adapter, base, tmp_path / "adapter.gguf", quant="f32", name="tuned") <= 1e-6
