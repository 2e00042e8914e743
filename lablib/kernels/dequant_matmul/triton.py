"""Weights of 2, 4 or 8 bits unpacked inside the loop over a tile's inputs, on CUDA.

Where a block of inputs lies in one group, codes are multiplied as they are - every dtype here holds
integers up to 255 exactly - and the group's scale and zero are applied to the block's sums:
x W^T = s (x code^T - z sum(x)). Few tokens are few tiles, so that their inputs are split among
several programs; the parts are added in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _product(
    x, packed, scale, zero, out, tokens, rows, size, n_bytes, groups, group,
    zero_row, zero_group, share,
    BITS: tl.constexpr, WITHIN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    first = tl.program_id(2) * share
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, tl.minimum(first + share, n_bytes), BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        here = (row[:, None] < rows) & (place[None, :] < n_bytes)
        byte = tl.load(packed + row[:, None] * n_bytes + place[None, :], here, 0)
        # Byte j holds the codes of the columns j, j + n_bytes, ...: one product for each.
        for part in tl.static_range(8 // BITS):
            code = (byte >> (BITS * part)) & (2**BITS - 1)
            column = place + part * n_bytes
            real = (place < n_bytes) & (column < size)
            given = (token[:, None] < tokens) & real[None, :]
            values = tl.load(x + token[:, None] * size + column[None, :], given, 0.0)
            if WITHIN:
                which = (start + part * n_bytes) // group
                known = (row < rows) & (which < groups)
                by = tl.load(scale + row * groups + which, known, 0.0).to(tl.float32)
                off = tl.load(zero + row * zero_row + which * zero_group, known, 0.0)
                codes = tl.trans(code.to(values.dtype))
                taken = tl.sum(values.to(tl.float32), 1)[:, None] * off.to(tl.float32)[None, :]
                total += (tl.dot(values, codes, input_precision="ieee") - taken) * by[None, :]
            else:
                valid = (row[:, None] < rows) & real[None, :]
                which = column[None, :] // group
                by = tl.load(scale + row[:, None] * groups + which, valid, 0.0).to(tl.float32)
                off = tl.load(zero + row[:, None] * zero_row + which * zero_group, valid, 0.0)
                weight = tl.where(valid, by * (code.to(tl.float32) - off.to(tl.float32)), 0.0)
                weight = tl.trans(weight.to(values.dtype))
                total += tl.dot(values, weight, input_precision="ieee")
    inside = (token[:, None] < tokens) & (row[None, :] < rows)
    to = out + tl.program_id(2).to(tl.int64) * tokens * rows + token[:, None] * rows + row[None, :]
    tl.store(to, total.to(out.dtype.element_ty), inside)


class Tiles(NamedTuple):
    """Tokens and rows of a tile, inputs at a time, warps."""

    m: int
    n: int
    k: int
    warps: int


def _tiles(tokens: int, bits: int, bytes_each: int, within: int) -> Tiles:
    """What was fastest on an H200, bfloat16, 4,096 inputs and rows.

    within: inputs that are sure to lie in one group; 0 when that is fewer than 16.
    """
    k = within or 32
    if tokens <= 16:
        return Tiles(16, 64, k, 8 if bits == 8 else 4)
    return Tiles(64, 64 if bytes_each == 4 else 128, k, 4)


def _within(n_bytes: int, bits: int, groups: int, group: int) -> int:
    """The largest power of two up to 64 by which blocks never reach over a group's end; or 0."""
    for k in (64, 32, 16):
        one = groups == 1 or (group % k == 0 and (bits == 8 or n_bytes % k == 0))
        if one and (k == 16 or k <= n_bytes):
            return k
    return 0


def product(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int
) -> Tensor:
    """(tokens, in) and (out, bytes) -> (tokens, out); arguments as `dequant_matmul`'s, checked."""
    (tokens, size), (rows, n_bytes), groups = x.shape, packed.shape, scale.shape[1]
    if not tokens * rows:
        return x.new_empty(tokens, rows)
    x, packed, scale = x.contiguous(), packed.contiguous(), scale.contiguous()
    zero = zero.contiguous()
    zero_row = zero.shape[1] if len(zero) > 1 else 0
    zero_group = 1 if zero.shape[1] > 1 else 0
    within = _within(n_bytes, bits, groups, group)
    tiles = _tiles(tokens, bits, x.element_size(), within)
    grid = triton.cdiv(tokens, tiles.m), triton.cdiv(rows, tiles.n)
    share, parts = _parts(x, grid[0] * grid[1], n_bytes, tiles.k)
    kind = torch.float32 if parts > 1 else x.dtype
    out = x.new_empty(parts, tokens, rows, dtype=kind)
    _product[(*grid, parts)](
        x, packed, scale, zero, out, tokens, rows, size, n_bytes, groups, group, zero_row,
        zero_group, share, bits, within > 0, *tiles[:3], num_warps=tiles.warps,
    )  # fmt: skip
    return out.sum(0).to(x.dtype) if parts > 1 else out[0]


def _parts(x: Tensor, programs: int, n_bytes: int, block: int) -> tuple[int, int]:
    """Bytes of a row for each program, a multiple of block, and into how many parts that cuts it.

    As many as give each multiprocessor two programs, with at least four blocks of work.
    """
    at_once = (
        2 * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4
    )
    blocks = triton.cdiv(n_bytes, block)
    parts = max(1, min(at_once // programs, blocks // 4))
    share = triton.cdiv(blocks, parts) * block
    return share, triton.cdiv(n_bytes, share)
