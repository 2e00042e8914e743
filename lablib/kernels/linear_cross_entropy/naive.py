"""The definition of `linear_cross_entropy`: all logits, then the loss."""

from torch import Tensor
from torch.nn import functional as F


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100, mean: bool = True
) -> Tensor:
    """hidden (tokens, d), weight (vocab, d), target (tokens,) -> a float32 scalar."""
    logits = F.linear(hidden, weight).float()
    reduction = "mean" if mean else "sum"
    return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)
