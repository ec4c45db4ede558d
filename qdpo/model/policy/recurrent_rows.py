"""Lets the recurrent layers of a loaded model compute rows of pairs, each kind of layer after a check on that model.

The check runs a layer on random input: a row of pairs, and each of its sequences alone, by the layer's own forward. It
compares outputs and gradients, and by itself the gradient that only a state carries: it is often less than the rounding
of the whole in 16 bits. A kind that differs, fails, or is not recognised keeps its own forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdpo.families.config_fields import FULL, SLIDING
from qdpo.model.fast.attention import PairSpans
from qdpo.model.fast.recurrent import RowForward, has_recurrence
from qdpo.model.policy.compare import apart, verdict
from qdpo.model.policy.recompute import decoder_layers

# Layers that treat each token alone, and those whose attention is known exactly.
WITHOUT_STATE = (FULL, SLIDING, "attention", "mlp", "moe")
# Prompt, chosen and rejected tokens of the check: several blocks, prompts shorter than any convolution, one token.
CHECKED = ((300, 3, 70), (1, 5, 1), (2, 1, 4))
# The most by which the gradient that a state carries may differ, as a share of it; and the least of it, as a share of
# the whole gradient, that is looked at.
CARRIED, LEAST = 0.25, 1e-6


@dataclass(frozen=True)
class _Span:
    start: int
    prompt: int
    chosen: int
    rejected: int


def install(backbone: Any, dtype: torch.dtype, device: torch.device, *, weightless: bool = False) -> dict[str, str]:
    """Gives each recurrent layer a forward for rows; returns the kinds that keep their own, with the reason.

    `dtype` is that of the hidden states. `weightless`: the layers have shapes but no numbers (a trace on fake tensors),
    so that nothing can be compared.
    """
    verdicts: dict[tuple[Any, ...], str | None] = {}
    width = int(backbone.config.get_text_config().hidden_size)
    for module in backbone.modules():
        if not has_recurrence(type(module)) or isinstance(module.forward, RowForward):
            continue
        kind = (type(module), *sorted((name, tuple(one.shape)) for name, one in module.named_parameters()))
        if "forward" in vars(module):
            # A row runs the code of the class, and would pass by what stands in its place.
            verdicts[kind] = "the forward of one of them has been replaced"
            continue
        forward = RowForward(module)
        if kind not in verdicts:
            verdicts[kind] = None if weightless else _compare(module, forward, width, dtype, device)
        if verdicts[kind] is None:
            module.forward = forward
    return {kind[0].__name__: why for kind, why in verdicts.items() if why is not None}


def obstacle(backbone: Any, refused: Mapping[str, str]) -> str | None:
    """The layers of `backbone` that carry a state from token to token and cannot compute rows, or None."""
    types = list(getattr(backbone.config, "layer_types", None) or [])
    kinds = dict.fromkeys(
        kind
        for kind, layer in zip(types, decoder_layers(backbone), strict=False)
        if kind not in WITHOUT_STATE and not any(isinstance(one.forward, RowForward) for one in layer.modules())
    )
    if not kinds:
        return None
    why = "".join(f"; {name}: {reason}" for name, reason in refused.items())
    return f"the model has layers of {' and '.join(kinds)}{why}"


def _compare(
    module: nn.Module, forward: RowForward, width: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """The reason why a row differs from its sequences alone, or None."""
    spans, total = [], 0
    for lengths in CHECKED:
        spans.append(_Span(total, *lengths))
        total += sum(lengths)
    generator = torch.Generator().manual_seed(0)
    x, slope = (torch.randn(1, total, width, generator=generator).to(device, dtype) for _ in range(2))
    x.requires_grad_()
    results, carried = [], []
    # Taps lead from an answer to the last tokens of its prompt; to all others, only the state does.
    taps = max((one.kernel_size[0] for one in module.modules() if isinstance(one, nn.Conv1d)), default=1) - 1
    prompt_T, answers_T = slice(0, spans[0].prompt - taps), slice(spans[0].prompt, spans[1].start)
    try:
        with torch.enable_grad():
            for output in (_alone(module, x, spans), forward(x, pair_spans=PairSpans(spans))):
                (back,) = torch.autograd.grad(output[:, answers_T], [x], slope[:, answers_T], retain_graph=True)
                carried.append(back[:, prompt_T].float())
                results.append((output.detach(), *torch.autograd.grad(output, [x], slope)))
    except Exception as error:
        return f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:100]}"
    if (why := verdict(max(apart(*pair) for pair in zip(*results, strict=True)), dtype)) is not None:
        return why
    whole = results[0][1].float().norm()
    share = ((carried[1] - carried[0]).norm() / carried[0].norm().clamp(min=max(LEAST * whole.item(), 1e-30))).item()
    return None if share <= CARRIED else f"the gradient that its state carries differs by {share:.2g} of its norm"


def _alone(module: nn.Module, x: Tensor, spans: list[_Span]) -> Tensor:
    """The layer's own output for the row's sequences, one by one: [prompt chosen], and the end of [prompt rejected]."""
    parts = []
    for span in spans:
        prompt, chosen, rejected = torch.split(
            x[:, span.start :][:, : span.prompt + span.chosen + span.rejected],
            [span.prompt, span.chosen, span.rejected],
            1,
        )
        parts.append(module.forward(torch.cat([prompt, chosen], 1)))
        parts.append(module.forward(torch.cat([prompt, rejected], 1))[:, span.prompt :])
    return torch.cat(parts, 1)
