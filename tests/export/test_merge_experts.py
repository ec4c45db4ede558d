"""Mixtures of experts are merged where their experts are not adapted: these keep every byte, in any form."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from qdpo.errors import ConfigError
from qdpo.export.merge.merge import merge_run
from tests.conftest import Quiet
from tests.export.runs import adapt, dense_weights, four_bit, logits_of, make_run, peft_merged, save_base
from tests.model.families import SIZE

WIDE = {**SIZE, "hidden_size": 64, "vocab_size": 402}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
# Expert by expert in the files, joined by transformers; and stacked as they are used.
FAMILIES: dict[str, Any] = {
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(**WIDE, **MOE, head_dim=16),
    "deepseek_v3": lambda: hf.DeepseekV3Config(**{**WIDE, **MLA}),
    "gpt_oss": lambda: hf.GptOssConfig(**WIDE, num_local_experts=4, head_dim=16),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "q_b_proj", "kv_b_proj"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_experts_keep_every_byte_and_the_rest_is_what_was_trained(tmp_path: Path, family: str) -> None:
    base = save_base(tmp_path / "base", FAMILIES[family](), dtype=torch.bfloat16)
    stored = load_file(base / "model.safetensors")
    bias = next((name for name in stored if name.endswith("e_score_correction_bias")), None)
    if bias is not None:  # kept in float32 by its maker, and by transformers
        stored[bias] = torch.rand(4) / 3
        save_file(stored, base / "model.safetensors", {"format": "pt"})
    names = [name for name in ATTENTION if any(f".{name}.weight" in key for key in stored)]
    run = make_run(tmp_path / "run", base, quantization="nf4", dtype="bf16", target_modules=names)
    report = merge_run(run, run.merged, base="dequantized", dtype=None, watcher=Quiet())
    assert report.dtype == "bf16" and report.dequantized == report.proved >= report.adapted > 0
    merged = load_file(run.merged / "model.safetensors")
    assert merged.keys() == stored.keys()
    four_bits = dense_weights(four_bit(base, "nf4", True, "bf16"))
    for name, tensor in stored.items():
        assert merged[name].dtype == tensor.dtype
        if name not in four_bits:
            assert merged[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name
    assert any(".experts" in name for name in stored.keys() - four_bits.keys())
    assert bias is None or merged[bias].dtype == torch.float32


@pytest.mark.filterwarnings("ignore")
def test_merged_equals_pefts_own_merge(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", FAMILIES["qwen3_moe"]())
    run = make_run(tmp_path / "run", base, target_modules=ATTENTION[:4])
    merge_run(run, run.merged, base="dequantized", dtype=None, watcher=Quiet())
    ours = hf.AutoModelForCausalLM.from_pretrained(run.merged).eval()
    assert (logits_of(ours) - logits_of(peft_merged(run, base))).abs().max() <= 1e-4


@pytest.mark.filterwarnings("ignore")
def test_adapted_experts_are_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", FAMILIES["qwen3_moe"]())
    run = make_run(tmp_path / "run", base, target_modules=["q_proj"])
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapt(model, target_modules=["q_proj"], target_parameters=["experts.down_proj"]).save_pretrained(run.adapter)
    with pytest.raises(ConfigError, match="adapts stacked experts|not the A or B of a linear layer"):
        merge_run(run, run.merged, base="dequantized", dtype=None, watcher=Quiet())
    assert not run.merged.exists()
