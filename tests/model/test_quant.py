"""4-bit layers on the CPU: gradients survive evaluation, and the checksum sees every byte."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qdpo.data.tokens.pack import PairRow
from qdpo.data.tokens.sieve import TokenPair
from qdpo.model.base import quant
from qdpo.model.base.load import load_base
from qdpo.settings.schema import RunConfig
from qdpo.train.policy.build import Loaded, load_policy
from qdpo.train.step.step import score

PAIRS = [TokenPair(*(np.arange(start, start + n, dtype=np.int32) for n in (12, 6, 9)), start) for start in (5, 90)]
CPU = torch.device("cpu")


def load(folder: Path, *, dtype: str = "fp32", quantization: str = "nf4", attention: str = "auto") -> Loaded:
    config = RunConfig.model_validate(
        {"model": {"quantization": quantization, "attention": attention}, "memory": {"kept_layers": "all"}}
    )
    return load_policy(config, folder, device=CPU, dtype=dtype, probe_with=PAIRS, say=lambda line: None)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_gradients_reach_every_adapter_after_an_evaluation_pass(tiny_base: Path, dtype: str) -> None:
    """bitsandbytes 0.50 loses them on CPUs with AVX512-BF16 once a 4-bit layer has run without gradients."""
    policy, row = load(tiny_base, dtype=dtype).policy, PairRow(PAIRS)
    with torch.no_grad(), policy.reference():
        before = score(policy, row, metrics=False).logp
    score(policy, row, metrics=False).logp.sum().backward()
    layers = [p for name, p in policy.adapter_parameters().items() if "lora_B" in name]
    assert len(layers) == 14 and all(p.grad is not None and p.grad.abs().max() > 0 for p in layers)
    with torch.no_grad(), policy.reference():
        assert torch.equal(score(policy, row, metrics=False).logp, before)


def test_no_4_bit_layer_may_repack_its_weight(tiny_base: Path) -> None:
    policy = load(tiny_base).policy
    layers = list(quant.four_bit_layers(policy.backbone))
    assert len(layers) == 14 and not any(layer.support_avx512bf16_for_cpu for _name, layer in layers)


def test_an_untouched_adapter_is_exactly_the_base_in_4_bit(tiny_base: Path) -> None:
    policy, row = load(tiny_base, dtype="bf16").policy, PairRow(PAIRS)
    with torch.no_grad():
        on = score(policy, row, metrics=False).logp
        with policy.reference():
            off = score(policy, row, metrics=False).logp
    assert torch.equal(on, off)


def edited(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_the_checksum_sees_weights_and_quantisation(tiny_base: Path, tmp_path: Path) -> None:
    def flip(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"][3] += 0.01

    other = edited(tiny_base, tmp_path, flip)
    variants = [
        (tiny_base, "nf4", "fp32"),
        (tiny_base, "fp4", "fp32"),
        (tiny_base, "none", "fp32"),
        (tiny_base, "nf4", "bf16"),
    ]
    names = {
        load(folder, quantization=quantization, dtype=dtype).reference_name
        for folder, quantization, dtype in [*variants, (other, "nf4", "fp32")]
    }
    names |= {load(tiny_base, attention=attention).reference_name for attention in ("sdpa", "eager")}
    assert len(names) == 7
    assert load(tiny_base).reference_name == load(tiny_base).reference_name


def test_one_edited_4_bit_byte_changes_the_checksum(tiny_base: Path) -> None:
    model = load_base(
        tiny_base,
        quantization="nf4",
        double_quant=True,
        dtype="fp32",
        device=CPU,
        attention_name="sdpa",
        announce=print,
    )
    before = quant.weights_checksum(model)
    next(quant.four_bit_layers(model))[1].weight.data[5] ^= 1
    assert quant.weights_checksum(model) != before
