"""Losses of language models, and their mean over held-out batches."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[nn.Module, Any], Tensor]


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it, in nats.

    tokens: (batch, length + 1) int64; model: (batch, length) -> logits (batch, length, vocab).
    """
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable, loss: Loss = next_token_loss) -> float:
    """Mean loss over batches, each weighed by its rows; in eval mode, restored afterwards.

    Raises ValueError when there is no batch.
    """
    training, total, rows = model.training, 0.0, 0
    device = next(model.parameters()).device
    model.eval()
    try:
        for batch in batches:
            batch = move(batch, device)
            total += loss(model, batch).item() * n_rows(batch)
            rows += n_rows(batch)
    finally:
        model.train(training)
    if not rows:
        raise ValueError("there is no batch to evaluate on")
    return total / rows


def auxiliary_loss(model: nn.Module) -> Tensor | float:
    """The sum of the scalars that modules left in `auxiliary_loss`; each is taken once."""
    total: Tensor | float = 0.0
    for module in model.modules():
        extra = module.__dict__.get("auxiliary_loss")
        if extra is not None:
            total = total + extra
            module.auxiliary_loss = None
    return total


def move(batch: Any, device: torch.device) -> Any:
    """A batch (tensor, tuple, list or dict of them) on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: move(value, device) for key, value in batch.items()}
    return type(batch)(move(part, device) for part in batch)


def _first(batch: Any) -> Tensor:
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values() if isinstance(batch, dict) else batch))
    return batch


def n_rows(batch: Any) -> int:
    """Rows of a batch: the first tensor's first dimension."""
    return len(_first(batch))


def n_tokens(batch: Any) -> int:
    """Targets in a batch: rows x length of (rows, length + 1) tokens, else its first size."""
    first = _first(batch)
    if isinstance(batch, Tensor) and first.ndim == 2:
        return first.shape[0] * (first.shape[1] - 1)
    return first.numel()
