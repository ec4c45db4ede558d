"""Activation checkpointing: selects the layers that keep their activations, and offloads the inputs of the others."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qdpo.errors import ConfigError
from qdpo.model.fast import attention


def decoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """The decoder layers, which may be of several classes: the longest ModuleList that is in no other one.

    A list of as many modules as the config names layers is preferred: a tiny model has longer ones.
    Raises: ConfigError if the model has no such list.
    """
    lists = {
        name: module for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    }
    outer = [one for name, one in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        raise ConfigError(
            f"{type(backbone).__name__} has no list of decoder layers, so it cannot be checkpointed layer by layer."
        )
    stated = getattr(getattr(backbone, "config", None), "num_hidden_layers", None)
    return max([one for one in outer if len(one) == stated] or outer, key=len)


class Layers:
    """The decoder layers of a policy, each of which keeps or recomputes its activations.

    Torch's non-reentrant checkpoint wraps a recomputed layer's forward. The last layers are the ones to keep: their
    activations live shortest. `preserve_rng_state` is off because nothing inside is random: dropout is zero.
    `layers` are those of the model, if they are not to be looked for.
    `host` holds the inputs of recomputed layers; None: they stay on the device.
    With `compiled`, the kept layers run through torch.compile. Recomputed layers do not: under dynamic shapes a
    recompute may use a different compiled graph from its forward pass, and torch 2.13 then raises a CheckpointError.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        host: "HostInputs | None" = None,
        compiled: bool = False,
        layers: Iterable[nn.Module] | None = None,
    ):
        self._layers: list[Any] = list(decoder_layers(backbone) if layers is None else layers)
        self._forwards = [layer.forward for layer in self._layers]
        self._kept = self._forwards
        if compiled:
            attention.register(compiled=True)
            # Layers share their code, and so one budget of compiled variants.
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(self._layers))
            self._kept = [_compiled(forward) for forward in self._forwards]
        self._host = host

    @property
    def modules(self) -> list[Any]:
        """The layers, first to last."""
        return self._layers

    def __len__(self) -> int:
        return len(self._layers)

    def keep(self, kept_layers: int | str) -> int:
        """Makes the last `kept_layers` (or "all") keep their activations; returns the number of recomputed layers."""
        kept = len(self) if kept_layers == "all" else min(int(kept_layers), len(self))
        recomputed = len(self) - kept
        if self._host is not None:
            self._host.forget()
        for place, layer in enumerate(self._layers):
            layer.forward = _recomputed(self._forwards[place], self._host) if place < recomputed else self._kept[place]
        return recomputed


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compiles only with gradients. Scoring is not compiled: policy and reference use the same arithmetic."""
    compiled = torch.compile(forward, dynamic=True)

    def switched(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)

    return switched


def _recomputed(forward: Callable[..., Any], host: "HostInputs | None") -> Callable[..., Any]:
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        if host is None:
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        # These hooks see only the layer's inputs: inside the layer the checkpoint's own hooks take precedence.
        hidden = _place(args[0] if args else kwargs["hidden_states"])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: host.pack(t, hidden), host.unpack):
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return checkpointed


_Place = tuple[int, int, torch.Size]


def _place(tensor: Tensor) -> _Place:
    """Storage, offset and shape: identifies a tensor, even a fake one, which has no address."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.shape


class HostInputs:
    """Keeps inputs of recomputed layers in pinned host memory from the forward pass to the backward pass.

    Copies run on a separate stream. When the backward pass requests an input, the copy of the layer before is already
    under way. Buffers are reused, for shorter rows too: every copy into or out of them is on that stream.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._free: list[Tensor] = []
        self._last: _Parked | None = None

    def pack(self, tensor: Tensor, hidden: "_Place") -> "Tensor | _Parked":
        """Sends the tensor at `hidden` to the host; positions and masks stay on the device."""
        if _place(tensor) != hidden:
            return tensor
        if tensor.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        whole = self._free.pop() if self._free else None
        if whole is None or whole.numel() < tensor.numel() or whole.dtype != tensor.dtype:
            whole = self.buffer(tensor)
        buffer = whole[: tensor.numel()].view(tensor.shape)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
            tensor.record_stream(self._stream)  # its memory is not reused before the copy is done
        with torch.cuda.stream(self._stream):
            buffer.copy_(tensor, non_blocking=True)
        self._last = _Parked(whole, buffer, tensor.device, self._last)
        return self._last

    def buffer(self, like: Tensor) -> Tensor:
        """New one-dimensional host memory for a tensor's numbers; pinned if the tensor is on a GPU."""
        return torch.empty(like.numel(), dtype=like.dtype, pin_memory=like.is_cuda)

    def unpack(self, packed: "Tensor | _Parked") -> Tensor:
        """The hidden states, back on the device; starts the copy for the layer before."""
        if not isinstance(packed, _Parked):
            return packed
        tensor = self._fetch(packed)
        if packed.arrived is not None:
            torch.cuda.current_stream(packed.device).wait_event(packed.arrived)
            tensor.record_stream(torch.cuda.current_stream(packed.device))
        self._last, before = packed.before, packed.before
        packed.tensor = packed.before = None
        self._free.append(packed.whole)
        if before is not None:
            self._fetch(before)
        return tensor

    def _fetch(self, parked: "_Parked") -> Tensor:
        if parked.tensor is None:
            with torch.cuda.stream(self._stream):
                parked.tensor = torch.empty_like(parked.buffer, device=parked.device)
                parked.tensor.copy_(parked.buffer, non_blocking=True)
            if self._stream is not None:
                parked.arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
                parked.arrived.record(self._stream)
        return parked.tensor

    def forget(self) -> None:
        """Drops inputs left by a forward pass without a backward pass."""
        self._last = None


class _Parked:
    """One tensor on the host, in the first part of its buffer, and the tensor that was sent before it."""

    def __init__(self, whole: Tensor, buffer: Tensor, device: torch.device, before: "_Parked | None"):
        self.whole, self.buffer, self.device, self.before = whole, buffer, device, before
        self.tensor: Tensor | None = None
        self.arrived: torch.cuda.Event | None = None
