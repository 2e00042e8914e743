"""Contrastive training of an encoder: the same batches, steps and schedule in every lab.

Over `compression.recover`, a loop that trains a part of a model in place, since most students here
are cut or adapted ones.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from lablib.compression.recover import recover
from lablib.embeddings.contrastive import Loss, info_nce
from lablib.embeddings.encode import Encoder
from lablib.models.classifier import Encoded


def train(
    encoder: Encoder,
    pairs: Sequence[Sequence[str]],
    steps: int,
    rate: float,
    *,
    batch: int = 24,
    temperature: float = 0.05,
    symmetric: bool = True,
    trainable: str | Collection[str] = "all",
    rank: int = 8,
    seed: int = 0,
    loss: Loss | None = None,
    second: Encoder | None = None,
) -> list[float]:
    """Train encoder.model in place, as `recover` does; the loss of every step.

    pairs: texts (a, b), or (a, b, c) with a hard negative. Which of them a step sees follows from
        the seed alone. loss: of the vectors, a (n, dim), b and, where there is one, c; None is
        `info_nce` at this temperature. second: the encoder of b and c, over the same model, such
        as one with another prompt; None is the first. trainable, rank: as of `recover`.
    Raises ValueError without pairs, for rows of other than two or three texts or of mixed lengths,
    and for a second encoder over another model.
    """
    if {len(row) for row in pairs} not in ({2}, {3}):
        raise ValueError("pairs are two texts each, or three with a hard negative")
    second = second or encoder
    if second.model is not encoder.model:
        raise ValueError("the second encoder has a model of its own: one model is trained here")
    loss = loss or functools.partial(info_nce, temperature=temperature, symmetric=symmetric)
    first, *others = zip(*pairs)
    sides = [encoder.tokens(first), *(second.tokens(texts) for texts in others)]

    def batch_loss(model: nn.Module, rows: Tensor) -> Tensor:
        places = rows[:, 0]
        return loss(*_vectors([encoder] + [second] * len(others), sides, places))

    rows = torch.arange(len(pairs))[:, None]
    options = {"batch": batch, "seed": seed, "trainable": trainable, "rank": rank}
    return recover(encoder.model, rows, steps, rate, loss=batch_loss, **options)


def _vectors(encoders: Sequence[Encoder], sides: Sequence[Encoded], places: Tensor) -> list[Tensor]:
    """(n, dim) for each side."""
    return [encoder.vectors(side.at(places)) for encoder, side in zip(encoders, sides)]
