"""Intrinsic dimension (Li et al., 2018; Aghajanyan et al., 2021): d numbers move all matrices.

theta_i = theta_0,i + lambda_i P_i(theta_d), for each adapted matrix i of D_i numbers
with one vector theta_d (d,), zero at the start, that trains, and random projections P_i, d -> D_i,
that do not. lambda_i is 1, or trains (SAID, structure-aware: a vector of d - m numbers, and a scale
for each of the m matrices).

P is dense, or Fastfood (Le et al., 2013): H G Pi H B, with random signs B, a permutation Pi, normal
scales G, and the Hadamard transform H: O(n log n) time and O(n) memory, where dense needs n d.
Columns of both have length 1. Random parts follow from a seed; they are in no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lablib.models import anatomy
from lablib.peft.adapter import WeightAdapter, matrix, method
from lablib.scaling.trainable_parameters import hadamard


class Fastfood:
    """A random projection (..., d) -> (..., size) that is never written out.

    y = H G Pi H B x / sqrt(size sum(G^2)) with an unnormalized H, so that a column's length is 1 on
    average, and exactly where size is a power of 2 and at least d. x is padded with zeros to n, the
    next power of 2; of y the first `size` numbers are kept.
    Source: Aghajanyan et al. (2021), the constant from the authors' code. That cuts x off where a
    matrix has fewer numbers than d, while n is at least d here.
    """

    def __init__(self, d: int, size: int, random: torch.Generator):
        self.size = size
        self.n = 2 ** math.ceil(math.log2(max(d, size)))
        self.signs = 2 * torch.randint(2, (self.n,), generator=random, dtype=torch.int8) - 1  # B
        self.order = torch.randperm(self.n, generator=random)  # Pi
        self.scales = torch.randn(self.n, generator=random)  # G

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., d) -> (..., size)."""
        if self.order.device != x.device:
            parts = (self.signs, self.order, self.scales)
            self.signs, self.order, self.scales = (part.to(x.device) for part in parts)
        y = nn.functional.pad(x, (0, self.n - x.shape[-1])) * self.signs  # B x: (..., n)
        y = hadamard(y)[..., self.order] * self.scales.to(x.dtype)  # G Pi H B x
        y = hadamard(y)[..., : self.size]  # H G Pi H B x: (..., size)
        return y * self.n / (self.size * self.scales.square().sum()).sqrt().to(x.dtype)


class Dense:
    """A random projection (..., d) -> (..., size): a normal matrix whose columns have length 1.

    Source: Li et al. (2018). d times as much memory as `Fastfood`: for comparisons.
    """

    def __init__(self, d: int, size: int, random: torch.Generator):
        self.weight = nn.functional.normalize(torch.randn(size, d, generator=random), dim=0)

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., d) -> (..., size)."""
        self.weight = self.weight.to(x.device)
        return nn.functional.linear(x, self.weight.to(x.dtype))


PROJECTIONS = {"fastfood": Fastfood, "dense": Dense}


class IntrinsicLinear(WeightAdapter):
    """W + lambda P(theta_d): a matrix that a vector moves, which others share. Starts as `base`.

    group: the layers that share the vector; this one is added, and the first of them holds it.
    said: lambda trains, and starts at 1.
    """

    def __init__(
        self,
        base: nn.Module,
        projection: Fastfood | Dense,
        vector: nn.Parameter,
        group: list[IntrinsicLinear],
        said: bool = False,
    ):
        super().__init__(base)
        self.projection = projection  # P
        self.group = group  # a list: no submodules
        self.group.append(self)
        self.vector = vector if len(group) == 1 else None  # theta_d
        self.scale = nn.Parameter(base.weight.new_ones(1)) if said else None  # lambda

    def delta(self) -> Tensor:
        """(out, in): lambda P(theta_d), computed in float32 at least."""
        vector = self.group[0].vector
        exact = vector.to(torch.promote_types(vector.dtype, torch.float32))
        change = self.projection(exact).view(matrix(self.base).shape)  # d -> out * in -> (out, in)
        return (change if self.scale is None else self.scale * change).to(vector.dtype)

    def take_out(self, model: nn.Module, name: str) -> None:
        """Put the base back, unmerged; the next layer of the group holds the vector then."""
        super().take_out(model, name)
        vector = self.group[0].vector
        self.group.remove(self)
        if self.group:
            self.group[0].vector = vector


@method
def intrinsic_(
    model: nn.Module,
    dim: int,
    roles: Sequence[str] = (),
    projection: str = "fastfood",
    said: bool = False,
    seed: int = 0,
) -> None:
    """Put an `IntrinsicLinear` in the place of each projection, all with one vector.

    dim: d, how many numbers train in all; with `said`, one a matrix are scales. roles: as
    `anatomy.projections` names them, none for all. projection: "fastfood" or "dense".
    Raises ValueError for another projection, or a dim that leaves the vector nothing.
    """
    if projection not in PROJECTIONS:
        raise ValueError(f"{projection!r} is none of {', '.join(PROJECTIONS)}")
    layers = anatomy.projections(model, *roles)
    d = dim - len(layers) if said else dim
    if d < 1:
        scales = f" beside {len(layers)} scales" if said else ""
        raise ValueError(f"a dimension of {dim} leaves {d} numbers for the vector{scales}")
    random, group = torch.Generator().manual_seed(seed), []
    vector = nn.Parameter(next(iter(layers.values())).weight.new_zeros(d))
    for name, layer in layers.items():
        project = PROJECTIONS[projection](d, matrix(layer).numel(), random)
        anatomy.replace(model, name, IntrinsicLinear(layer, project, vector, group, said))
