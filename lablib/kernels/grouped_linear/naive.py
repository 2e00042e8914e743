"""The definition of `grouped_linear`, and of its weight's gradient."""

import torch
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x (rows, d_in), weight (groups, d_out, d_in), counts (groups,) -> (rows, d_out)."""
    parts = x.split(counts.tolist())
    return torch.cat([part @ matrix.t() for part, matrix in zip(parts, weight, strict=True)])


def grouped_outer(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """grad (rows, d_out), x (rows, d_in), counts (groups,) -> (groups, d_out, d_in)."""
    sizes = counts.tolist()
    return torch.stack([a.t() @ b for a, b in zip(grad.split(sizes), x.split(sizes), strict=True)])
