"""LoRA (Hu et al., 2021): a frozen projection, and a low-rank change of it that trains.

W x + (alpha / r) B A x, with A (r, in) drawn at random and B (out, r) zero at the start.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy


class LoRALinear(nn.Module):
    """Computes what `base` does until it trains. alpha: None is the rank, a factor of 1."""

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: float | None = None):
        super().__init__()
        if not 0 < rank <= min(base.weight.shape):
            raise ValueError(f"rank {rank} is not 1 to {min(base.weight.shape)}")
        self.base = base
        self.factor = (rank if alpha is None else alpha) / rank
        self.down = nn.Parameter(base.weight.new_empty(rank, base.in_features))  # A
        self.up = nn.Parameter(base.weight.new_zeros(base.out_features, rank))  # B
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @property
    def weight(self) -> Tensor:
        """(out, in), with the change."""
        return torch.addmm(self.base.weight, self.up, self.down, alpha=self.factor)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        change = F.linear(F.linear(x, self.down), self.up)  # in -> r -> out
        return self.base(x) + self.factor * change


def add_lora_(
    model: nn.Module, *roles: str, rank: int = 8, alpha: float | None = None
) -> list[str]:
    """Put a `LoRALinear` in the place of each projection; names of the parameters that are new.

    roles: as `anatomy.projections` names them, none for all.
    Raises ValueError for a projection that is not nn.Linear.
    """
    made = []
    for name, layer in anatomy.projections(model, *roles).items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is {type(layer).__name__}, not nn.Linear")
        anatomy.replace(model, name, LoRALinear(layer, rank, alpha))
        made += [f"{name}.down", f"{name}.up"]
    return made


def merge_lora_(model: nn.Module) -> None:
    """Add every change to its weight, and put the plain projections back."""
    adapted = [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear)]
    for name, layer in adapted:
        with torch.no_grad():
            layer.base.weight.copy_(layer.weight)
        anatomy.replace(model, name, layer.base)
