"""The definition of `grouped_mlp`."""

from torch import Tensor
from torch.nn import functional as F

from lablib.kernels.grouped_linear.naive import grouped_linear


def grouped_mlp(x: Tensor, up: Tensor, down: Tensor, counts: Tensor, activation: str) -> Tensor:
    """x (rows, dim), up (groups, hidden, dim), down (groups, dim, width) -> (rows, dim)."""
    hidden = grouped_linear(x, up, counts)
    if activation == "swiglu":
        gate, linear = hidden.chunk(2, -1)
        hidden = F.silu(gate) * linear
    else:
        hidden = F.relu(hidden)
    return grouped_linear(hidden, down, counts)
