"""(IA)3 (Liu et al., 2022): activations times learned vectors, the fewest numbers of all.

Keys l_k * (W_k x), values l_v * (W_v x), and the feed-forward layer's inner activations
W_down (l_ff * f(x)); every l is one at the start. All three are changes of a weight's rows or
columns, so they merge.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.peft.adapter import WeightAdapter, matrix, method

SIDES = ("output", "input")


class Rescaled(WeightAdapter):
    """base with its outputs, or its inputs, times a vector that trains.

    y = l * (W x + b) for "output", W (l * x) + b for "input".
    first: outputs before this one stay as they are, such as the queries of a fused projection.
    Raises ValueError for another side.
    """

    def __init__(self, base: nn.Module, side: str = "output", first: int = 0):
        super().__init__(base)
        if side not in SIDES:
            raise ValueError(f"{side!r} is none of {', '.join(SIDES)}")
        n_out, n_in = matrix(base).shape
        self.side, self.first = side, first
        self.bias_before: Tensor | None = None  # the base's own, while merged
        self.scale = nn.Parameter(
            base.weight.new_ones(n_out - first if side == "output" else n_in)  # l
        )

    def rows(self) -> Tensor:
        """(out,): what each output is multiplied by."""
        return F.pad(self.scale, (self.first, 0), value=1.0)

    def delta(self) -> Tensor:
        """(out, in): (l - 1) times W, by rows or by columns."""
        weight = matrix(self.base)
        return ((self.rows()[:, None] if self.side == "output" else self.scale) - 1) * weight

    def changed(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return self.base(self.scale * x) if self.side == "input" else self.rows() * self.base(x)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the scale into the base's weight, and into its bias where outputs are scaled."""
        bias = innermost(self.base).bias
        if not self.merged and self.side == "output" and bias is not None:
            self.bias_before = bias.detach().clone()
            bias.mul_(self.rows().to(bias.dtype))
        super().merge()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's own bits back."""
        super().unmerge()
        if self.bias_before is not None:
            innermost(self.base).bias.copy_(self.bias_before)
            self.bias_before = None


def innermost(layer: nn.Module) -> nn.Module:
    """The base's own projection below any number of adapters."""
    return innermost(layer.base) if isinstance(layer, WeightAdapter) else layer


@method
def ia3_(model: nn.Module) -> None:
    """Put vectors on keys, values and the feed-forward layer's inner activations of every block.

    Source: section 3.3 of Liu et al. (2022).
    """
    fused = "query_key_value" in anatomy.family(model).projections  # queries come first
    for name, layer in anatomy.projections(
        model, *(["query_key_value"] if fused else ["key", "value"])
    ).items():
        first = matrix(layer).shape[0] // 3 if fused else 0
        anatomy.replace(model, name, Rescaled(layer, "output", first))
    for name, layer in anatomy.projections(model, "down").items():
        anatomy.replace(model, name, Rescaled(layer, "input"))
