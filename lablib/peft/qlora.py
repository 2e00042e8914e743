"""QLoRA (Dettmers et al., 2023): LoRA over a base in 4-bit NormalFloat.

w = absmax * level[code]: 16 levels that a normal variable meets equally often, one absmax a block
of 64 weights, itself in 8 bits a block of 256 (double quantization; integers here, where the paper
has 8-bit floats). The weight is computed anew at each call; gradients reach its input and the
low-rank change alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.kernels.dequant_matmul.naive import pack, unpack
from lablib.models import anatomy
from lablib.peft.adapter import matrix, method
from lablib.peft.lora import LoRALinear

TAIL = (1 - 1 / 32 + 1 - 1 / 30) / 2  # the largest quantile: half a step from either end


def levels() -> Tensor:
    """The 16 levels of NF4, from -1 to 1: 0 is one, eight lie above it and seven below.

    Quantiles of a normal distribution, divided by the largest. Source: section 3 and appendix E.
    """
    above = _quantiles(9)
    below = _quantiles(8)
    both = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above.flip(0)])
    return (both / both.max()).float()


def _quantiles(n: int) -> Tensor:
    """(n - 1,): of a normal variable, from the largest down, without the middle."""
    at = torch.linspace(TAIL, 0.5, n, dtype=torch.float64)[:-1]
    return torch.special.ndtri(at)


class NF4Linear(nn.Module):
    """A projection whose weight stays in 4 bits; about 4.127 bits a weight with its scales.

    block: weights a scale, along the rows of (out, in). scales: scales an 8-bit range.
    """

    def __init__(self, layer: nn.Module, block: int = 64, scales: int = 256):
        super().__init__()
        weight = matrix(layer).detach()
        self.out_features, self.in_features = weight.shape
        self.block, self.scales, self.dtype = block, scales, weight.dtype
        blocks = _padded(weight.float().flatten(), block)  # (blocks, block)
        absmax = blocks.abs().amax(1)
        relative = blocks / absmax.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        codes = (relative[..., None] - levels().to(weight.device)).abs().argmin(-1)
        self.register_buffer("packed", pack(codes.to(torch.uint8), 4))
        self._store(absmax)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())

    def _store(self, absmax: Tensor) -> None:
        """Keep the scales in 8 bits, around their mean."""
        mean = absmax.mean()
        around = _padded(absmax - mean, self.scales)
        step = around.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("mean", mean)
        self.register_buffer("step", step)  # float32, one a range
        self.register_buffer("small", (around / step[:, None]).round().to(torch.int8))

    @property
    def weight(self) -> Tensor:
        """(out, in), computed from the codes."""
        n = self.out_features * self.in_features
        codes = unpack(self.packed, 4, self.block).long()  # (blocks, block)
        absmax = (self.small * self.step[:, None]).flatten()[: len(codes)] + self.mean
        weight = levels().to(codes.device)[codes] * absmax[:, None]
        return weight.flatten()[:n].view(self.out_features, -1).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return F.linear(x, self.weight, self.bias)

    def bits_per_weight(self) -> float:
        """All that is stored, for each weight."""
        stored = self.packed.nbytes + self.small.nbytes + self.step.nbytes + self.mean.nbytes
        return 8 * stored / (self.out_features * self.in_features)


def _padded(values: Tensor, size: int) -> Tensor:
    """(n,) -> (ceil(n / size), size), filled up with zeros."""
    return F.pad(values, (0, -len(values) % size)).view(-1, size)


def nf4_(model: nn.Module, roles: Sequence[str] = (), block: int = 64) -> None:
    """Put an `NF4Linear` in the place of each projection, for good: the new base.

    roles: as `anatomy.projections` names them, none for all.
    """
    for name, layer in anatomy.projections(model, *roles).items():
        anatomy.replace(model, name, NF4Linear(layer, block))


class QLoRALinear(LoRALinear):
    """LoRA over a projection in few bits, which can't take the change up."""

    def merge(self) -> None:
        """Raises ValueError: rounding would change what was trained."""
        raise ValueError("a base in 4 bits can't hold the change: put it over the full base first")


@method
def qlora_(
    model: nn.Module, roles: Sequence[str] = (), rank: int = 64, alpha: float | None = 16.0
) -> None:
    """Put a `QLoRALinear` over each projection of a model that `nf4_` has been at.

    roles: none for all. rank, alpha: the paper's. Raises ValueError for a base that isn't in NF4.
    """
    for name, layer in anatomy.projections(model, *roles).items():
        if not isinstance(layer, NF4Linear):
            raise ValueError(f"{name} is {type(layer).__name__}: call nf4_ on the model first")
        anatomy.replace(model, name, QLoRALinear(layer, min(rank, *layer.weight.shape), alpha))
