"""Installs faster forwards in the loaded policy's modules, each after a check against the plain forward of that module.

A check runs the module's own forward and the fast forward on the same random input, with an adapter that has an effect,
and compares output and gradients. A module that differs, fails, or is not recognised keeps its own forward.
"""

import inspect
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qdpo.model.base.expert_files import is_experts
from qdpo.model.base.text_model import decoder_of
from qdpo.model.fast import linear, mlp, norm
from qdpo.model.fast.activation import ACTIVATIONS, Activation
from qdpo.model.fast.experts import experts_of, experts_output
from qdpo.model.policy.compare import Forward, difference, random_input, verdict
from qdpo.model.policy.twin import small_mlp

# Torch's own norms keep as little as the fast ones.
LEAN_ALREADY = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
# Width at which a norm without a weight is checked; its forward does not depend on it.
ANY_WIDTH = 64


@dataclass
class Installed:
    """The number of fast modules of each kind, and the kinds that kept their own forward, with the reason."""

    fast: Counter[str] = field(default_factory=Counter)
    plain: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [f"{count} {kind}" for kind, count in self.fast.items()]
        left = [f"{kind} stays plain ({why})" for kind, why in self.plain.items()]
        return "; ".join([", ".join(parts) + " checked against their plain twins" if parts else "none", *left])


Made = tuple[Forward | None, str | None]
"""A fast forward, or None and the reason why there is none."""


def install(peft: Any, device: torch.device, *, weightless: bool = False) -> Installed:
    """Replaces forwards of adapter linears, norms and MLPs in the decoder, module by module; saved names do not change.

    `weightless`: the linear layers have shapes but no numbers (a trace on fake tensors), so they are replaced by kind
    alone, without the check, and an MLP is checked in small.
    """
    found = Installed()
    modules = list(decoder_of(peft.get_base_model()).named_modules())
    verdicts: dict[tuple[Any, ...], str | None] = {}
    dtype = torch.float32
    for name, module in modules:
        if (layer := linear.adapted(module)) is not None:
            dtype = linear.compute_dtype(layer.base)
            kind = (type(module), name.rpartition(".")[2], layer.base.in_features, layer.base.out_features)
            if kind not in verdicts:
                verdicts[kind] = None if weightless else _compare_linear(module, layer, device)
            fast = linear.fast_forward(module) if verdicts[kind] is None else None
            _settle(found, module, "adapter linear", (fast, verdicts[kind]))
    norms: dict[tuple[Any, ...], norm.NormForm] = {}
    acts: dict[tuple[Any, ...], int | str] = {}
    for _name, module in modules:
        if _is_norm(module):
            _settle(found, module, "norm", _fast_norm(module, device, dtype, norms))
    sets: dict[tuple[Any, ...], str | None] = {}
    for _name, module in modules:
        if is_experts(module):
            _settle(found, module, "experts", _fast_experts(module, device, dtype, sets, weightless=weightless))
    for _name, module in modules:
        if (parts := _mlp_parts(module)) is not None and not is_experts(module):
            _settle(found, module, f"{parts.kind} MLP", _fast_mlp(module, parts, device, acts, weightless=weightless))
    return found


def _settle(found: Installed, module: Any, kind: str, made: Made) -> None:
    forward, why = made
    if forward is not None and why is None:
        module.forward = forward
        found.fast[kind] += 1
    else:
        found.plain[f"{kind} {type(module).__name__}"] = why or "no fast forward"


def _compare_linear(module: Any, layer: linear.AdaptedLinear, device: torch.device) -> str | None:
    dtype = linear.compute_dtype(layer.base)
    x = random_input(layer.base.in_features, dtype, device)
    return verdict(difference(module.forward, linear.fast_forward(module), [x], [layer]), dtype)


def _is_norm(module: nn.Module) -> bool:
    name = type(module).__name__
    is_named = name.endswith(("Norm", "RMSNormGated"))
    return is_named and not isinstance(module, LEAN_ALREADY) and not any(module.children())


def _fast_norm(
    module: Any, device: torch.device, dtype: torch.dtype, chosen: dict[tuple[Any, ...], norm.NormForm]
) -> Made:
    """The fast forward of the form that comes nearest to the norm's own; `chosen` has that of its kind."""
    plain, weight = module.forward, getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    is_known = weight is None or (isinstance(weight, Tensor) and weight.dim() in (1, 2))
    if not (isinstance(eps, float) and is_known):
        return None, "its shape or epsilon is unknown"
    if weight is not None and weight.requires_grad:
        return None, "its weight is trained"
    group = getattr(module, "group_size", None)
    width = weight.shape[-1] if weight is not None else group or ANY_WIDTH
    if group is None and (groups := getattr(module, "n_groups", 1)) > 1:
        group = width // groups
    heads = weight.shape[0] if weight is not None and weight.dim() == 2 else None
    is_gated = "gate" in inspect.signature(type(module).forward).parameters

    def fast(form: norm.NormForm) -> Forward:
        def forward(x: Tensor, gate: Tensor | None = None) -> Tensor:
            given = [x] if gate is None else [x, gate]
            takes = len(given) == 1 + is_gated and all(one.dtype == dtype and one.shape == x.shape for one in given)
            fits = weight is None or x.shape[-weight.dim() :] == weight.shape
            if not (takes and fits) or not torch.is_grad_enabled() or not any(one.requires_grad for one in given):
                result: Tensor = plain(*given)
                return result
            return norm.norm(x, weight, eps, form, gate=gate, group=group)

        return forward

    kind = (type(module), weight is None, width, heads, group, eps, is_gated, getattr(module, "activation", None))
    inputs = [random_input(width, dtype, device, seed=seed, heads=heads) for seed in range(1 + is_gated)]
    known = [chosen[kind]] if kind in chosen else norm.forms(has_weight=weight is not None, has_gate=is_gated)
    nearest: tuple[float, norm.NormForm] | None = None
    why: str | None = None
    for form in known:
        apart = difference(plain, fast(form), inputs)
        if isinstance(apart, str):
            why = apart
        elif nearest is None or apart < nearest[0]:
            nearest = (apart, form)
        if apart == 0:
            break
    if nearest is None:
        return None, why
    if (why := verdict(nearest[0], dtype)) is None:
        chosen[kind] = nearest[1]
    return fast(nearest[1]), why


def _fast_experts(
    module: Any,
    device: torch.device,
    dtype: torch.dtype,
    verdicts: dict[tuple[Any, ...], str | None],
    *,
    weightless: bool,
) -> Made:
    """A forward of a layer's experts that keeps their input alone; `verdicts` has that of its kind."""

    def fast(x: Tensor, place: Tensor, share: Tensor) -> Tensor:
        return experts_output(x, place, share, experts_of(module))

    experts = experts_of(module)
    kind = (type(module), tuple(experts.first.shape), tuple(experts.last.shape))
    if kind not in verdicts:
        width = experts.last.shape[1 + experts.is_transposed]
        x = random_input(width, dtype, device)[0].detach().requires_grad_()
        scores = torch.rand(len(x), experts.number, generator=torch.Generator().manual_seed(3)).to(device)
        share, place = scores.topk(min(2, experts.number))
        share = share.to(dtype).requires_grad_()
        plain = module.forward
        verdicts[kind] = (
            None
            if weightless
            else verdict(
                difference(lambda x, share: plain(x, place, share), lambda x, share: fast(x, place, share), [x, share]),
                dtype,
            )
        )
    return fast, verdicts[kind]


def _mlp_parts(module: nn.Module) -> mlp.MlpParts | None:
    """The names of an MLP's layers, if it has nothing but these, an activation and dropout."""
    children = {name for name, child in module.named_children()}
    for parts in mlp.MLPS:
        names = {*parts.first, parts.down}
        if names <= children and children - names <= {*ACTIVATION_NAMES, "dropout"}:
            return parts
    return None


ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")


def _activations(module: nn.Module) -> list[Activation]:
    """The module's own activation; for one that is written in its forward, all known ones."""
    own = next((act for name in ACTIVATION_NAMES if callable(act := getattr(module, name, None))), None)
    return list(ACTIVATIONS) if own is None else [Activation(type(own).__name__, own)]


def _fast_mlp(
    module: Any,
    parts: mlp.MlpParts,
    device: torch.device,
    chosen: dict[tuple[Any, ...], int | str],
    *,
    weightless: bool,
) -> Made:
    """The fast forward of an MLP; `chosen` has its kind's place in `_activations`, or the reason why it stays plain."""
    down, plain = linear.adapted(getattr(module, parts.down)), module.forward
    if down is None:
        return None, f"its {parts.down} has no plain adapter"
    dtype = linear.compute_dtype(down.base)
    first = [getattr(module, name) for name in parts.first]

    def fast(act: Activation) -> Forward:
        def forward(x: Tensor) -> Tensor:
            layer = getattr(module, parts.down)
            if layer.disable_adapters or layer.merged or not torch.is_grad_enabled() or x.dtype != dtype:
                result: Tensor = plain(x)
                return result
            return mlp.lean_mlp(x, first, down, act, kind=parts.kind)

        return forward

    activations = _activations(module)
    if weightless:
        form = (type(module), parts)
        if form not in chosen:
            twin = small_mlp(module, parts, dtype)
            chosen[form] = _fast_mlp(twin, parts, device, {}, weightless=False)[1] or 0
        why = chosen[form]
        return (None, why) if isinstance(why, str) else (fast(activations[0]), None)
    layers = [
        part for name in (*parts.first, parts.down) if (part := linear.adapted(getattr(module, name))) is not None
    ]
    width = getattr(getattr(first[0], "base_layer", first[0]), "in_features", None)
    kind = (type(module), parts, width, down.base.in_features, len(layers))
    if kind not in chosen:
        x = random_input(width or ANY_WIDTH, dtype, device)
        found = [verdict(difference(plain, fast(act), [x], layers), dtype) for act in activations]
        chosen[kind] = found.index(None) if None in found else str(found[0])
    place = chosen[kind]
    return (None, place) if isinstance(place, str) else (fast(activations[place]), None)
