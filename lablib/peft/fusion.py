"""AdapterFusion (Pfeiffer et al., 2021): attention of a layer's output over several adapters.

With h the layer's output and z_i what adapter i adds to it,

    h + V sum_i softmax_i((Q h)^T (K z_i)) z_i,

so each token asks which adapters it needs. Adapters stay as trained; Q, K and V are learned.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Fusion(nn.Module):
    """Q, K with biases and V, all (dim, dim), over what any number of adapters add.

    V starts as the identity, Q and K normal with std 0.02, so that at first the adapters are
    nearly averaged.
    """

    def __init__(self, dim: int, std: float = 0.02):
        super().__init__()
        self.query, self.key = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim, bias=False)
        nn.init.eye_(self.value.weight)
        for layer in (self.query, self.key):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def shares(self, h: Tensor, added: Tensor) -> Tensor:
        """How much each adapter counts at each token.

        h: (batch, length, dim), added: (adapters, batch, length, dim).
        Returns (adapters, batch, length), summing to one over the adapters.
        """
        scores = (self.query(h) * self.key(added)).sum(-1)  # dim -> a score an adapter
        return scores.softmax(0)

    def forward(self, h: Tensor, added: Tensor) -> Tensor:
        """As `shares` -> (batch, length, dim)."""
        mixed = (self.shares(h, added)[..., None] * added).sum(0)
        return h + self.value(mixed)

    def penalty(self) -> Tensor:
        """||V - I||^2, which keeps V near the identity."""
        weight = self.value.weight
        unit = torch.eye(len(weight), device=weight.device, dtype=weight.dtype)
        return (weight - unit).square().sum()
