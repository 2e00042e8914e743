"""Weights of 2, 4 or 8 bits unpacked inside the loop over a tile's inputs, on CUDA."""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _product(
    x, packed, scale, zero, out, tokens, rows, size, n_bytes, groups, group,
    zero_row, zero_group,
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, n_bytes, BLOCK_K):
        place = start + tl.arange(0, BLOCK_K)
        here = (row[:, None] < rows) & (place[None, :] < n_bytes)
        byte = tl.load(packed + row[:, None] * n_bytes + place[None, :], here, 0)
        # Byte j holds the codes of the columns j, j + n_bytes, ...: one product for each.
        for part in tl.static_range(8 // BITS):
            code = (byte >> (BITS * part)) & (2**BITS - 1)
            column = place + part * n_bytes
            valid = here & (column[None, :] < size)
            which = column[None, :] // group
            by = tl.load(scale + row[:, None] * groups + which, valid, 0.0).to(tl.float32)
            off = tl.load(zero + row[:, None] * zero_row + which * zero_group, valid, 0.0)
            weight = by * (code.to(tl.float32) - off.to(tl.float32))
            given = (token[:, None] < tokens) & (column[None, :] < size)
            values = tl.load(x + token[:, None] * size + column[None, :], given, 0.0)
            weight = tl.where(valid, weight, 0.0).to(values.dtype)
            total += tl.dot(values, tl.trans(weight), input_precision="ieee")
    to = out + token[:, None] * rows + row[None, :]
    tl.store(to, total.to(out.dtype.element_ty), (token[:, None] < tokens) & (row[None, :] < rows))


def product(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor, bits: int, group: int
) -> Tensor:
    """(tokens, in) and (out, bytes) -> (tokens, out); arguments as `dequant_matmul`'s, checked."""
    out = x.new_empty(len(x), len(packed))
    if not out.numel():
        return out
    x, packed, scale = x.contiguous(), packed.contiguous(), scale.contiguous()
    zero = zero.contiguous()
    zero_row = zero.shape[1] if len(zero) > 1 else 0
    zero_group = 1 if zero.shape[1] > 1 else 0
    blocks = (16 if len(x) <= 16 else 64, 64, 32)
    grid = (triton.cdiv(len(x), blocks[0]), triton.cdiv(len(packed), blocks[1]))
    _product[grid](
        x, packed, scale, zero, out, len(x), len(packed), x.shape[1], packed.shape[1],
        scale.shape[1], group, zero_row, zero_group, bits, *blocks,
    )  # fmt: skip
    return out
