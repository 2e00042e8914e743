"""One token on CPU: the weight's columns added up, each times its input, codes in registers.

y = sum over k of x_k W[:, k] is what an embedding bag computes: rows of a table, weighted and
added. torch has one for tables of 8, 4 and 2 bits (FBGEMM's, made for recommendation models). So
the codes are laid out a second time, with a row of the table for each input. A bag is a group,
since a group's scale and zero differ from output to output and are applied to its sum:

y = sum over groups g of scale_g (sum over k in g of x_k code[:, k] - zero_g sum over k in g of x_k)

At 4,096 x 4,096 on one thread this takes about a third of a float32 product's time with 4 bits or
8, where tiles, unpacked by PyTorch's own operations, take 1.7 and 0.9 times as long. A call has
about 30 us to itself: matrices of a few hundred rows that lie in the cache are slower than in
float32. torch's own product with 4 bits takes two thirds of this one's time where x is bfloat16;
it rounds scales to bfloat16, wants a third layout, and takes nine times as long where x is float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lablib.kernels.dequant_matmul import naive

BUILT = "fbgemm" in torch.backends.quantized.supported_engines
# bits of a code -> bits it takes in the table, which knows three widths
WIDTHS = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}


class Turned(NamedTuple):
    """codes: (in, bytes) uint8, a table; scale: (groups, out); zero: (groups or 1, out or 1)."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    width: int


def fits(x: Tensor) -> bool:
    """Whether x is one token on CPU whose product nobody differentiates, and torch has the sum."""
    one = x.is_cpu and 0 < x.numel() == x.shape[-1] and not torch.compiler.is_compiling()
    learned = torch.is_grad_enabled() and x.requires_grad
    return BUILT and one and not learned


def turn(packed: Tensor, scale: Tensor, zero: Tensor, bits: int, size: int) -> Turned:
    """The weight once more, a row for each input; arguments as `dequant_matmul`'s.

    Takes as many bytes as the codes do, 3 bits as many as 4 and 5 to 7 as many as 8, and 4 for each
    scale, and zero where each group has its own.
    """
    width = WIDTHS[bits]
    per = 8 // width
    codes = naive.unpack(packed, bits, size)
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % per))
    table = codes[::per].clone()  # byte j of a row: the outputs per * j, per * j + 1, ...
    for place in range(1, per):
        table |= codes[place::per] << (place * width)
    # A row ends with a scale and an offset of its own, as wide as the table's kind has them.
    own = torch.tensor([1.0, 0.0], dtype=torch.float32 if width == 8 else torch.float16)
    ends = own.view(torch.uint8).expand(size, -1)
    turned = [part.float().t().contiguous() for part in (scale, zero)]
    return Turned(torch.cat([table.t(), ends], 1), *turned, width)


def product(x: Tensor, weight: Turned, group: int) -> Tensor:
    """x (1, in) float32 -> (1, out) float32."""
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
