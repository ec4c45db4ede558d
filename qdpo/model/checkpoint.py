"""Which decoder layers keep their activations for the backward pass, and which compute them again."""

from typing import Any

from torch import is_grad_enabled, nn
from torch.utils.checkpoint import checkpoint

from qdpo.errors import ConfigError


def decoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the longest ModuleList of modules of one class.

    Raises: ConfigError if the model has no such list.
    """
    lists = [module for module in backbone.modules() if isinstance(module, nn.ModuleList) and len(module) > 0]
    uniform = [candidate for candidate in lists if len({type(layer) for layer in candidate}) == 1]
    if not uniform:
        raise ConfigError(
            f"{type(backbone).__name__} has no list of decoder layers: it cannot be checkpointed layer by layer."
        )
    return max(uniform, key=len)


def recompute_layers(backbone: nn.Module, kept_layers: int | str) -> int:
    """Makes all decoder layers but the last `kept_layers` recompute their activations; returns how many do.

    Torch's own non-reentrant checkpoint goes around the layer's forward. The last layers are the ones to keep: their
    activations live shortest. `preserve_rng_state` is off because nothing random happens inside: dropout is zero.
    """
    layers = decoder_layers(backbone)
    kept = len(layers) if kept_layers == "all" else min(int(kept_layers), len(layers))
    recomputed = len(layers) - kept
    for layer in list(layers)[:recomputed]:
        layer.forward = _recomputed(layer.forward)
    return recomputed


def _recomputed(forward: Any) -> Any:
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return checkpointed
