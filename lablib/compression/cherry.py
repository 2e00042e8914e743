"""Cherry on Top (Cui and Wang, 2024): a few weights stay in 16 bits, all others go to a few.

Lab 807. Which ones: those whose impact on the loss is largest, s = E[g^2] (section 3). How the rest
is rounded: in groups along the input axis, whose step follows from the weights that are not kept.
CherryQ then trains both together, straight through the rounding (section 4).

Levels are those of the authors' code: (q + 1/2) s up to 4 bits, "full range", so that 0 is none and
no weight lies more than half a step from a level; whole multiples above. Two things differ from
it. Groups have fixed places here, kept weights left out; there the rest closes ranks first. And
their script, as published, sets one gradient to zero after a sequence and adds up all others; here
each sequence's gradient is squared by itself, as the paper writes.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.compression.calibration import gradients
from lablib.compression.quantize import TINY
from lablib.kernels.dequant_matmul import naive
from lablib.models import anatomy
from lablib.paths import data_dir


def impact(model: nn.Module, rows: Tensor, *roles: str) -> dict[str, Tensor]:
    """Name -> s (out, in) of every projection's weight: how much the loss leans on each.

    A change d of the weights changes the loss by g^T d + 1/2 d^T H d. Where training has ended g is
    near 0, and H is near E[g g^T], the Fisher information, so that one weight's change costs
    s d^2 / 2 with s = E[g^2]. rows: (n, length + 1) token ids, a backward pass each.
    Source: section 3.
    """
    return {name: square for name, (_, square) in gradients(model, rows, *roles).items()}


def cherries(scores: Tensor, fraction: float, multiple: int = 1) -> Tensor:
    """Which weights are kept: (out, in) bool, in each row those with the largest scores.

    fraction: of a row; multiple: what their number is one of, 8 in the authors' code. `count` says
    how it is rounded.
    """
    k = count(scores.shape[1], fraction, multiple)
    places = scores.topk(k, 1).indices  # (out, k)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, places, True)


def round_rest(weight: Tensor, kept: Tensor, bits: int, group: int, frozen: bool = False) -> Tensor:
    """The weights that a mixed matrix computes with: kept ones as they are, others on levels.

    weight: (out, in); kept: (out, in) bool. group: neighbours that share a step; a row's last group
    may be shorter. frozen: the step follows from all weights, kept ones too, which the paper never
    does: it tells protecting a weight from narrowing the range of its neighbours.
    """
    # s = max |w| / 2^(b-1) over a group's weights that are not kept
    s = step(weight, kept & (not frozen), bits, group)  # (out, in), the same within a group
    if bits > 4:
        most = 2 ** (bits - 1) - 1
        return torch.where(kept, weight, (weight / s).round().clamp(-most, most) * s)
    # w is nearest to (q + 1/2) s, with q from -2^(b-1) to 2^(b-1) - 1
    q = (weight / s).floor().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return torch.where(kept, weight, (q + 0.5) * s)  # (out, in)


def step(weight: Tensor, ignore: Tensor, bits: int, group: int) -> Tensor:
    """The distance of neighbouring levels at each weight: (out, in).

    ignore: (out, in) bool, weights that the range takes no notice of.
    """
    spread = step_of_groups(weight, ignore, bits, group).repeat_interleave(group, 1)
    return spread[:, : weight.shape[1]]


def step_of_groups(weight: Tensor, ignore: Tensor, bits: int, group: int) -> Tensor:
    """The same once a group: (out, groups)."""
    short = -weight.shape[1] % group
    heights = F.pad(weight.detach().abs().masked_fill(ignore, 0.0), (0, short))
    most = heights.unflatten(1, (-1, group)).amax(2)
    return most.clamp_min(TINY) / (2 ** (bits - 1) - (bits > 4))


def count(size: int, fraction: float, multiple: int = 1) -> int:
    """How many weights of a row of `size` are kept: at least one, where any are.

    Their fraction is rounded up to a whole number, and that down to a multiple.
    Raises ValueError for a fraction that is not from 0 to 1.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"a fraction of {fraction} is not from 0 to 1")
    whole = math.ceil(size * fraction) // multiple * multiple
    return max(1, whole) if fraction else 0


def heterogeneity(scores: Tensor, top: float = 0.01, over: str = "max") -> float:
    """How far the top 1 % stand above the rest: their mean, over the rest's largest score.

    over: "mean" divides by the rest's mean, which one score can't decide. For scores that are all
    above 0. Source: equation 4; equation 5 is the same of |w|.
    """
    ordered = scores.flatten().sort(descending=True).values
    k = max(1, round(top * len(ordered)))
    rest = ordered[k] if over == "max" else ordered[k:].mean()
    return (ordered[:k].mean() / rest).item()


def share_that_carries(scores: Tensor, part: float = 0.5) -> float:
    """The smallest share of weights that has a part of the scores' sum."""
    summed = scores.flatten().double().sort(descending=True).values.cumsum(0)
    return (1 + int((summed < part * summed[-1]).sum())) / len(summed)


class CherryLinear(nn.Module):
    """A linear layer that computes with rounded weights and learns as if they were not.

    kept: (out, in) bool; those weights stay as they are. All of them learn: the rest collects small
    changes until one rounds to another level. With none kept this is plain quantization-aware
    training.
    """

    def __init__(self, layer: nn.Linear, kept: Tensor, bits: int, group: int):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bits, self.group = bits, group
        self.register_buffer("kept", kept)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        rounded = round_rest(self.weight.detach(), self.kept, self.bits, self.group)  # (out, in)
        # straight through: the value is the rounded weight's, the gradient goes to the weight
        weight = self.weight + (rounded - self.weight).detach()
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        """What print shows."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.bits}, group={self.group}, kept={int(self.kept.sum())}"


def cherry_(model: nn.Module, kept: Mapping[str, Tensor], bits: int, group: int) -> nn.Module:
    """Put a `CherryLinear` in the place of each projection that `kept` names; returns the model.

    Raises ValueError for a projection that is not nn.Linear: one that is quantized, too.
    """
    layers = anatomy.projections(model)
    for name, mask in kept.items():
        if not isinstance(layers[name], nn.Linear):
            raise ValueError(f"{name} is {type(layers[name]).__name__}, not nn.Linear")
        anatomy.replace(model, name, CherryLinear(layers[name], mask, bits, group))
    return model


@dataclass(frozen=True)
class CherryWeight:
    """A mixed matrix (out, in) as it is stored; `k` weights a row are kept.

    packed: (out, bytes) uint8, the codes of the others, without gaps; steps: (out, groups) float16;
    kept: (out, k) float16, and their places: (out, k) int16.
    """

    packed: Tensor
    steps: Tensor
    kept: Tensor
    places: Tensor
    bits: int
    group: int
    size: int

    def dequantize(self) -> Tensor:
        """(out, in) float32."""
        rest = self.size - self.places.shape[1]
        codes = naive.unpack(self.packed, self.bits, rest).float()
        weight = torch.zeros(len(codes), self.size)
        others = torch.ones_like(weight, dtype=torch.bool).scatter_(1, self.places.long(), False)
        weight[others] = (codes - lowest(self.bits)).flatten()
        weight *= self.steps.float().repeat_interleave(self.group, 1)[:, : self.size]
        return weight.scatter_(1, self.places.long(), self.kept.float())

    def bits_per_weight(self, places: bool = True) -> float:
        """All that is stored, for each weight; the places of kept weights only if asked for."""
        parts = [self.packed, self.steps, self.kept, *([self.places] if places else [])]
        return 8 * sum(part.nbytes for part in parts) / (len(self.packed) * self.size)


def lowest(bits: int) -> float:
    """Minus the lowest level, in steps: codes count from 0."""
    return 2 ** (bits - 1) - (0.5 if bits <= 4 else 1)


def store(weight: Tensor, kept: Tensor, bits: int, group: int) -> CherryWeight:
    """A matrix (out, in) as it is stored: `kept` has as many weights in each row.

    Raises ValueError when it has not.
    """
    if len({*kept.sum(1).tolist()}) > 1:
        raise ValueError("each row must keep as many weights as the others")
    weight = weight.detach().float()
    steps = step_of_groups(weight, kept, bits, group).clamp_min(2**-14).half()
    by = steps.float().repeat_interleave(group, 1)[:, : weight.shape[1]]
    codes = (weight / by + lowest(bits)).round().clamp(0, 2 * lowest(bits))
    others, places = codes[~kept].view(len(weight), -1), kept.nonzero()[:, 1].view(len(weight), -1)
    packed = naive.pack(others.to(torch.uint8), bits)
    values = weight.gather(1, places).half()
    return CherryWeight(packed, steps, values, places.to(torch.int16), bits, group, weight.shape[1])


def published(text: str = "wikitext-2", group: str = "128") -> dict[str, float]:
    """Method -> perplexity of Llama-2-7B in 3 bits, and in 16; `data/published/cherry.csv`."""
    path = data_dir() / "published" / "cherry.csv"
    rows = csv.DictReader(path.read_text("utf-8").splitlines())
    wanted = [row for row in rows if row["text"] == text and row["group"] in ("", group)]
    return {row["method"]: float(row["value"]) for row in wanted}
