"""The definition: weights of a few bits are unpacked, scaled back, and multiplied with."""

import torch
from torch import Tensor

# Widths of the parts that a code is cut into, from its lowest bits up: each packs without gaps.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def packed_size(size: int, bits: int) -> int:
    """Bytes of a row of `size` codes: each plane is rounded up to whole bytes."""
    return sum(-(-size * width // 8) for width in PLANES[bits])


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, size) in 0 to 2^bits - 1 -> (rows, bytes) uint8.

    A plane of w bits fills s = size * w / 8 bytes; byte j holds the codes j, j + s, j + 2 s, ...,
    the first in its lowest bits, so that unpacking gives runs of neighbours.
    """
    planes, shift = [], 0
    for width in PLANES[bits]:
        per, size = 8 // width, -(-codes.shape[1] * width // 8)
        part = (codes >> shift) & (2**width - 1)
        part = torch.nn.functional.pad(part, (0, per * size - codes.shape[1]))
        part = part.view(len(codes), per, size).to(torch.uint8)
        byte = part[:, 0].clone()
        for place in range(1, per):
            byte |= part[:, place] << (place * width)
        planes.append(byte)
        shift += width
    return torch.cat(planes, 1)


def unpack(packed: Tensor, bits: int, size: int) -> Tensor:
    """(rows, bytes) uint8 -> codes (rows, size) uint8, the inverse of `pack`."""
    codes, start, shift = None, 0, 0
    for width in PLANES[bits]:
        length = -(-size * width // 8)
        byte = packed[:, start : start + length]
        parts = [(byte >> place) & (2**width - 1) for place in range(0, 8, width)]
        part = torch.cat(parts, 1)[:, :size] << shift
        codes = part if codes is None else codes | part
        start, shift = start + length, shift + width
    return codes


def dequantize(
    packed: Tensor, scale: Tensor, zero: Tensor, bits: int, size: int, group: int
) -> Tensor:
    """w = scale (code - zero), with one scale and zero for `group` neighbours: (out, size) float32.

    scale: (out, groups); zero: (out or 1, groups or 1). The last group may be shorter.
    """
    codes = unpack(packed, bits, size).float()  # (out, size)
    each = torch.arange(size, device=codes.device) // group
    shape = (len(codes), scale.shape[1])
    return scale.float()[:, each] * (codes - zero.float().expand(shape)[:, each])


def dequant_matmul(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int
) -> Tensor:
    """x (tokens, in) times the dequantized weight's transpose, (tokens, out)."""
    weight = dequantize(packed, scale, zero, bits, x.shape[1], group)
    return x @ weight.to(x.dtype).t()
