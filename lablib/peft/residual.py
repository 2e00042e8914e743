"""Residual adapters (Lin et al., 2020): a serial adapter that reads h through a norm of its own.

    h <- h + W_up f(W_down LN(h)), behind the feed-forward layer, with f = ReLU

The paper itself was not at hand; the place and the norm are as later papers describe them.
"""

from __future__ import annotations

from torch import Tensor, nn

from lablib.models import anatomy, sublayers
from lablib.peft.adapter import method
from lablib.peft.bottleneck import Bottleneck, _free


class ResidualAdapter(Bottleneck):
    """h + W_up f(W_down LN(h)). Arguments as `Bottleneck`'s."""

    def __init__(self, dim: int, rank: int, start: str = "lora"):
        super().__init__(dim, rank, start=start)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """x, h: (batch, length, dim) -> (batch, length, dim)."""
        inner = self.form(self.down(self.norm(h)))  # dim -> rank
        return h + self.up(inner)  # rank -> dim


@method
def residual_(model: nn.Module, rank: int, start: str = "lora") -> None:
    """Put a `ResidualAdapter` behind the feed-forward layer of every block."""
    weight = anatomy.embedding(model).weight
    for block in range(len(anatomy.blocks(model))):
        adapter = ResidualAdapter(weight.shape[1], rank, start).to(weight)
        sublayers.change_(model, block, "mlp", adapter, _free(model, block, "mlp"))
