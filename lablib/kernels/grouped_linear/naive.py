"""The definition of `grouped_linear`."""

import torch
from torch import Tensor


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x (rows, d_in), weight (groups, d_out, d_in), counts (groups,) -> (rows, d_out)."""
    parts = x.split(counts.tolist())
    return torch.cat([part @ matrix.t() for part, matrix in zip(parts, weight, strict=True)])
