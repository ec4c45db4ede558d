"""Installs faster forwards in the loaded policy's modules, each after a check against the plain forward of that module.

A check runs the module's own forward and the fast forward on the same random input, with an adapter that has an effect,
and compares output and gradients. A module that differs, or is not recognised, keeps its own forward.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qdpo.model.fast import linear, norm_mlp

TOKENS = 24
# Norm of the difference over the norm of the plain result, for the output and each gradient.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}

Forward = Callable[..., Tensor]


@dataclass
class Installed:
    """The number of fast modules of each kind, and the kinds that kept their own forward, with the reason."""

    fast: Counter[str] = field(default_factory=Counter)
    plain: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{count} {kind}" for kind, count in self.fast.items()]
        left = [f"{kind} stays plain ({why})" for kind, why in self.plain.items()]
        return "; ".join([", ".join(parts) + " checked against their plain twins" if parts else "none", *left])


def install(peft: nn.Module, device: torch.device, *, weightless: bool = False) -> Installed:
    """Replaces forwards of adapter linears, RMS norms and gated MLPs, module by module; saved names do not change.

    `weightless`: the linear layers have shapes but no numbers (a trace on fake tensors), so they and the MLPs are
    replaced by kind alone, without the check.
    """
    found = Installed()
    modules = list(peft.named_modules())
    verdicts: dict[tuple[Any, ...], str | None] = {}
    for name, module in modules:
        if (layer := linear.adapted(module)) is not None:
            kind = (type(module), name.rpartition(".")[2], layer.base.in_features, layer.base.out_features)
            if kind not in verdicts:
                verdicts[kind] = None if weightless else _compare_linear(module, layer, device)
            fast = linear.fast_forward(module) if verdicts[kind] is None else None
            _settle(found, module, "adapter linear", fast, verdicts[kind])
    for _name, module in modules:
        if type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), Tensor):
            forward, why = _fast_norm(module, device)
            _settle(found, module, "norm", forward, why)
    for _name, module in modules:
        if all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            up: Any = getattr(module.up_proj, "base_layer", module.up_proj)
            mlp = (type(module), "mlp", getattr(up, "out_features", None))
            forward, why = _fast_mlp(module, device, known=weightless or mlp in verdicts)
            verdicts.setdefault(mlp, why)
            _settle(found, module, "gated MLP", forward, verdicts[mlp])
    return found


def _settle(found: Installed, module: Any, kind: str, forward: Forward | None, why: str | None) -> None:
    if why is None:
        module.forward = forward
        found.fast[kind] += 1
    else:
        found.plain[f"{kind} {type(module).__name__}"] = why


def _compare_linear(module: Any, layer: linear.AdaptedLinear, device: torch.device) -> str | None:
    x = _random(layer.base.in_features, linear.compute_dtype(layer.base), device)
    return _difference(module.forward, linear.fast_forward(module), x, [layer])


def _fast_norm(module: Any, device: torch.device) -> tuple[Forward | None, str | None]:
    weight, plain = module.weight, module.forward
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(eps, float) or weight.dim() != 1:
        return None, "its shape or epsilon is unknown"
    why: str | None = "no known weighting"
    for weigh in norm_mlp.WEIGHINGS:

        def fast(x: Tensor, weigh: norm_mlp.Weigh = weigh) -> Tensor:
            if not torch.is_grad_enabled() or not x.requires_grad or x.dtype != weight.dtype:
                result: Tensor = plain(x)
                return result
            return norm_mlp.rms_norm(x, weight, eps, weigh)

        why = _difference(plain, fast, _random(len(weight), weight.dtype, device), [])
        if why is None:
            return fast, None
    return None, why


def _fast_mlp(module: Any, device: torch.device, *, known: bool) -> tuple[Forward | None, str | None]:
    down, plain = linear.adapted(module.down_proj), module.forward
    if down is None:
        return None, "its down_proj has no plain adapter"
    dtype = linear.compute_dtype(down.base)
    probe = _random(64, torch.float32, device)
    with torch.no_grad():
        matching = [act for act in norm_mlp.ACTIVATIONS if torch.allclose(act.function(probe), module.act_fn(probe))]
    if not matching:
        return None, f"its activation {type(module.act_fn).__name__} is unknown"

    def fast(x: Tensor) -> Tensor:
        off = module.down_proj.disable_adapters or module.down_proj.merged
        if off or not torch.is_grad_enabled() or x.dtype != dtype:
            result: Tensor = plain(x)
            return result
        return norm_mlp.gated_mlp(x, module.gate_proj, module.up_proj, down, matching[0])

    if known:
        return fast, None
    layers = [part for part in map(linear.adapted, (module.gate_proj, module.up_proj, module.down_proj)) if part]
    width = getattr(module.gate_proj, "base_layer", module.gate_proj).in_features
    return fast, _difference(plain, fast, _random(width, dtype, device), layers)


def _random(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    values = torch.randn(1, TOKENS, width, generator=torch.Generator().manual_seed(0))
    return values.to(device, dtype).requires_grad_()


def _difference(plain: Forward, fast: Forward, x: Tensor, layers: Sequence[linear.AdaptedLinear]) -> str | None:
    """None if both forwards give the same output and gradients of input, A and B; else the difference, as text.

    Neither may change its input or the gradient that it receives: other modules read the same tensors.
    """
    leaves = [x, *(part for layer in layers for part in (layer.a_RK, layer.b_NR))]
    untouched = [layer.b_NR.detach().clone() for layer in layers]
    generator, given = torch.Generator().manual_seed(1), x.detach().clone()
    try:
        for layer in layers:  # B is 0 in a new adapter: a wrong scale would not show
            noise = torch.randn(layer.b_NR.shape, generator=generator).mul_(0.02)
            layer.b_NR.data.copy_(layer.b_NR.data + noise.to(x.device))
        results = []
        for forward in (plain, fast):
            output = forward(x)
            slope = torch.randn(output.shape, generator=generator.manual_seed(2)).to(output)
            before = slope.clone()
            results.append([output.detach(), *torch.autograd.grad(output, leaves, slope)])
            if not (torch.equal(x, given) and torch.equal(slope, before)):
                return "it overwrites its input or the gradient that it receives"
    except (TypeError, RuntimeError, AttributeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    finally:
        for layer, before in zip(layers, untouched, strict=True):
            layer.b_NR.data.copy_(before)
    for expected, found in zip(*results, strict=True):
        error_ = ((found.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-30)).item()
        if not error_ <= TOLERANCE[x.dtype]:
            return f"differs by {error_:.2g} of its norm"
    return None
