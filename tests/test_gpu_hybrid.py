"""What only a CUDA device can show of hybrids: a shared row by the kernels' two calls a layer, or by plain PyTorch."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from qdpo.families.kernels import is_installed
from qdpo.model.base.text_model import decoder_of
from qdpo.model.fast import row_scan
from qdpo.model.fast.logps import Head
from qdpo.model.policy import install
from qdpo.model.policy.choose_attention import choose_path
from qdpo.model.policy.row import RowTensors
from tests.model.families import differentiated, make_policy, tiny_row
from tests.model.test_recurrent import KINDS, config_named, row_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")
# The package of each kind's scan, and the way that its kernel takes.
PACKAGES = {
    "qwen3_5 (text)": ("fla", row_scan.VARLEN), "kimi_linear": ("fla", row_scan.VARLEN),
    "nemotron_h": ("mamba_ssm", row_scan.BATCH),
}  # fmt: skip


def on(device: torch.device, row: RowTensors) -> RowTensors:
    moved = {name: value.to(device) for name, value in vars(row).items() if isinstance(value, torch.Tensor)}
    return replace(row, **moved)


def policy_on(device: torch.device, name: str) -> tuple[Any, str]:
    torch.manual_seed(3)
    policy, said = make_policy(config_named(name), attention_name=None, dtype=torch.bfloat16), []
    causal = policy.peft.to(device).get_base_model()
    policy = replace(policy, device=device, head=Head.of(causal), backbone=decoder_of(causal))
    choose_path(policy, on(device, tiny_row()), "auto", longest=1024, say=said.append)
    install.install(policy.peft, device)
    return policy, " ".join(said)


@pytest.mark.parametrize("name", KINDS)
def test_a_shared_row_equals_its_sequences_to_the_rounding_of_bf16(name: str) -> None:
    policy, said = policy_on(CUDA, name)
    assert policy.shared, said
    if name in PACKAGES:
        package, way = PACKAGES[name]
        assert (way if is_installed(package) else row_scan.LOOP) in said
    row = on(CUDA, row_of((70, 45, 37), (2, 20, 52), (300, 60, 90)))
    found, expected = differentiated(policy, row, "spans"), differentiated(policy, row, "separate")
    assert (found[0] - expected[0]).square().mean().sqrt() < 0.1
    one, other = (torch.cat([part.flatten().float() for part in side[1].values()]) for side in (found, expected))
    assert torch.cosine_similarity(one, other, dim=0) > 0.98
