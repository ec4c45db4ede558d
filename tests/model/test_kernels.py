"""Optional kernel packages: named where a model's layers would use them, and adapters hold with and without them."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from qdpo.errors import ConfigError
from qdpo.families.kernels import KERNELS
from qdpo.machine import doctor
from qdpo.model.base.config_values import check_values
from qdpo.model.policy import kernels
from qdpo.model.policy.kernels import KernelUse
from tests.conftest import ROOT, qdpo
from tests.model.families import SEPARATE, SHARED

CPU, CARD = torch.device("cpu"), torch.device("cuda")
LFM2: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"],
}  # fmt: skip


def use_of(config: Any) -> KernelUse:
    with torch.device("meta"):
        return kernels.kernels_of(hf.AutoModelForCausalLM.from_config(config))


@pytest.mark.skipif(any(map(kernels.is_installed, KERNELS)), reason="a kernel package is installed")
def test_the_layers_that_would_use_a_package_are_found() -> None:
    """If this fails after an update: transformers chooses kernels in another way than `kernels._choices` reads."""
    assert use_of(SEPARATE["qwen3-next"]()) == KernelUse({}, {"fla": 1, "causal_conv1d": 1})
    assert use_of(SEPARATE["falcon-h1-mamba"]()) == KernelUse({}, {"mamba_ssm": 2, "causal_conv1d": 2})
    assert use_of(SEPARATE["mamba"]()) == KernelUse({}, {"mamba_ssm": 2, "causal_conv1d": 2})
    assert use_of(hf.Lfm2Config(**LFM2)) == KernelUse({}, {"causal_conv1d": 1})
    assert use_of(SHARED["llama"]()) == use_of(SHARED["mixtral"]()) == KernelUse({}, {})


def test_what_is_said_at_the_start() -> None:
    missing = KernelUse({}, {"fla": 18, "causal_conv1d": 18})
    said = kernels.announcement(missing, CARD)
    assert said is not None and "gated delta rules of 18 layers (flash-linear-attention is not installed)" in said
    assert "`pip install --no-build-isolation causal-conv1d && pip install flash-linear-attention`" in said
    assert "exact, but slower" in said
    assert kernels.announcement(missing, CPU) is None and kernels.announcement(KernelUse({}, {}), CARD) is None
    on_cpu = kernels.announcement(KernelUse({"fla": 2}, {}), CPU)
    assert on_cpu is not None and "made for GPUs" in on_cpu


def test_doctor_names_them_where_there_is_a_card() -> None:
    notes = list(doctor._kernels("cuda"))
    assert Counter(check.name for check in notes) == {"kernels": 3}
    assert "Qwen3.5" in notes[0].text and not list(doctor._kernels("cpu"))


def test_a_config_cannot_name_code_of_the_hub() -> None:
    check_values({"_attn_implementation": "sdpa"}, "x")
    for config in ({"_attn_implementation": "someone/kernel"}, {"text_config": {"_attn_implementation": "a/b:c"}}):
        with pytest.raises(ConfigError, match="which is not run. Remove that line"):
            check_values(config, "someone/model")


# A package of each name whose functions refuse to be called, but for one that is never called here.
FAKE = {
    "fla/__init__.py": "", "fla/ops/__init__.py": "",
    "fla/ops/gated_delta_rule.py": "def chunk_gated_delta_rule(*a, **k): raise AssertionError",
    "mamba_ssm/__init__.py": "", "mamba_ssm/ops/__init__.py": "", "mamba_ssm/ops/triton/__init__.py": "",
    "mamba_ssm/ops/triton/ssd_combined.py":
        "def mamba_split_conv1d_scan_combined(*a, **k): raise AssertionError('the fused kernel skips the adapter')",
    "kernels/__init__.py": "def get_kernel(*a, **k): print('DOWNLOAD')",
    "kernels-0.18.2.dist-info/METADATA": "Name: kernels\nVersion: 0.18.2\n",
}  # fmt: skip
WITH_FAKES = """
from qdpo.cli.common import quiet_libraries
quiet_libraries()
import torch
from qdpo.model.base import quant
from transformers.utils.import_utils import is_kernels_available
from qdpo.model.policy import kernels
from tests.model.families import SEPARATE, TARGETS, differentiated, make_policy, tiny_row
from tests.model.test_kernels import use_of

assert not is_kernels_available()
assert use_of(SEPARATE["qwen3-next"]()).used == {"fla": 1}
TARGETS["granitemoehybrid"] = ["in_proj", "out_proj"]
import transformers as hf
config = hf.GraniteMoeHybridConfig(
    vocab_size=160, hidden_size=32, intermediate_size=64, shared_intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, num_local_experts=0, layer_types=["mamba", "attention"],
    mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8, mamba_n_groups=1, initializer_range=0.2,
)
policy = make_policy(config, attention_name="sdpa", layout="separate")
assert not any(module.training for module in policy.backbone.modules() if "Mamba" in type(module).__name__)
_, gradients = differentiated(policy, tiny_row(1))
trained = [name for name, gradient in gradients.items() if "out_proj" in name and gradient.abs().max() > 0]
assert len(trained) == 2, gradients.keys()
policy.peft.train()
try:
    differentiated(policy, tiny_row(1))
except AssertionError as error:
    assert "skips the adapter" in str(error)
    print("DONE")
"""


def test_adapters_hold_with_the_packages_installed_and_nothing_is_downloaded(tmp_path: Path) -> None:
    """In training mode, a Mamba block hands out_proj's weight to a fused kernel, past its adapter."""
    for name, content in FAKE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITH_FAKES], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout.split() == ["DONE"], done.stdout + done.stderr


def test_a_plan_that_traces_is_quiet_and_downloads_nothing(tmp_path: Path) -> None:
    for name, content in FAKE.items():
        if name.startswith("kernels"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content, encoding="utf-8")
    config = hf.ArceeConfig(
        vocab_size=160, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, architectures=["ArceeForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "base")
    environment = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "QDPO_CACHE": str(tmp_path / "cache")}
    for said in (["forecast:"], []):
        done = qdpo("plan", "preset=7b-8gb", "model.path=base", cwd=tmp_path, **environment)
        assert done.returncode == 0 and "FITS" in done.stdout and "DOWNLOAD" not in done.stdout, done.stderr
        assert [line.split()[0] for line in done.stderr.splitlines()] == said
