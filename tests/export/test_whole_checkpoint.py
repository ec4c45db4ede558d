"""A checkpoint with other parts than its text model ships whole: text merged, all else as it was, for servers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from qdpo.export.merge.merge import merge_run
from qdpo.export.plain_peft import write_normal
from qdpo.model.base.text_model import text_model
from qdpo.model.base.weight_names import folder_names
from qdpo.run.folder import RunDir
from tests.conftest import Quiet
from tests.export.runs import SETTINGS, adapt
from tests.model.multimodal import CONFIGS, save_folder, text_logits, whole_model
from tests.run.made import write_records

ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "in_proj_qkv", "w1")
DENSE = ("gate_proj", "up_proj", "down_proj")
# Families whose whole class, in transformers 5.24, computes text otherwise than the text class; see `verify.UNLIKE`.
UNLIKE = {"aya_vision", "cohere2_vision", "llama4"}
# gemma3n's tower comes from timm; llava's is refused at the door.
FAMILIES = sorted(CONFIGS.keys() - {"gemma3n", "llava"})
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
