"""One token on CPU: the weight's columns added up, each times its input, codes in registers.

y = sum over k of x_k W[:, k] is what an embedding bag computes: rows of a table, weighted and
added. torch has one for tables of 8, 4 and 2 bits (FBGEMM's, made for recommendation models). So
the codes are laid out a second time, with a row of the table for each input. A bag is a group,
since a group's scale and zero differ from output to output and are applied to its sum:

y = sum over groups g of scale_g (sum over k in g of x_k code[:, k] - zero_g sum over k in g of x_k)

At 4,096 x 4,096 on one thread this takes about a third of a float32 product's time with 4 bits or
8, where tiles, unpacked by PyTorch's own operations, take 1.7 and 0.9 times as long. A call has
about 30 us to itself: matrices of a few hundred rows that lie in the cache are slower than in
float32.

Where x is bfloat16, torch has products that take less time than that: with 4 bits, in a layout of
its own, half to two thirds of it, with 8 bits and one scale a row two thirds to four fifths. Scales
are rounded to bfloat16 there, as x and the result are. In float32 they take three to nine times as
long.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lablib.kernels.dequant_matmul import naive

BUILT = "fbgemm" in torch.backends.quantized.supported_engines
# bits of a code -> bits it takes in the table, which knows three widths
WIDTHS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


INT4_GROUPS = (32, 64, 128, 256)  # of torch's own product with 4 bits


class Turned(NamedTuple):
    """codes: (in, bytes) uint8, a table; scale: (groups, out); zero: (groups or 1, out or 1)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    width: int


class Int4(NamedTuple):
    """codes: as torch lays 4 bits out; scale_and_zero: (groups, out, 2) bfloat16."""

    codes: Tensor
    scale_and_zero: Tensor


class Int8(NamedTuple):
    """codes: (out, in) int8, less 128; scale: (out,) bfloat16; shift: (out,) for other zeros."""

    codes: Tensor
    scale: Tensor
    shift: Tensor | None


LaidOut = Turned | Int4 | Int8


def fits(x: Tensor, weight: LaidOut | None = None) -> bool:
    """Whether x is one token on CPU whose product nobody differentiates, and torch has the sum.

    weight: for this one; `Int4` and `Int8` are for bfloat16 alone.
    """
    if isinstance(weight, Int4 | Int8) and x.dtype != torch.bfloat16:
        return False
    one = x.is_cpu and 0 < x.numel() == x.shape[-1] and not torch.compiler.is_compiling()
    learned = torch.is_grad_enabled() and x.requires_grad
    return BUILT and one and not learned


def turn(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor,
    bits: int,
    size: int,
    group: int,
    dtype: torch.dtype = torch.float32,
) -> LaidOut:
    """The weight once more, as tokens of a dtype read it fastest; arguments as `dequant_matmul`'s.

    Takes as many bytes as the codes do, 3 bits as many as 4 and 5 to 7 as many as 8, and 4 for each
    scale, and zero where each group has its own.
    """
    codes = naive.unpack(packed, bits, size)
    whole = len(codes) % 16 == 0 and size % group == 0 and group in INT4_GROUPS
    if dtype == torch.bfloat16 and bits == 4 and whole:
        return _int4(codes, scale.float(), zero.float())
    if dtype == torch.bfloat16 and bits == 8 and scale.shape[1] == 1:
        return _int8(codes, scale.float()[:, 0], zero.float()[:, 0])
    width = WIDTHS[bits]
    per = 8 // width
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % per))
    table = codes[::per].clone()  # byte j of a row: the outputs per * j, per * j + 1, ...
    for place in range(1, per):
        table |= codes[place::per] << (place * width)
    # A row ends with a scale and an offset of its own, as wide as the table's kind has them.
    own = torch.tensor([1.0, 0.0], dtype=torch.float32 if width == 8 else torch.float16)
    ends = own.view(torch.uint8).expand(size, -1)
    turned = [part.float().t().contiguous() for part in (scale, zero)]
    return Turned(torch.cat([table.t(), ends], 1), *turned, width)


def _int4(codes: Tensor, scale: Tensor, zero: Tensor) -> Int4:
    """torch's layout, whose weights are scale (code - 8) + shift."""
    shift = (8 - zero).expand_as(scale) * scale
    both = torch.stack([scale, shift], -1).transpose(0, 1)  # (groups, out, 2)
    laid_out = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return Int4(laid_out, both.to(torch.bfloat16).contiguous())


def _int8(codes: Tensor, scale: Tensor, zero: Tensor) -> Int8:
    """torch's layout, whose weights are scale (code - 128); other zeros shift the sum of x."""
    shift = None if (zero == 128).all() else (128 - zero) * scale
    return Int8((codes.short() - 128).to(torch.int8), scale.to(torch.bfloat16), shift)


def product(x: Tensor, weight: LaidOut, group: int) -> Tensor:
    """x (1, in) -> (1, out) in its dtype, which is bfloat16 for `Int4` and `Int8`."""
    if isinstance(weight, Int4):
        parts = (weight.codes, group, weight.scale_and_zero)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, *parts)
    if isinstance(weight, Int8):
        out = torch._weight_int8pack_mm(x, weight.codes, weight.scale)
        return out if weight.shift is None else out + (x.float().sum() * weight.shift).to(x.dtype)
    return _summed(x.float(), weight, group).to(x.dtype)


def _summed(x: Tensor, weight: Turned, group: int) -> Tensor:
    rows, starts = torch.arange(x.shape[1]), torch.arange(0, x.shape[1], group)
    bag = {
        8: torch.ops.quantized.embedding_bag_byte_rowwise_offsets,
        4: torch.ops.quantized.embedding_bag_4bit_rowwise_offsets,
        2: torch.ops.quantized.embedding_bag_2bit_rowwise_offsets,
    }[weight.width]
    sums = bag(weight.codes, rows, starts, False, 0, False, x[0], None, False)  # (groups, out)
    padded = torch.nn.functional.pad(x[0], (0, -x.shape[1] % group))
    taken = padded.view(-1, group).sum(1, keepdim=True) * weight.zero
    out = sums[:, : weight.scale.shape[1]]  # without outputs that fill up a byte
    return out.sub_(taken).mul_(weight.scale).sum(0, keepdim=True)
