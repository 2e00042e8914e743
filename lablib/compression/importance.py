"""How much each weight matters: scores (out, in), larger for what should stay."""

from __future__ import annotations

from torch import Tensor


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
