"""Losses of language models, and their mean over held-out batches."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.modes import kept_modes

# A loss is the batch's mean, or (sum, count) where padding makes batches count unequally.
Loss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]]


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of each token given those before it, in nats.

    tokens: (batch, length + 1) int64; model: (batch, length) -> logits (batch, length, vocab).
    """
    logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def padded_next_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the tokens that are not padding: their (sum in nats, number).

    batch: tokens (batch, length + 1) int64 and mask (batch, length + 1) bool, true at tokens;
    padding stands after them and holds any id. model: as in `next_token_loss`; its mixtures of
    experts route no token whose prediction isn't counted.
    """
    tokens, mask = batch
    counted = mask[:, 1:]
    with counting(model, counted):
        logits = model(tokens[:, :-1])  # (batch, length, vocab)
    return F.cross_entropy(logits[counted], tokens[:, 1:][counted], reduction="sum"), counted.sum()


@contextlib.contextmanager
def counting(model: nn.Module, mask: Tensor) -> Iterator[None]:
    """Within the block, modules that have an attribute `counted` know which tokens are not padding.

    mask: (batch, length) bool, true at tokens that count. Raises ValueError where there is padding
    and a mixture of experts that can't be told, whose balance and places padding would take part
    in.
    """
    told = [module for module in model.modules() if "counted" in module.__dict__]
    if (deaf := _deaf_mixtures(model)) and not mask.all():
        raise ValueError(f"{deaf[0]} routes padding as if it were text: build it with `MoE`")
    for module in told:
        module.counted = mask
    try:
        yield
    finally:
        for module in told:
            module.counted = None


def _deaf_mixtures(model: nn.Module) -> list[str]:
    """Names of the modules that hold experts and no router that knows what counts."""
    return [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if "experts" in dict(module.named_children())
        and not any("counted" in part.__dict__ for part in module.modules())
    ]


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable, loss: Loss = next_token_loss) -> float:
    """Mean loss over batches in eval mode; each module's own mode is restored afterwards.

    A loss that returns a mean is weighed by the batch's rows; one that returns (sum, count) gives
    the sum of all over the number of all. A model without parameters is left where it is.
    Raises ValueError when there is no batch, or nothing counted in them.
    """
    total, weight = 0.0, 0.0
    place = next(model.parameters(), None)
    with kept_modes(model):
        model.eval()
        for batch in batches:
            batch = batch if place is None else move(batch, place.device)
            value = loss(model, batch)
            if isinstance(value, tuple):
                part, count = (float(number) for number in value)
            else:
                part, count = value.item() * n_rows(batch), n_rows(batch)
            total, weight = total + part, weight + count
    if not weight:
        raise ValueError("there is no batch to evaluate on, or nothing counted in them")
    return total / weight


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
    """A batch on `device`: what has `to` is moved, in tuples, lists and mappings, too.

    Numbers, strings and None stay as they are.
    """
    if hasattr(batch, "to"):  # tensors, transformers' BatchEncoding, packed sequences
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [move(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    """All tensors of a batch that have rows, depth first."""
    if isinstance(batch, Tensor):
        if batch.ndim:
            yield batch
    elif isinstance(batch, (tuple, list, Mapping)):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


def _first(batch: Any) -> Tensor:
    for tensor in _tensors(batch):
        return tensor
    raise ValueError(
        f"a batch is a tensor, or a tuple, list or mapping that holds one, not {type(batch)}"
    )


def n_rows(batch: Any) -> int:
    """Rows of a batch: the first tensor's first dimension. Raises ValueError without a tensor."""
    return len(_first(batch))


def n_tokens(batch: Any) -> int:
    """Targets in a batch: rows x length of (rows, length + 1) tokens, else its first size."""
    first = _first(batch)
    if isinstance(batch, Tensor) and first.ndim == 2:
        return first.shape[0] * (first.shape[1] - 1)
    return first.numel()
