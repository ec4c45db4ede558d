"""Where the time of a step goes, from a torch profile of it.

Every operator's own time counts once, without that of the operators it called: on the CPU the time it ran, on CUDA the
time of the kernels that it launched. Backward passes are in it. What is left is "rest" on the CPU (Python among it); on
CUDA, where kernels follow each other on one stream, it is "elementwise", all other kernels and copies, and "gaps", in
which the device waits for launches.
"""

from collections.abc import Iterable
from typing import Any

from torch.profiler import profile

ATTENTION = ("scaled_dot_product", "flash_attention", "flash_attn", "varlen")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul")
# What runs inside one of these belongs to it, products included.
WHOLE = ("attention", "head", "4-bit dequantisation", "optimizer")
KINDS = ("head", "attention", "4-bit dequantisation", "base linears", "adapter linears", "optimizer")


def shares(profiled: profile, wall_s: float, *, vocabulary: int, rank: int, cuda: bool) -> dict[str, float]:
    """Share of `wall_s` by kind, which operator names show, and sizes that only one part of a model has."""
    seconds, others = dict.fromkeys(KINDS, 0.0), 0.0
    pending: list[tuple[Any, str | None]] = [(event, None) for event in _roots(profiled.events() or [])]
    while pending:
        event, above = pending.pop()
        kind = above if above in WHOLE else _kind(event, vocabulary, rank) or above
        spent = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
        if kind is not None:
            seconds[kind] += spent
        else:
            others += spent
        pending += [(child, kind) for child in event.cpu_children]
    found = {kind: value / wall_s for kind, value in seconds.items()}
    if cuda:
        found["elementwise"] = others / wall_s
    return {**found, "gaps" if cuda else "rest": 1 - sum(found.values())}


def _roots(events: Iterable[Any]) -> list[Any]:
    """Operators that no other called. Kernels and the device's own annotations are events of their own, without a
    parent; an operator's time holds that of its kernels already."""
    return [event for event in events if event.cpu_parent is None and event.device_type.name == "CPU"]


def _kind(event: Any, vocabulary: int, rank: int) -> str | None:
    """The part of the step that the operator by itself shows to belong to, if any."""
    sizes = {size for shape in event.input_shapes or [] if isinstance(shape, list) for size in shape}
    if "dequantize" in event.name:
        return "4-bit dequantisation"
    if any(word in event.name for word in ATTENTION):
        return "attention"
    if event.name.startswith("Optimizer."):
        return "optimizer"
    if vocabulary in sizes and "embedding" not in event.name:
        return "head"
    if "gemm_4bit" in event.name:
        return "base linears"
    if event.name in PRODUCTS:
        return "adapter linears" if rank in sizes else "base linears"
    return None
