"""Experts: the step beside transformers' own code, their 4-bit form beside what transformers loads, and the files."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qdpo.data.tokens.pack import PairRow
from qdpo.data.tokens.sieve import TokenPair
from qdpo.errors import ConfigError
from qdpo.model.base import quant
from qdpo.model.base.dequantise import plain_tensors
from qdpo.model.base.expert_files import expert_sources, read_part, stacks_of
from qdpo.model.base.expert_stack import FourBitStack, exact_mean, quantised
from qdpo.model.base.load import load_base
from qdpo.model.base.quant import FourBit
from qdpo.model.base.text_model import skeleton, text_model
from qdpo.model.fast import experts
from qdpo.model.fast.experts import experts_of, experts_output
from qdpo.model.policy.compare import apart
from qdpo.settings.schema import RunConfig
from qdpo.train.policy.build import load_policy
from qdpo.train.step.step import score
from tests.matrix.members import MEMBERS, save_member

CPU = torch.device("cpu")
PAIRS = [TokenPair(*(np.arange(start, start + n, dtype=np.int32) for n in (12, 6, 9)), start) for start in (5, 90)]
# Per-expert files, stacked files, stacks with inputs first and biases, no gate, parts that are renamed, other places.
FAMILIES = [
    "text qwen3_moe", "text qwen3_next", "folder qwen3_5_moe", "text gpt_oss", "text nemotron_h",
    "text granitemoehybrid", "text lfm2_moe", "text mixtral", "text gemma4 (text, experts)", "text ernie4_5_moe",
    "text deepseek_v3", "folder mistral4",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny model of a family, saved once."""
    made: dict[str, Path] = {}

    def folder(key: str) -> Path:
        if key not in made:
            made[key] = tmp_path_factory.mktemp("family")
            save_member(next(member for member in MEMBERS if member.key == key), made[key])
        return made[key]

    return folder


def load(folder: Path, quantization: str, dtype: str = "fp32", *, double_quant: bool = True) -> Any:
    return load_base(
        folder, quantization=quantization, double_quant=double_quant, dtype=dtype, device=CPU, attention_name=None,
        announce=lambda line: None,
    )  # fmt: skip


def stacks(model: nn.Module) -> dict[str, FourBitStack]:
    return {name: one for name, one in model.named_modules() if isinstance(one, FourBitStack)}


# --- loading


@pytest.mark.parametrize("key", FAMILIES)
def test_each_expert_is_the_one_that_transformers_loads_in_four_bits(
    folder_of: Callable[[str], Path], key: str
) -> None:
    folder = folder_of(key)
    made, plain = load(folder, "nf4"), dict(load(folder, "none").named_parameters())
    assert stacks(made) and set(stacks(made)) == set(stacks_of(load(folder, "none")))
    for name, stack in stacks(made).items():
        assert stack.shape == plain[name].shape
        for expert, matrix in enumerate(plain[name]):
            assert torch.equal(stack[expert], quantised(matrix, stack.form)[0]), f"{name} {expert}"


def test_the_model_computes_with_the_four_bit_experts(folder_of: Callable[[str], Path]) -> None:
    """transformers' own code on the stacks, and on the same numbers in 32 bits."""
    folder = folder_of("text gpt_oss")
    made, plain = load(folder, "nf4"), load(folder, "none")
    for name, stack in stacks(made).items():
        plain.get_parameter(name).data = stack.dense(0, stack.shape[0], torch.float32)
    for name, layer in quant.four_bit_layers(made):
        plain.get_submodule(name).weight.data = quant.dense_weight(layer, torch.float32)
    ids = torch.randint(3, 1000, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(made(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_matrix_is_quantised_as_bitsandbytes_does_it(kind: str, double_quant: bool) -> None:
    matrix = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    ours = quantised(matrix, FourBit(kind, double_quant, torch.float32))
    packed, state = bnb.quantize_4bit(matrix, blocksize=64, compress_statistics=double_quant, quant_type=kind)
    assert torch.equal(ours.weight, packed.reshape(1, -1))
    theirs = bnb.dequantize_4bit(packed, state)
    # The mean of the scales is summed in another order there.
    assert apart(theirs, ours[0]) <= (1e-6 if double_quant else 0)


def test_a_stack_gives_any_of_its_experts_alone_or_together() -> None:
    form = FourBit("nf4", True, torch.bfloat16)
    stack = FourBitStack(torch.Size((5, 24, 64)), form, CPU)  # 24 blocks: scales that do not fill their own block
    matrices = torch.randn(5, 24, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for expert, matrix in enumerate(matrices):
        stack.put(expert, matrix)
    whole = stack.dense(0, 5, torch.bfloat16)
    for expert, matrix in enumerate(matrices):
        alone = quantised(matrix, form)
        assert torch.equal(whole[expert], stack[expert]) and torch.equal(stack[expert], alone[0])
        assert stack.digest(expert) == alone.digest(0)
    assert torch.equal(stack.dense(1, 4, torch.float32), whole[1:4].float())
    with pytest.raises(ValueError, match="whole blocks"):
        FourBitStack(torch.Size((2, 3, 5)), form, CPU)


def test_a_changed_byte_changes_the_mark_and_the_checksum(folder_of: Callable[[str], Path]) -> None:
    model = load(folder_of("text qwen3_moe"), "nf4")
    stack = next(iter(stacks(model).values()))
    mark, total = stack.mark(), quant.weights_checksum(model)
    for tensor in (stack.weight.data, stack.absmax, stack.absmax_EC, stack.mean_E):
        before = tensor.clone()
        tensor.view(-1)[3] += 1
        changed = stack.mark()
        assert changed.sha256 != mark.sha256 and quant.weights_checksum(model) != total
        assert sum(one != other for one, other in zip(changed.experts, mark.experts, strict=True)) == 1
        tensor.copy_(before)
    assert stack.mark() == mark


@given(st.integers(1, 4000), st.floats(1e-6, 1e3), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_mean_of_scales_does_not_depend_on_their_order(count: int, size: float, seed: int) -> None:
    scales = torch.rand(count, generator=torch.Generator().manual_seed(seed)) * size
    mean = exact_mean(scales)
    assert torch.equal(mean, exact_mean(scales.flip(0))) and torch.equal(mean, exact_mean(scales.sort()[0]))
    assert abs(mean.item() - scales.double().mean().item()) <= 1e-6 * size
    assert exact_mean(torch.zeros(3)).item() == 0


def test_a_broken_expert_is_refused_by_the_name_of_its_tensor(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    for file in folder_of("text qwen3_moe").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(one for one in tensors if ".experts.2.up_proj" in one)
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=f"{name}.* holds NaN"):
        load(tmp_path, "nf4")


# --- files


@pytest.mark.parametrize("key", FAMILIES)
def test_a_matrix_goes_back_into_the_tensors_that_it_came_from(folder_of: Callable[[str], Path], key: str) -> None:
    folder = folder_of(key)
    text, stored = text_model(folder), plain_tensors(folder)
    model = skeleton(text)
    sources = expert_sources(model, stored, text.key_mapping)
    assert set(sources) == set(stacks_of(model))
    for source in sources.values():
        seen: dict[str, list[Tensor]] = {name: [] for name in source.files}
        for expert in range(source.shape[0]):
            matrix = source.matrix(expert, lambda name, place: read_part(stored[name], place, torch.float32))
            assert matrix.shape == source.shape[1:]
            for name, values in source.back(expert, matrix).items():
                assert expert in source.experts_in(name)
                seen[name].append(values)
        for name, parts in seen.items():
            assert [len(source.experts_in(name))] == [len(parts)]
            whole = torch.cat([part.reshape(-1) for part in parts])
            assert torch.equal(whole, stored[name].whole().float().reshape(-1)), name


# --- the step


class Module(nn.Module):
    """Experts of transformers' common form, by its own code for one after another."""

    def __init__(self, number: int, width: int, inner: int, *, biased: bool, transposed: bool, gated: bool):
        super().__init__()
        self.num_experts, self.is_transposed, self.has_bias, self.has_gate = number, transposed, biased, gated
        wide = 2 * inner if gated else inner
        for name, outputs, inputs in ((self.first, wide, width), ("down_proj", width, inner)):
            shape = (number, inputs, outputs) if transposed else (number, outputs, inputs)
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * 0.2, requires_grad=False))
            if biased:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.randn(number, outputs), requires_grad=False))
        self.act_fn = nn.functional.gelu

    @property
    def first(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    def _apply_gate(self, first: Tensor) -> Tensor:
        gate, up = first[..., ::2], first[..., 1::2]
        return (up + 1) * self.act_fn(gate.clamp(max=1.5))

    def product(self, x: Tensor, name: str, expert: int) -> Tensor:
        weight = getattr(self, name)[expert]
        product = x @ (weight if self.is_transposed else weight.T)
        return product + getattr(self, f"{name}_bias")[expert] if self.has_bias else product

    def plain(self, x: Tensor, place: Tensor, share: Tensor) -> Tensor:
        rows = []
        for token, chosen, weights in zip(x, place.tolist(), share, strict=True):
            parts = []
            for expert, weight in zip(chosen, weights, strict=True):
                first = self.product(token, self.first, expert)
                inner = self._apply_gate(first) if self.has_gate else self.act_fn(first)
                parts.append(weight * self.product(inner, "down_proj", expert))
            rows.append(torch.stack(parts).sum(0))
        return torch.stack(rows)


def places(tokens: int, number: int, chosen: int, kind: str) -> Tensor:
    """Experts of each token: at random, all the same ones, or one more token than one expert sees."""
    found = torch.rand(tokens, number).topk(chosen).indices
    if kind == "same":
        found = found[:1].expand(tokens, chosen).contiguous()
    elif kind == "lonely":
        found = torch.rand(tokens, number - 1).topk(min(chosen, number - 1)).indices
        found[0, 0] = number - 1
    return found


@given(
    tokens=st.integers(1, 9), number=st.integers(2, 7), chosen=st.integers(1, 3), biased=st.booleans(),
    transposed=st.booleans(), gated=st.booleans(), kind=st.sampled_from(["random", "same", "lonely"]),
    at_a_time=st.integers(1, 8), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_output_and_gradients_are_those_of_plain_code(
    tokens: int, number: int, chosen: int, biased: bool, transposed: bool, gated: bool, kind: str, at_a_time: int,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    module = Module(number, 12, 8, biased=biased, transposed=transposed, gated=gated)
    place = places(tokens, number, min(chosen, number), kind)
    x, share = torch.randn(tokens, 12).requires_grad_(), torch.rand(place.shape).requires_grad_()
    slope = torch.randn(tokens, 12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "per_block", lambda *_: at_a_time)
        found = experts_output(x, place, share, experts_of(module))
        gradients = torch.autograd.grad(found, [x, share], slope)
    expected = module.plain(x, place, share)
    for one, other in zip(
        (expected, *torch.autograd.grad(expected, [x, share], slope)), (found, *gradients), strict=True
    ):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_but_the_input_and_the_routing() -> None:
    module = Module(4, 64, 32, biased=True, transposed=False, gated=True)
    x, place = torch.randn(50, 64).requires_grad_(), places(50, 4, 2, "random")
    share = torch.rand(50, 2).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        experts_output(x, place, share, experts_of(module))
    assert sorted(tuple(one.shape) for one in kept) == [(50, 2), (50, 2), (50, 64)]


def test_one_product_for_a_block_is_that_of_each_expert() -> None:
    """Where torch has a grouped product for bf16, also on the CPU."""
    x, weight = torch.randn(37, 64).bfloat16(), torch.randn(5, 64, 48).bfloat16()
    counts = (7, 0, 20, 1, 9)
    assert experts.is_grouped(x, weight)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    whole = experts.grouped_product(x, weight, experts.Block(0, 5, counts, slice(0, 37), ends))
    parts = torch.cat([one @ matrix for one, matrix in zip(x.split(list(counts)), weight, strict=True)])
    assert apart(parts, whole) < 5e-3
    assert not experts.is_grouped(x.float(), weight.float()) and not experts.is_grouped(x[:, :60], weight[:, :60])


def test_no_auxiliary_loss_is_added_whatever_the_config_says(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Routers are frozen, so nothing has to hold their load in balance; the gradient is that of the pairs alone."""
    found = []
    for asked in (False, True):
        place = tmp_path / str(asked)
        place.mkdir()
        for file in folder_of("text qwen3_moe").iterdir():
            (place / file.name).write_bytes(file.read_bytes())
        config = json.loads((place / "config.json").read_text())
        more = {"output_router_logits": True, "router_aux_loss_coef": 100.0} if asked else {}
        (place / "config.json").write_text(json.dumps({**config, **more}))
        policy = load_policy(
            RunConfig(), place, device=CPU, dtype="fp32", probe_with=PAIRS, say=lambda line: None
        ).policy  # fmt: skip
        assert not any(one.requires_grad for name, one in policy.peft.named_parameters() if "lora_" not in name)
        score(policy, PairRow(PAIRS), metrics=False).logp.sum().backward()
        found.append({name: one.grad for name, one in policy.adapter_parameters().items() if "lora_B" in name})
    assert found[0] and all(torch.equal(one, found[1][name]) for name, one in found[0].items())
    assert all(bool(one.any()) for one in found[0].values())


def test_two_passes_are_equal_to_the_byte_on_any_number_of_threads() -> None:
    module = Module(6, 96, 64, biased=False, transposed=False, gated=True)
    x, place, share = torch.randn(400, 96), places(400, 6, 3, "random"), torch.rand(400, 3)
    first = experts_output(x, place, share, experts_of(module))
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(experts_output(x, place, share, experts_of(module))))
    thread.start()
    thread.join()
    assert torch.equal(first, found[0])


def test_experts_without_a_token_are_never_made_dense() -> None:
    class Counted:
        shape = torch.Size((4, 16, 8))

        def __init__(self) -> None:
            self.asked: list[tuple[int, int]] = []

        def dense(self, first: int, end: int, dtype: torch.dtype) -> Tensor:
            self.asked.append((first, end))
            return torch.ones(end - first, *self.shape[1:], dtype=dtype)

    module, stack = Module(4, 8, 8, biased=False, transposed=False, gated=True), Counted()
    parts = experts.Experts(module=module, first=stack, last=experts.PlainStack(module.down_proj))
    experts_output(torch.randn(3, 8), torch.tensor([[2], [0], [2]]), torch.ones(3, 1), parts)
    assert stack.asked == [(0, 1), (2, 3)]
