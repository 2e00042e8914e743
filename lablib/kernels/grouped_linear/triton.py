"""`grouped_linear` on CUDA: one launch over the tiles of all groups, without reading counts back.

The number of tiles depends on the counts, which stay on the device; so the grid is as large as
any counts could need, and a program past the last tile returns at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _product(
    x, weight, counts, out, groups, d_in, d_out, by_group, by_out, by_in,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr,
    IN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    # Each program adds the counts up itself: that is sooner done than another kernel launched.
    number = tl.arange(0, WIDTH)
    count = tl.load(counts + number, number < groups, 0).to(tl.int32)
    tiles = (count + ROWS - 1) // ROWS
    last_tile, last_row = tl.cumsum(tiles, 0), tl.cumsum(count, 0)
    done = (number < groups) & (last_tile <= tile)
    group = tl.sum(done.to(tl.int32), 0)
    if group < groups:
        before = tl.sum(tl.where(done, tiles, 0), 0)
        start = tl.sum(tl.where(done, count, 0), 0)
        end = tl.sum(tl.where(number == group, last_row, 0), 0)
        row = (start + (tile - before) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        column = tl.program_id(1) * OUT + tl.arange(0, OUT)
        matrix = weight + group.to(tl.int64) * by_group
        total = tl.zeros((ROWS, OUT), tl.float32)
        for begin in range(0, d_in, IN):
            k = begin + tl.arange(0, IN)
            left = (row[:, None] < end) & (k[None, :] < d_in)
            right = (k[:, None] < d_in) & (column[None, :] < d_out)
            a = tl.load(x + row[:, None] * d_in + k[None, :], left, 0.0)
            b = tl.load(matrix + k[:, None] * by_in + column[None, :] * by_out, right, 0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        inside = (row[:, None] < end) & (column[None, :] < d_out)
        to = out + row[:, None] * d_out + column[None, :]
        tl.store(to, total.to(out.dtype.element_ty), inside)


@triton.jit
def _outer(
    grad, x, counts, out, groups, d_in, d_out,
    PRECISION: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr,
    IN: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    number = tl.arange(0, WIDTH)
    count = tl.load(counts + number, number < groups, 0).to(tl.int32)
    i = tl.program_id(1) * OUT + tl.arange(0, OUT)
    j = tl.program_id(2) * IN + tl.arange(0, IN)
    start = tl.sum(tl.where(number < group, count, 0), 0)
    end = tl.sum(tl.where(number <= group, count, 0), 0)
    total = tl.zeros((OUT, IN), tl.float32)
    for begin in range(start, end, ROWS):
        row = (begin + tl.arange(0, ROWS)).to(tl.int64)
        left = (i[:, None] < d_out) & (row[None, :] < end)
        right = (row[:, None] < end) & (j[None, :] < d_in)
        a = tl.load(grad + row[None, :] * d_out + i[:, None], left, 0.0)
        b = tl.load(x + row[:, None] * d_in + j[None, :], right, 0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    to = out + group.to(tl.int64) * d_out * d_in + i[:, None] * d_in + j[None, :]
    inside = (i[:, None] < d_out) & (j[None, :] < d_in)
    tl.store(to, total.to(out.dtype.element_ty), inside)


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _block(size: int, most: int) -> int:
    """A power of two from 16 (the least a matrix unit takes) to `most` that covers size."""
    return min(most, max(16, triton.next_power_of_2(size)))


def _deep(x: Tensor) -> int:
    """How much of the sum is taken at once: as many bytes in every dtype."""
    return 32 if x.element_size() >= 4 else 64


def product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """(rows, d_in), (groups, d_out, d_in) in any strides, (groups,) -> (rows, d_out)."""
    rows, d_in = x.shape
    groups, d_out, _ = weight.shape
    out = x.new_empty(rows, d_out)
    if out.numel() == 0:
        return out
    size = _block(rows // groups, 128)
    tiles = triton.cdiv(rows, size) + groups
    out_block = _block(d_out, 128 if x.element_size() < 4 else 64)
    grid = tiles, triton.cdiv(d_out, out_block)
    _product[grid](
        x.contiguous(), weight, counts.contiguous(), out, groups, d_in, d_out,
        *weight.stride(), _precision(), triton.next_power_of_2(groups), size, out_block,
        _block(d_in, _deep(x)), num_warps=8 if size * out_block >= 128 * 128 else 4,
    )  # fmt: skip
    return out


def outer(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """(rows, d_out), (rows, d_in), (groups,) -> each group's grad^T x: (groups, d_out, d_in)."""
    groups, d_out, d_in = len(counts), grad.shape[1], x.shape[1]
    out = x.new_empty(groups, d_out, d_in)
    if out.numel() == 0:
        return out
    most = 64 if x.element_size() >= 4 else 128
    sizes = _block(d_out, most), _block(d_in, most)
    grid = groups, triton.cdiv(d_out, sizes[0]), triton.cdiv(d_in, sizes[1])
    _outer[grid](
        grad.contiguous(), x.contiguous(), counts.contiguous(), out, groups, d_in, d_out,
        _precision(), triton.next_power_of_2(groups), _deep(x), *sizes,
    )  # fmt: skip
    return out
