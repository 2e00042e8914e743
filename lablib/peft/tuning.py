"""Training a classifier: the same batches, steps and schedule for every method of the theme."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.compression.recover import recover
from lablib.models import anatomy
from lablib.models.classifier import Classifier, Encoded
from lablib.peft.adapter import trainable as adapted


def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of (n, classes); of (n, 1), a regression, the squared error."""
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], labels.to(logits.dtype))
    return F.cross_entropy(logits, labels)


def tune(
    classifier: Classifier,
    encoded: Encoded,
    labels: Tensor,
    steps: int,
    rate: float,
    *,
    batch: int = 16,
    seed: int = 0,
    trainable: Collection[str] | None = None,
    penalty: Callable[[int], Tensor] | None = None,
    after_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train in place as `recover` does; the loss of every step.

    labels: (n,), of int64 or, for a regression, of numbers. trainable: names of parameters; None
        means what the adapters brought, and the head. Which texts a step sees follows from the
        seed alone.
    """
    if trainable is None:
        heads = [n for n, _ in classifier.named_parameters() if n.startswith("head.")]
        trainable = [*adapted(classifier), *heads]

    def loss(model: nn.Module, places: Tensor) -> Tensor:
        places = places[:, 0]
        return task_loss(model(encoded.at(places)), labels[places])

    places = torch.arange(len(labels))[:, None]
    options = {"batch": batch, "seed": seed, "penalty": penalty, "after_step": after_step}
    return recover(classifier, places, steps, rate, trainable=trainable, loss=loss, **options)


def backbone_above(classifier: Classifier, below: int = 0) -> list[str]:
    """Names of the parameters of the blocks above, and the head: what full tuning trains."""
    blocks = anatomy.blocks(classifier.model)
    chosen = {id(p) for block in blocks[below:] for p in block.parameters()}
    names = [n for n, p in classifier.named_parameters() if id(p) in chosen]
    return [*names, *(n for n, _ in classifier.named_parameters() if n.startswith("head."))]
