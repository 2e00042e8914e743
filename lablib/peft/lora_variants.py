"""Relatives of LoRA: the same low-rank change, with other parts of it trained, or of other ranks.

LoRA-FA   W + (alpha / r) B A                    A is frozen (Zhang et al., 2023)
DoRA      m (W + (alpha / r) B A) / ||.||        m: a norm a row, trains too (Liu et al., 2024)
VeRA      W + diag(b) B diag(d) A                A, B random, frozen, shared by all (Kopiczko, 2024)
AdaLoRA   W + (alpha / r) P diag(lambda) Q       ranks move to where they matter (Zhang, 2023)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.peft.adapter import WeightAdapter, adapters, matrix, method
from lablib.peft.lora import LoRALinear


@method
def lora_fa_(
    model: nn.Module, roles: Sequence[str] = (), rank: int = 8, alpha: float | None = None
) -> None:
    """LoRA whose A stays as drawn: x is not kept for the backward pass, A x (..., r) is."""
    for name, layer in anatomy.projections(model, *roles).items():
        adapted = LoRALinear(layer, rank, alpha)
        adapted.down.requires_grad_(False)
        anatomy.replace(model, name, adapted)


class DoRALinear(LoRALinear):
    """m V / ||V|| with V = W + (alpha / r) B A, norms over each output's weights.

    The norm is a constant to the gradient (section 4.3 of Liu et al., 2024). Arguments as
    `LoRALinear`'s.
    """

    def __init__(self, base: nn.Module, rank: int = 8, alpha: float | None = None):
        super().__init__(base, rank, alpha)
        self.magnitude = nn.Parameter(matrix(base).detach().norm(dim=1))  # m: (out,)

    def delta(self) -> Tensor:
        """(out, in): m V / ||V|| - W."""
        direction = matrix(self.base) + super().delta()  # V
        return self._gain(direction)[:, None] * direction - matrix(self.base)

    def changed(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        weight = matrix(self.base)
        with torch.no_grad():
            direction = weight + super().delta()
        change = self.factor * F.linear(F.linear(x, self.down), self.up)  # in -> r -> out
        of_base = self.base(x)
        straight = F.linear(x, weight)  # without the bias
        return of_base - straight + self._gain(direction) * (straight + change)

    def _gain(self, direction: Tensor) -> Tensor:
        """(out,): m / ||V||."""
        return self.magnitude / direction.detach().norm(dim=1)


@method
def dora_(
    model: nn.Module, roles: Sequence[str] = (), rank: int = 8, alpha: float | None = None
) -> None:
    """Put a `DoRALinear` in the place of each projection. roles: none for all."""
    for name, layer in anatomy.projections(model, *roles).items():
        anatomy.replace(model, name, DoRALinear(layer, rank, alpha))


class VeRALinear(WeightAdapter):
    """W + diag(b) B diag(d) A with b zero and d 0.1 at the start.

    down (r, at least in), up (at least out, r): A and B, drawn once for all layers, of which a
    layer uses the first columns and rows; not trained, not saved.
    """

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, d_initial: float = 0.1):
        super().__init__(base)
        n_out, n_in = matrix(base).shape
        self.shared = (down[:, :n_in], up[:n_out])  # a tuple: no buffers; views of the shared ones
        self.b = nn.Parameter(base.weight.new_zeros(n_out))
        self.d = nn.Parameter(base.weight.new_full((len(down),), d_initial))

    def _apply(self, fn, recurse=True):
        self.shared = tuple(fn(drawn) for drawn in self.shared)  # to another device or dtype
        return super()._apply(fn, recurse)

    def delta(self) -> Tensor:
        """(out, in)."""
        down, up = self.shared
        return self.b[:, None] * (up @ (self.d[:, None] * down))

    def changed(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        down, up = self.shared
        return self.base(x) + self.b * F.linear(self.d * F.linear(x, down), up)


@method
def vera_(
    model: nn.Module, roles: Sequence[str] = (), rank: int = 256, d: float = 0.1, seed: int = 0
) -> None:
    """Put a `VeRALinear` in the place of each projection. roles: none for all.

    d: where the vector d starts. seed: A and B are drawn from it, Kaiming uniform, so that a saved
    adapter holds vectors alone.
    """
    layers = anatomy.projections(model, *roles)
    shapes = [matrix(layer).shape for layer in layers.values()]
    draw, like = torch.Generator().manual_seed(seed), anatomy.embedding(model).weight
    down = torch.empty(rank, max(n_in for _, n_in in shapes))
    up = torch.empty(max(n_out for n_out, _ in shapes), rank)
    for drawn in (down, up):
        nn.init.kaiming_uniform_(drawn, a=0.0, generator=draw)
    for name, layer in layers.items():
        anatomy.replace(model, name, VeRALinear(layer, down.to(like), up.to(like), d))


class AdaLoRALinear(WeightAdapter):
    """W + (alpha / r) P diag(lambda) Q, a singular value decomposition that trains.

    P (out, r), Q (r, in) normal with std 0.02, lambda (r,) zero at the start.
    """

    def __init__(self, base: nn.Module, rank: int = 12, alpha: float | None = None):
        super().__init__(base)
        n_out, n_in = matrix(base).shape
        self.factor = (rank if alpha is None else alpha) / rank
        self.left = nn.Parameter(0.02 * torch.randn(n_out, rank).to(base.weight))  # P
        self.values = nn.Parameter(base.weight.new_zeros(rank))  # lambda
        self.right = nn.Parameter(0.02 * torch.randn(rank, n_in).to(base.weight))  # Q

    def delta(self) -> Tensor:
        """(out, in)."""
        return self.factor * (self.left @ (self.values[:, None] * self.right))

    def changed(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        inner = self.values * F.linear(x, self.right)  # in -> r
        return self.base(x) + self.factor * F.linear(inner, self.left)  # r -> out

    def unorthogonal(self) -> Tensor:
        """||P^T P - I|| + ||Q Q^T - I||, Frobenius: what keeps the decomposition one."""
        unit = torch.eye(len(self.values), device=self.left.device, dtype=self.left.dtype)
        return (self.left.mT @ self.left - unit).norm() + (self.right @ self.right.mT - unit).norm()


@method
def adalora_(
    model: nn.Module, roles: Sequence[str] = (), rank: int = 12, alpha: float | None = None
) -> None:
    """Put an `AdaLoRALinear` in the place of each projection. roles: none for all.

    rank: at the start, 1.5 times the rank aimed at in the paper; `RankBudget` lowers it.
    """
    for name, layer in anatomy.projections(model, *roles).items():
        anatomy.replace(model, name, AdaLoRALinear(layer, rank, alpha))


def orthogonality(model: nn.Module) -> Tensor:
    """Mean of a model's `unorthogonal` norms, two a layer; the paper adds it times 0.1 to 0.5."""
    norms = [a.unorthogonal() for a in adapters(model).values() if isinstance(a, AdaLoRALinear)]
    return torch.stack(norms).sum() / (2 * len(norms))


@dataclass
class RankBudget:
    """Moves ranks between AdaLoRA layers: call `step` after each backward pass and update.

    ranks: mean rank a layer at the end. steps: of the training; the first `warmup` keep all, the
    last `final` train at the final budget; between them it falls as a cube, and every `every`
    steps the least important triplets' lambda is set to 0.
    smooth: beta_1 and beta_2, of sensitivity |w g| and of its uncertainty.
    Source: equations 8 to 12 and algorithm 1 of Zhang et al. (2023).
    """

    model: nn.Module
    ranks: float
    steps: int
    warmup: int
    final: int
    every: int = 10
    smooth: tuple[float, float] = (0.85, 0.85)
    done: int = 0
    means: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def layers(self) -> dict[str, AdaLoRALinear]:
        """Dotted name -> layer."""
        return {n: a for n, a in adapters(self.model).items() if isinstance(a, AdaLoRALinear)}

    def budget(self, step: int) -> int:
        """How many triplets remain after this step, in all layers together."""
        found = self.layers()
        most, least = sum(len(a.values) for a in found.values()), round(self.ranks * len(found))
        between = self.steps - self.warmup - self.final
        left = min(max(1 - (step - self.warmup) / max(between, 1), 0.0), 1.0)
        return int(least + (most - least) * left**3)

    @torch.no_grad()
    def step(self) -> None:
        """Update importances from the gradients, and cut to the budget where it is time."""
        self.done += 1
        ending = self.done >= self.steps - self.final
        if not ending:
            self._observe()
        if ending or (self.done > self.warmup and self.done % self.every == 0):
            self._cut(self.budget(self.done))

    def _observe(self) -> None:
        first, second = self.smooth
        for place, layer in self.layers().items():
            for name, parameter in layer.own().items():
                now = (parameter * parameter.grad).abs()  # sensitivity
                zero = torch.zeros_like(now)
                mean, doubt = self.means.get(f"{place}.{name}", (zero, zero))
                mean = first * mean + (1 - first) * now
                doubt = second * doubt + (1 - second) * (now - mean).abs()
                self.means[f"{place}.{name}"] = (mean, doubt)

    def importance(self, place: str) -> Tensor:
        """(r,): of each triplet, s(lambda_i) + mean of s(P_i) + mean of s(Q_i)."""
        of = {n: math.prod(self.means[f"{place}.{n}"]) for n in ("left", "values", "right")}
        return of["values"] + of["left"].mean(0) + of["right"].mean(1)

    def _cut(self, budget: int) -> None:
        found = self.layers()
        scores = torch.cat([self.importance(place) for place in found])
        kept = torch.zeros_like(scores, dtype=torch.bool)
        kept[scores.topk(budget).indices] = True
        sizes = [len(layer.values) for layer in found.values()]
        for layer, its in zip(found.values(), kept.split(sizes), strict=True):
            layer.values.masked_fill_(~its, 0.0)

    def left(self) -> dict[str, int]:
        """Dotted name -> triplets whose lambda is not 0."""
        return {n: int(layer.values.count_nonzero()) for n, layer in self.layers().items()}
