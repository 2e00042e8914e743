"""`select_tokens` and `merge_tokens` on CUDA: one pass over the rows each way."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _select(x, mask, place, rows, index, d, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    if tl.load(mask + token) != 0:
        to = tl.load(place + token) - 1
        tl.store(index + to, token)
        for start in range(0, d, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < d
            tl.store(rows + to * d + column, tl.load(x + token * d + column, inside), inside)


def select_tokens(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As the naive one; the number kept is read back, since it is the output's shape."""
    place = mask.cumsum(0)
    kept = int(place[-1]) if len(mask) else 0
    rows, index = x.new_empty(kept, x.shape[1]), place.new_empty(kept)
    if kept and x.shape[1]:
        block = min(1024, triton.next_power_of_2(x.shape[1]))
        _select[(len(x),)](
            x.contiguous(), mask.to(torch.int8), place, rows, index, x.shape[1], block
        )
    return rows, index


@triton.jit
def _merge(x, rows, first, order, weight, out, d, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < d
    total = tl.load(x + token * d + column, inside).to(tl.float32)
    for place in range(tl.load(first + token), tl.load(first + token + 1)):
        row = tl.load(order + place)
        value = tl.load(rows + row * d + column, inside).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight + row).to(tl.float32)
        total += value
    tl.store(out + token * d + column, total.to(out.dtype.element_ty), inside)


def merge_tokens(x: Tensor, rows: Tensor, index: Tensor, weight: Tensor | None = None) -> Tensor:
    """As the naive one. A token's rows are added in order, without atomics: runs repeat exactly."""
    tokens, d = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not (tokens and d):
        return out
    order = index.argsort(stable=True)
    first = torch.searchsorted(index[order], torch.arange(tokens + 1, device=x.device))
    block = min(1024, triton.next_power_of_2(d))
    grid = tokens, triton.cdiv(d, block)
    weighted = weight is not None
    _merge[grid](
        x.contiguous(), rows.contiguous(), first, order, weight.contiguous() if weighted else rows,
        out, d, weighted, block,
    )  # fmt: skip
    return out
