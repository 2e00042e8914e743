"""The definition of `moe_mlp`."""

from torch import Tensor
from torch.nn import functional as F

from lablib.kernels.grouped_linear.naive import grouped_linear


def moe_mlp(
    x: Tensor,
    token: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    activation: str,
) -> Tensor:
    """x (tokens, dim), token and weight (rows,), up, down, counts (groups,) -> (tokens, dim)."""
    hidden = grouped_linear(x[token], up, counts)
    if activation == "swiglu":
        gate, linear = hidden.chunk(2, -1)
        hidden = F.silu(gate) * linear
    else:
        hidden = F.relu(hidden)
    rows = grouped_linear(hidden, down, counts)
    return x.new_zeros(x.shape).index_add(0, token, rows * weight[:, None])
