"""LoRMA (Bihany et al., 2025): a frozen weight, multiplied by a matrix of few numbers that trains.

Lab 703. W = I(B A) W0, with B (n, r) and A (r, n). Without an inflation I, W has rank r at most and
can't start as W0; rotated, or with an identity added, it can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.peft.adapter import Adapter, WeightAdapter, adapters, matrix, method

INFLATIONS = ("rotate", "add", "none")
MODES = ("pre", "post")
WIDE = 128  # from so many features a rank on, correlations are faster than a matrix


def rotate(m: Tensor) -> Tensor:
    """Row i moved by i places to the right, around the end: (n, n) -> (n, n).

    Source: section on permutation-based inflation.
    """
    place = torch.arange(len(m), device=m.device)
    return m.gather(1, (place - place[:, None]) % len(m))  # I(M)[i, j] = M[i, (j - i) mod n]


def multiplier(up: Tensor, down: Tensor, inflation: str, factor: float = 1.0) -> Tensor:
    """What the weight is multiplied by: B (n, r), A (r, n) -> (n, n).

    inflation: "rotate", "add" or "none". factor: alpha / r.
    """
    product = factor * (up @ down)  # (n, r) @ (r, n) -> (n, n), of rank r
    if inflation == "rotate":
        return rotate(product)  # I(B A)
    return torch.eye(len(up)).to(product) + product if inflation == "add" else product


def multiplied(y: Tensor, up: Tensor, down: Tensor, inflation: str, factor: float = 1.0) -> Tensor:
    """The multiplier times each vector of y (..., n): without the (n, n) matrix where that is dear.

    B (A y), not (B A) y. A rotated product is a sum of r correlations, `by_diagonals`.
    """
    if inflation == "rotate":
        if len(up) < WIDE * len(down):
            return F.linear(y, multiplier(up, down, inflation, factor))
        return by_diagonals(y, up, factor * down)
    change = factor * F.linear(F.linear(y, down), up)  # n -> r -> n
    return y + change if inflation == "add" else change


def by_diagonals(y: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """I(B A) y as sum_r B[:, r] * correlation of A[r] with y, around the end, by FFT.

    y: (..., n). Number k of a row of B A stands k places right of the diagonal, so that
    (I(B A) y)[i] = sum_k sum_r B[i, r] A[r, k] y[(i + k) mod n].
    """
    waves, filters = torch.fft.rfft(y.float()), torch.fft.rfft(down.float()).conj()
    moved = torch.fft.irfft(waves[..., None, :] * filters, n=y.shape[-1])  # (..., r, n)
    return (moved * up.float().T).sum(-2).to(y.dtype)


class LoRMALinear(WeightAdapter):
    """A projection whose weight is multiplied; with an inflation, it starts as `base`.

    alpha: None is the rank, a factor of 1. mode: "pre" multiplies from the left, I(B A) W0, n the
    outputs; "post" from the right, W0 I(B A), n the inputs.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float | None = None,
        inflation: str = "rotate",
        mode: str = "pre",
    ):
        super().__init__(base)
        for word, known in ((inflation, INFLATIONS), (mode, MODES)):
            if word not in known:
                raise ValueError(f"{word!r} is none of {', '.join(known)}")
        n = matrix(base).shape[MODES.index(mode)]
        if not 0 < rank <= n:
            raise ValueError(f"rank {rank} is not 1 to {n}")
        self.inflation, self.mode = inflation, mode
        self.factor = (rank if alpha is None else alpha) / rank
        self.up = nn.Parameter(base.weight.new_empty(n, rank))  # B
        self.down = nn.Parameter(base.weight.new_empty(rank, n))  # A
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """B's first column and A's first number 1, the rest of A 0: rotated, the identity.

        Added to an identity, B starts at 0 instead, and A is drawn. The plain form starts as the
        rotated one, and is far from the identity.
        """
        if self.inflation == "add":
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
            self.up.zero_()
            return
        nn.init.kaiming_uniform_(self.up, a=math.sqrt(5))
        self.up[:, 0] = 1.0
        self.down.zero_()[0, 0] = 1.0
        self.up.div_(math.sqrt(self.factor))
        self.down.div_(math.sqrt(self.factor))

    @torch.no_grad()
    def start_near(self) -> None:
        """For the plain form: the nearest to W0 that a product of this rank can be.

        B's columns are the first singular vectors of W0, and A is their transpose.
        """
        u, _, v = torch.linalg.svd(matrix(self.base).float(), full_matrices=False)
        vectors = u if self.mode == "pre" else v.T  # (n, min(out, in))
        vectors = vectors[:, : self.up.shape[1]] / math.sqrt(self.factor)
        self.up.zero_()[:, : vectors.shape[1]] = vectors
        self.down.copy_(self.up.T)

    def multiplier(self) -> Tensor:
        """(n, n): what W0 is multiplied by."""
        return multiplier(self.up, self.down, self.inflation, self.factor)

    def multiplied(self, y: Tensor) -> Tensor:
        """The multiplier times each vector of (..., n)."""
        return multiplied(y, self.up, self.down, self.inflation, self.factor)

    def delta(self) -> Tensor:
        """(out, in): the multiplied weight minus the base's."""
        weight = matrix(self.base)
        if self.mode == "pre":
            return self.multiplied(weight.T).T - weight
        return weight @ self.multiplier() - weight

    def changed(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out); the base's bias is not multiplied."""
        if self.mode == "post":
            return self.base(self.multiplied(x))  # W0 (I(B A) x) + b
        h = self.multiplied(F.linear(x, matrix(self.base)))  # I(B A) (W0 x)
        bias = _innermost(self.base).bias
        return h if bias is None else h + bias


def _innermost(layer: nn.Module) -> nn.Module:
    return _innermost(layer.base) if isinstance(layer, Adapter) else layer


@method
def lorma_(
    model: nn.Module,
    roles: Sequence[str] = (),
    rank: int = 8,
    alpha: float | None = None,
    inflation: str = "rotate",
    mode: str = "pre",
) -> None:
    """Put a `LoRMALinear` in the place of each projection, of all blocks.

    roles: as `anatomy.projections` names them, none for all.
    """
    for name, layer in anatomy.projections(model, *roles).items():
        anatomy.replace(model, name, LoRMALinear(layer, rank, alpha, inflation, mode))


def start_near_(model: nn.Module) -> None:
    """Let every plain product in the model start near its base; see `LoRMALinear.start_near`."""
    for layer in adapters(model).values():
        if isinstance(layer, LoRMALinear) and layer.inflation == "none":
            layer.start_near()


def numerical_rank(m: Tensor) -> int:
    """How many singular values are above rounding: max(shape) * eps of the largest."""
    values = torch.linalg.svdvals(m.detach().double())
    return int((values > max(m.shape) * torch.finfo(torch.float32).eps * values[0]).sum())


def rank_at_start(n: int, rank: int = 1, inflation: str = "rotate") -> int:
    """Numerical rank of an (n, n) multiplier of so many ranks, before its first step."""
    return numerical_rank(LoRMALinear(nn.Linear(n, n), rank, inflation=inflation).multiplier())


def products(n: int, rank: int, tokens: int, order: str) -> int:
    """Multiplications of a square layer whose weight is multiplied by B A, in one of three orders.

    order: "matrix", ((B A) W0) x; "weight", (B (A W0)) x; "input", B (A (W0 x)).
    """
    apply = tokens * n * n
    return {
        "matrix": rank * n * n + n**3 + apply,
        "weight": 2 * rank * n * n + apply,
        "input": apply + 2 * rank * n * tokens,
    }[order]


def products_a_token(n_out: int, n_in: int, rank: int, mode: str) -> dict[str, int]:
    """Multiplications a token of a weight of (n_out, n_in) and of what multiplies it.

    mode: "pre", n the outputs, or "post", n the inputs. Keys as in `products`: "matrix", with an
    (n, n) multiplier that is at hand, rotated or not; "input", A and then B, without an (n, n).
    """
    n = (n_out, n_in)[MODES.index(mode)]
    return {"matrix": n_out * n_in + n * n, "input": n_out * n_in + 2 * rank * n}
