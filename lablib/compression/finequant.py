"""FineQuant (Kim et al., 2023): weights in few bits, in groups as fine as each matrix needs.

Lab 806. Weight-only, and from the weights alone: no text is read. `absmax` is how a group is
rounded; `adaptive_groups` chooses how large groups are. Everything that is stored or multiplied
with is `lablib.compression.quantize`.

The abstract says that a heuristic finds the granularity from the weights; its rule was not found,
so the one here is ours: groups get finer as long as their ranges shrink enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lablib.compression.quantize import TINY, QuantizedLinear, QuantizedWeight, quantize
from lablib.models import anatomy

SIZES = (128, 64, 32, 16)  # what may follow one scale a row
SCALE_BITS = 16


def absmax(weight: Tensor, bits: int, group: int) -> Tensor:
    """The nearest weights that `bits` bits can say, `group` neighbours sharing a scale.

    weight: (out, in), in a multiple of group -> (out, in). Raises ValueError when it is none.
    `quantize(weight, bits, group=group)` stores the same, for any width.
    """
    if weight.shape[1] % group:
        raise ValueError(f"{weight.shape[1]} inputs are no multiple of a group of {group}")
    most = 2 ** (bits - 1) - 1
    groups = weight.unflatten(1, (-1, group))  # (out, groups, group)
    # s = max |w| / (2^(b-1) - 1), one for each group
    scale = groups.abs().amax(2, keepdim=True).clamp_min(TINY) / most  # (out, groups, 1)
    # q = clamp(round(w / s)): a whole number, all that is stored of a weight
    codes = (groups / scale).round().clamp(-most, most)
    return (scale * codes).flatten(1)  # (out, in)


def per_bit(group: int, wide: float, size: int, narrow: float) -> float:
    """How much a step narrows the squared range, for each bit a weight that its scales take.

    Rounding errs by a part of a step, so the squared error is proportional to the squared range.
    """
    return (wide**2 - narrow**2) / (SCALE_BITS / size - SCALE_BITS / group)


def shrinking(group: int, wide: float, size: int, narrow: float) -> float:
    """The part of the range that halving takes off, whatever its scales cost."""
    return 1 - (narrow / wide) ** (1 / math.log2(group / size))


Trail = list[tuple[int, float]]  # group size, typical range: from one scale a row downwards


def adaptive_groups(trail: Trail, alpha: float, gain: Callable = per_bit) -> int:
    """How many neighbors share a scale: finer groups as long as a step's gain is above alpha.

    trail: of a matrix, by `ranges`. gain: (group, range, next group, its range) -> what the step is
    worth: `per_bit` or `shrinking`. Infinity stays at rows, minus infinity goes to the trail's end.
    """
    group, wide = trail[0]
    for size, narrow in trail[1:]:
        if gain(group, wide, size, narrow) <= alpha:
            break
        group, wide = size, narrow
    return group


def ranges(weight: Tensor, sizes: Sequence[int] = SIZES) -> Trail:
    """(out, in) -> the trail of group sizes, with the typical range of each.

    A range is max |w| of a group, in root mean squares of the matrix; typical is the root mean
    square over groups, the last of which may be shorter.
    """
    weight = weight.detach().float()
    scale, width = weight.square().mean().sqrt().clamp_min(TINY), weight.shape[1]
    trail = []
    for size in (width, *(size for size in sizes if size < width)):
        peaks = torch.stack([part.abs().amax(1) for part in weight.split(size, 1)])
        trail.append((size, (peaks.square().mean().sqrt() / scale).item()))
    return trail


def adaptive(weight: Tensor, bits: int, alpha: float, **options) -> QuantizedWeight:
    """A matrix (out, in) in few bits, its groups its own choice; options of `quantize`."""
    return quantize(weight, bits, group=adaptive_groups(ranges(weight), alpha), **options)


def quantize_adaptively_(
    model: nn.Module, bits: int, *roles: str, alpha: float, **options
) -> dict[str, int]:
    """Put a `QuantizedLinear` in the place of each projection: name -> its group size.

    roles: as `anatomy.projections` names them, none for all. Raises ValueError for a projection
    that is not nn.Linear: one that is quantized, too.
    """
    groups = {}
    for name, layer in anatomy.projections(model, *roles).items():
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"{name} is {type(layer).__name__}, not nn.Linear")
        small = adaptive(layer.weight, bits, alpha, **options)
        anatomy.replace(model, name, QuantizedLinear(small, layer.bias))
        groups[name] = small.group
    return groups


def scale_bits(shapes: Iterable[tuple[int, int]], groups: Iterable[int]) -> float:
    """Bits that scales add to each weight of several matrices (out, in), a scale a group."""
    weights = scales = 0
    for (rows, size), group in zip(shapes, groups, strict=True):
        weights += rows * size
        scales += rows * -(-size // group)
    return SCALE_BITS * scales / weights


def even_group(size: int, group: int) -> int:
    """As many groups as `group` cuts a row of `size` into, but as even as can be."""
    return -(-size // -(-size // group))


def matched_groups(shapes: Sequence[tuple[int, int]], budget: float) -> list[int]:
    """One size for all matrices (out, in) whose scales take at least `budget` bits a weight.

    The rival of adaptive groups: it gets what rounding gives away, and rows are cut evenly. Raises
    ValueError when even groups of one weight take fewer bits.
    """
    for group in range(max(size for _, size in shapes), 0, -1):
        groups = [even_group(size, group) for _, size in shapes]
        if scale_bits(shapes, groups) >= budget:
            return groups
    raise ValueError(f"no groups have scales of {budget:.2f} bits a weight")


def relative_error(weight: Tensor, small: QuantizedWeight) -> float:
    """What rounding has changed: ||w - w'||^2 / ||w||^2."""
    weight = weight.detach().float()
    return ((small.dequantize() - weight).square().sum() / weight.square().sum()).item()


def errors(
    weight: Tensor, bits: int, sizes: Iterable[int | str], **options
) -> Mapping[int | str, float]:
    """Group size -> relative error of a matrix (out, in); options of `quantize`."""
    return {
        size: relative_error(weight, quantize(weight, bits, group=size, **options))
        for size in sizes
    }


def column_peaks(weight: Tensor) -> Tensor:
    """(in,): each input's largest |w|, in root mean squares of the matrix (out, in)."""
    weight = weight.detach().float()
    return weight.abs().amax(0) / weight.square().mean().sqrt()


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name -> weight (out, in) of every nn.Linear of any model.

    For encoders, which `lablib.models.anatomy` does not know.
    """
    layers = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    return {f"{name}.weight": layer.weight for name, layer in layers.items()}
