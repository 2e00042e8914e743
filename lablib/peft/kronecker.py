"""Changes that are Kronecker products: of high rank, from few numbers.

KronA      W + s (A kron B)                             (Edalati et al., 2022)
Compacter  adapters whose W_down and W_up are sums of n products, sum_i A_i kron (s_i t_i^T), with
           the small A_i shared by all of them         (Karimi Mahabadi et al., 2021)
A product is never formed to multiply: (A kron B) x is A X B^T with x laid out as a matrix X.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy, sublayers
from lablib.peft.adapter import SublayerAdapter, WeightAdapter, matrix, method


def kron_linear(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(A kron B) x without forming the product.

    x: (..., n q), a: (m, n), b: (p, q) -> (..., m p).
    """
    laid = x.unflatten(-1, (a.shape[1], b.shape[1]))  # n q -> n, q
    return (a @ laid @ b.mT).flatten(-2)  # A X B^T: m, p -> m p


def near_square(n_out: int, n_in: int) -> tuple[int, int]:
    """The shape of an A whose product with B has (n_out, n_in) entries, and the fewest numbers.

    Source: the choice is ours; Edalati et al. (2022) try shapes by hand.
    """
    shapes = [(m, n) for m in _divisors(n_out) for n in _divisors(n_in)]
    return min(shapes, key=lambda s: s[0] * s[1] + (n_out // s[0]) * (n_in // s[1]))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


class KronALinear(WeightAdapter):
    """W + s (A kron B), with A (m, n) drawn as a linear layer's and B (out/m, in/n) zero.

    shape: (m, n); None takes the shape with the fewest numbers.
    Raises ValueError when it doesn't divide (out, in).
    """

    def __init__(self, base: nn.Module, shape: tuple[int, int] | None = None, scale: float = 1.0):
        super().__init__(base)
        n_out, n_in = matrix(base).shape
        m, n = shape or near_square(n_out, n_in)
        if n_out % m or n_in % n:
            raise ValueError(f"({m}, {n}) does not divide ({n_out}, {n_in})")
        self.scale = scale
        self.a = nn.Parameter(base.weight.new_empty(m, n))
        self.b = nn.Parameter(base.weight.new_zeros(n_out // m, n_in // n))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def delta(self) -> Tensor:
        """(out, in): s (A kron B)."""
        return self.scale * torch.kron(self.a, self.b)

    def changed(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return self.base(x) + self.scale * kron_linear(x, self.a, self.b)


@method
def krona_(
    model: nn.Module,
    roles: Sequence[str] = (),
    shape: tuple[int, int] | None = None,
    scale: float = 1.0,
) -> None:
    """Put a `KronALinear` in the place of each projection. roles: none for all."""
    for name, layer in anatomy.projections(model, *roles).items():
        anatomy.replace(model, name, KronALinear(layer, shape, scale))


class PHMLinear(nn.Module):
    """W x + b, where W (out, in) = sum_i A_i kron (s_i t_i^T): hypercomplex multiplication.

    shared: A (n, n, n), the same in all layers. rank: of each s_i t_i^T.
    Raises ValueError when n divides not both of in and out.
    """

    def __init__(self, n_in: int, n_out: int, shared: nn.Parameter, rank: int = 1):
        super().__init__()
        n = len(shared)
        if n_in % n or n_out % n:
            raise ValueError(f"{n} does not divide ({n_out}, {n_in})")
        self.shared = shared  # A
        self.left = nn.Parameter(torch.empty(n, n_out // n, rank))  # s
        self.right = nn.Parameter(torch.empty(n, rank, n_in // n))  # t
        self.bias = nn.Parameter(torch.zeros(n_out))
        for factor in (self.left, self.right):
            for part in factor.data:
                nn.init.xavier_normal_(part)

    def weight(self) -> Tensor:
        """(out, in)."""
        small = self.left @ self.right  # s_i t_i^T: (n, out/n, in/n)
        return torch.stack([torch.kron(a, b) for a, b in zip(self.shared, small, strict=True)]).sum(
            0
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        n = len(self.shared)
        laid = x.unflatten(-1, (n, -1))  # in -> n, in/n
        inner = torch.einsum("...jq,irq->...ijr", laid, self.right)  # t_i: in/n -> r
        outer = torch.einsum("...ijr,ipr->...ijp", inner, self.left)  # s_i: r -> out/n
        return torch.einsum("...ijp,imj->...mp", outer, self.shared).flatten(-2) + self.bias


class CompacterAdapter(SublayerAdapter):
    """h + W_up GELU(W_down h), both of them `PHMLinear`. rank: r, the bottleneck's width."""

    def __init__(self, dim: int, rank: int, shared: nn.Parameter, inner_rank: int = 1):
        super().__init__()
        self.down = PHMLinear(dim, rank, shared, inner_rank)
        self.up = PHMLinear(rank, dim, shared, inner_rank)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x, h: (batch, length, dim) -> (batch, length, dim)."""
        return h + self.up(F.gelu(self.down(h)))


@method
def compacter_(
    model: nn.Module,
    rank: int,
    n: int = 4,
    places: Sequence[str] = ("attention", "mlp"),
    std: float = 1e-4,
    inner_rank: int = 1,
) -> None:
    """Put a `CompacterAdapter` at each of the places of every block; A_i are the same in all.

    n: of the sums, 4 in the paper's main results. places: ("mlp",) is Compacter++. std: of the A_i
    at the start, so small that the base's function nearly is.
    Raises ValueError when n divides not the width and the rank.
    """
    weight = anatomy.embedding(model).weight
    shared = nn.Parameter(std * torch.randn(n, n, n).to(weight))
    for block in range(len(anatomy.blocks(model))):
        for place in places:
            adapter = CompacterAdapter(weight.shape[1], rank, shared, inner_rank)
            adapter = _moved(adapter, shared, weight)
            sublayers.change_(model, block, place, adapter, "compacter")


def _moved(adapter: CompacterAdapter, shared: nn.Parameter, like: Tensor) -> CompacterAdapter:
    adapter.to(like)
    for layer in (adapter.down, adapter.up):
        layer.shared = shared  # one and the same, wherever `to` made another of it
    return adapter
