"""The KL divergence between two models' next-token distributions, without a tokens × vocabulary matrix.

Letters: N tokens · D hidden width · V vocabulary · R rows of one tile.
"""

import torch
from torch import Tensor

from qdpo.model.fast.logps import Head, head_logits


def token_kl(policy_hidden_ND: Tensor, other_hidden_ND: Tensor, head: Head, *, tile_mib: int) -> Tensor:
    """KL(policy ‖ other) of each token's whole next-token distribution, in nats, shape (N,), float32.

    Σ p (log p − log q) over the vocabulary, not an estimate from the sampled token. Logits of both models exist for one
    tile of rows at a time: about R · V · 16 bytes, kept under `tile_mib`.
    """
    kl_N = torch.empty(len(policy_hidden_ND), dtype=torch.float32, device=policy_hidden_ND.device)
    rows = max(16, tile_mib * 2**20 // (head.weight_VD.shape[0] * 16))
    with torch.no_grad():
        for start in range(0, len(kl_N), rows):
            tile = slice(start, start + rows)
            logp_RV = head_logits(policy_hidden_ND[tile], head).log_softmax(-1)
            logq_RV = head_logits(other_hidden_ND[tile], head).log_softmax(-1)
            kl_N[tile] = torch.linalg.vecdot(logp_RV.exp(), logp_RV - logq_RV)
            del logp_RV, logq_RV  # freed before the next tile's
    return kl_N.clamp_(min=0.0)  # rounding can make a KL near 0 negative
