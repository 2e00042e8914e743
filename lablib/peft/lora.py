"""LoRA (Hu et al., 2021): a frozen projection, and a low-rank change of it that trains.

W x + (alpha / r) B A x, with A (r, in) drawn at random and B (out, r) zero at the start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.peft.adapter import WeightAdapter, matrix, method


class LoRALinear(WeightAdapter):
    """Computes what `base` does until it trains.

    alpha: None is the rank, a factor of 1. stabilized: alpha / sqrt(r) (Kalajdzievski, 2023).
    dropout: of the input of A alone, in training.
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float | None = None,
        *,
        stabilized: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__(base)
        n_out, n_in = matrix(base).shape
        if not 0 < rank <= min(n_out, n_in):
            raise ValueError(f"rank {rank} is not 1 to {min(n_out, n_in)}")
        alpha = rank if alpha is None else alpha
        self.factor = alpha / (math.sqrt(rank) if stabilized else rank)
        self.dropout = dropout
        self.down = nn.Parameter(base.weight.new_empty(rank, n_in))  # A
        self.up = nn.Parameter(base.weight.new_zeros(n_out, rank))  # B
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def delta(self) -> Tensor:
        """(out, in): (alpha / r) B A."""
        return self.factor * (self.up @ self.down)

    def changed(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        kept = F.dropout(x, self.dropout, self.training) if self.dropout else x
        change = F.linear(F.linear(kept, self.down), self.up)  # in -> r -> out
        return self.base(x) + self.factor * change


@method
def lora_(
    model: nn.Module,
    roles: Sequence[str] = (),
    rank: int = 8,
    alpha: float | None = None,
    stabilized: bool = False,
    dropout: float = 0.0,
) -> None:
    """Put a `LoRALinear` in the place of each projection, of all blocks.

    roles: as `anatomy.projections` names them, none for all.
    """
    for name, layer in anatomy.projections(model, *roles).items():
        adapted = LoRALinear(layer, rank, alpha, stabilized=stabilized, dropout=dropout)
        anatomy.replace(model, name, adapted)
