"""A family's loaded model: what is in 4 bits, what has LoRA, log-probs and gradients against plain transformers.

The plain side knows nothing of rows: one unpadded sequence a call, whole logits, plain PEFT.
"""

import re
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from peft import PeftModel
from torch import Tensor, nn

from qdpo.data.tokens.pack import PairRow
from qdpo.data.tokens.sieve import TokenPair
from qdpo.model.policy.adapter import save_adapter
from qdpo.model.policy.forward import row_scores
from qdpo.model.policy.targets import lora_targets
from qdpo.settings.schema import RunConfig
from qdpo.train.policy.build import Loaded, base_of, load_policy, probe_pairs
from qdpo.train.step.step import row_tensors

CPU = torch.device("cpu")
# Prompt, chosen, rejected: all longer than the tiny models' windows of 32 tokens but one prompt.
LENGTHS = ((70, 45, 37), (41, 20, 52), (19, 33, 36))
NATS, SHARE = 5e-5, 1e-4
# Where a difference is larger, the plain side is asked for its own rounding: the same, with each weight changed by one
# place of fp32. A random model can answer that with 8e-5 nats and 3e-4 of the largest gradient (Qwen3.5), so two exact
# computations may differ by as much; twice that rounding is allowed, and never more than these.
MOST_NATS, MOST_SHARE = 5e-4, 1e-3
ROUTERS = re.compile(r"router|(^|\.)gate(\.|$)|expert_gate$")
OUTSIDE = re.compile(r"vision|visual|audio|projector|embed_vision|embedder")


@dataclass
class Weights:
    """A base in NF4: the numbers of its body (everything but embeddings and head), of experts, and in 4 bits."""

    kind: str = ""
    body: int = 0
    four_bit: int = 0
    experts: int = 0
    experts_four_bit: int = 0
    outside: int = 0
    """Numbers outside the decoder: towers and projectors."""
    linear: list[str] = field(default_factory=list)
    """Linear layers but the head."""
    left: dict[str, list[str]] = field(default_factory=dict)
    """Layers that `adapter.targets=all-linear` leaves alone, by qdpo's own word for their role."""


def weights_in_four_bits(folder: Path) -> dict[str, Any]:
    """Loads the base as a run in NF4 does, and counts."""
    model = base_of(_config(folder, "nf4", "bf16"), folder, CPU, "bf16", _silent)
    found = Weights(kind=type(model).__name__)
    tables = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, parameter in model.named_parameters():
        is_four_bit = parameter.dtype == torch.uint8  # a linear layer's, or a stack of experts
        numbers = parameter.numel() * (2 if is_four_bit else 1)
        if id(parameter) in tables or (parameter.dim() > 1 and "embed" in name):
            continue
        found.body += numbers
        found.four_bit += numbers * is_four_bit
        if "experts" in name and "shared" not in name:
            found.experts += numbers
            found.experts_four_bit += numbers * is_four_bit
        if OUTSIDE.search(name):
            found.outside += numbers
    head = model.get_output_embeddings()
    found.linear = [name for name, one in model.named_modules() if isinstance(one, nn.Linear) and one is not head]
    found.left = lora_targets(model).left
    return vars(found)


@dataclass
class Exact:
    """The largest differences: log-probs in nats, gradients as a share of the largest one."""

    kind: str = ""
    attention: str = ""
    fast: str = ""
    whole_nats: float | None = None
    """Adapter off, against the class that the folder's config.json names; None where that class cannot be called."""
    whole_why: str = ""
    off_nats: float = 0.0
    on_nats: float = 0.0
    gradient: float = 0.0
    gradient_of: str = ""
    nats_allowed: float = NATS
    gradient_allowed: float = SHARE
    mean_logp: float = 0.0
    effect: float = 0.0
    """The most that the adapter changes a log-prob."""
    dead: list[str] = field(default_factory=list)
    """Adapted layers that get no gradient."""
    adapted: list[str] = field(default_factory=list)


def differences(folder: Path, work: Path) -> dict[str, Any]:
    """Compares qdpo's scores and gradients with plain code, in fp32 and without quantisation."""
    warnings.filterwarnings("ignore")
    pairs, found, said = _pairs(folder), Exact(), list[str]()
    found.whole_nats, found.whole_why, whole_N = _of_the_whole_class(folder, pairs)
    config = _config(folder, "none", "fp32")
    loaded = load_policy(config, folder, device=CPU, dtype="fp32", probe_with=probe_pairs(pairs), say=said.append)
    policy = loaded.policy
    found.kind = type(policy.peft.get_base_model()).__name__
    for line in said:
        name, _, text = line.partition(": ")
        if name in ("attention", "fast parts"):
            setattr(found, name.split()[0], text)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in policy.adapter_parameters().items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_adapter(policy, work, base_name=str(folder), revision=None)
    off_N, on_N, gradients = _plain(config, folder, work, pairs)
    if whole_N is not None:
        found.whole_nats = _largest(whole_N - off_N)
    found.mean_logp, found.effect = off_N.mean().item(), _largest(on_N - off_N)
    found.adapted = sorted({_module(name) for name in policy.adapter_parameters()})
    learning = {_module(name) for name, gradient in gradients.items() if gradient.any()}
    found.dead = sorted(set(found.adapted) - learning)
    biggest = max(gradient.abs().max() for gradient in gradients.values())
    for kept in (1, 0):
        _compare(loaded, pairs, kept, found, (off_N, on_N), gradients, biggest)
    if max(found.on_nats, found.off_nats, found.whole_nats or 0.0) > NATS or found.gradient > SHARE:
        rounded_off_N, rounded_on_N, rounded = _plain(config, folder, work, pairs, rounding=True)
        of_logps = max(_largest(rounded_off_N - off_N), _largest(rounded_on_N - on_N))
        found.nats_allowed = min(max(NATS, 2 * of_logps), MOST_NATS)
        of_gradients = max(_largest(rounded[name] - one) for name, one in gradients.items())
        found.gradient_allowed = min(max(SHARE, 2 * of_gradients / biggest.item()), MOST_SHARE)
    return vars(found)


def _compare(
    loaded: Loaded, pairs: list[TokenPair], kept: int, found: Exact, plain: tuple[Tensor, Tensor],
    gradients: dict[str, Tensor], biggest: Tensor,
) -> None:  # fmt: skip
    """The same pairs in one row, with `kept` layers kept; the larger of two differences is left in `found`."""
    loaded.layers.keep(kept)
    policy, off_N, on_N = loaded.policy, *plain
    row = row_tensors(PairRow(pairs), CPU)

    def scores() -> Tensor:
        made = row_scores(policy, row.token_T, row.position_T, row.source_N, row.label_N, row.spans, metrics=False)
        return made.logp

    policy.peft.zero_grad()
    logp_N = scores()
    (logp_N * _slopes(logp_N)).sum().backward()
    found.on_nats = max(found.on_nats, _largest(logp_N.detach() - on_N))
    for name, parameter in policy.adapter_parameters().items():
        true = gradients.get(name, torch.zeros_like(parameter))
        ours = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        share = ((ours - true).abs().max() / biggest).item()
        if not share <= found.gradient:
            found.gradient, found.gradient_of = share, kind_of(name)
    with torch.no_grad(), policy.reference():
        found.off_nats = max(found.off_nats, _largest(scores() - off_N))


def _plain(
    config: RunConfig, folder: Path, adapter: Path, pairs: list[TokenPair], *, rounding: bool = False
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probs with the adapter off and on, and its gradients: the model's own forward under plain PEFT.

    `rounding` changes each weight by one place of fp32, up or down.
    """
    peft = PeftModel.from_pretrained(base_of(config, folder, CPU, "fp32", _silent), str(adapter), is_trainable=True)
    peft.eval()
    if rounding:
        generator = torch.Generator().manual_seed(3)
        for parameter in peft.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.data.mul_(1 + signs * torch.finfo(torch.float32).eps)
    with torch.no_grad(), peft.disable_adapter():
        off_N = plain_logps(peft, pairs)
    on_N = plain_logps(peft, pairs)
    (on_N * _slopes(on_N)).sum().backward()
    gradients = {name: one.grad for name, one in peft.named_parameters() if one.grad is not None}
    return off_N, on_N.detach(), gradients


@torch.no_grad()
def _of_the_whole_class(folder: Path, pairs: list[TokenPair]) -> tuple[None, str, Tensor | None]:
    try:
        return None, "", plain_logps(served_class(folder).from_pretrained(folder, dtype=torch.float32).eval(), pairs)
    except (ImportError, AttributeError) as error:
        return None, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}", None


def served_class(folder: Path) -> Any:
    """The class that the folder's config.json names, which servers load."""
    config = hf.AutoConfig.from_pretrained(folder, local_files_only=True)
    return getattr(hf, config.architectures[0])


def plain_logps(model: Any, pairs: list[TokenPair]) -> Tensor:
    """Log-probs of all answers' tokens: one unpadded sequence a call, whole logits."""
    found = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(np.concatenate([pair.prompt, answer]).astype(np.int64))[None]
            logit_TV = model(input_ids=ids, use_cache=False).logits[0].float()
            answer_N = ids[0, len(pair.prompt) :]
            logp_NV = logit_TV[len(pair.prompt) - 1 : -1].log_softmax(-1)
            found.append(logp_NV.gather(1, answer_N[:, None])[:, 0])
    return torch.cat(found)


def _pairs(folder: Path) -> list[TokenPair]:
    rng = np.random.default_rng(4)
    return [
        TokenPair(*(rng.integers(300, 1000, length, dtype=np.int32) for length in lengths), row)
        for row, lengths in enumerate(LENGTHS, 1)
    ]


def _slopes(logp_N: Tensor) -> Tensor:
    return torch.linspace(-1, 1, len(logp_N))


def _largest(difference_N: Tensor) -> float:
    return difference_N.abs().max().item()


def _module(name: str) -> str:
    return re.sub(r"\.lora_[AB]\..*", "", name).removeprefix("base_model.model.")


def kind_of(name: str) -> str:
    """A module's name without the layer's number: layers.3.mlp.up_proj → mlp.up_proj."""
    return re.sub(r"^.*?layers\.\d+\.", "", _module(name))


def kinds_of(names: list[str]) -> list[str]:
    return sorted(Counter(map(kind_of, names)))


def _config(folder: Path, quantization: str, dtype: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(folder), "quantization": quantization, "dtype": dtype, "device": "cpu"},
            "adapter": {"rank": 4, "alpha": 8},
            "data": {"max_tokens": 512},
        }
    )


def _silent(line: str) -> None:
    pass
