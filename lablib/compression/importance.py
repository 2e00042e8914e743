"""How much each weight matters, or each neuron and head: scores, larger for what should stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lablib.compression.calibration import input_norms
from lablib.models import anatomy


def magnitude(weight: Tensor) -> Tensor:
    """|w|."""
    return weight.detach().abs()


def activation_weighted(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|w| times the norm of the feature that it reads, (in,). Wanda (Sun et al., 2023)."""
    return weight.detach().abs() * input_norm


def first_order(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w g|: the change of the loss, to first order, when w goes (Molchanov et al., 2016)."""
    return (weight.detach() * gradient).abs()


def fisher(weight: Tensor, squared_gradient: Tensor) -> Tensor:
    """w^2 E[g^2] / 2: the same to second order, with the Fisher's diagonal as the curvature.

    At a minimum the first order vanishes. Optimal brain damage (LeCun et al., 1989).
    """
    return weight.detach().square() * squared_gradient / 2


def of_neurons(model: nn.Module, rows: Tensor) -> list[Tensor]:
    """Of each block's neurons, (width,) a block: how much one adds to the residual stream.

    Root mean square of its activation on rows (n, length + 1), times the norm of the column of
    `down` that reads it.
    """
    return _columns(model, rows, "down")


def of_heads(model: nn.Module, rows: Tensor) -> list[Tensor]:
    """Of each block's query heads, (heads,) a block: the same of what a head's output adds."""
    head_dim = anatomy.part(model, 0, "attention").head_dim
    return [
        score.square().unflatten(0, (-1, head_dim)).sum(1).sqrt()
        for score in _columns(model, rows, "output")
    ]


def of_channels(model: nn.Module, rows: Tensor) -> Tensor:
    """Of the residual stream's features, (channels,): how much all that reads one makes of it.

    The same root mean square on rows times the norm of the column that reads it, over all
    projections that read the stream.
    """
    readers = ("query", "key", "value", "gate", "up")
    norms, layers = input_norms(model, rows, *readers), anatomy.projections(model, *readers)
    squares = [(norms[name] * layers[name].weight.detach().norm(dim=0)).square() for name in layers]
    return torch.stack(squares).sum(0).sqrt()


def _columns(model: nn.Module, rows: Tensor, role: str) -> list[Tensor]:
    norms = input_norms(model, rows, role)
    layers = anatomy.projections(model, role)
    return [norms[name] * layers[name].weight.detach().norm(dim=0) for name in layers]
