"""Each loss as a pure function of log-ratios, with its paper's equation on the line.

P pairs. a, b: log π(y|x) − log π_ref(y|x) of the chosen and the rejected answer, summed over its tokens, in nats.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid


def sigmoid_loss(a_P: Tensor, b_P: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, arXiv 2305.18290 eq. 7, one value a pair, shape (P,).

    With label smoothing ε it is conservative DPO: labels are assumed swapped with probability ε (Mitchell 2023,
    "A note on DPO with noisy preferences", eq. 3). At zero margin the value is ln 2 for every ε.
    """
    margin_P = beta * (a_P - b_P)
    loss_P = -(1 - label_smoothing) * logsigmoid(margin_P)
    return loss_P - label_smoothing * logsigmoid(-margin_P) if label_smoothing else loss_P
