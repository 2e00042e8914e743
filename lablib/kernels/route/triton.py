"""`route` on CUDA: softmax and top-k in one pass, then a counting sort by expert."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _softmax_topk(
    logits, probs, experts, tokens, n_experts, TOP_K: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    expert = tl.arange(0, WIDTH)
    place = row[:, None] * n_experts + expert[None, :]
    inside = (row[:, None] < tokens) & (expert[None, :] < n_experts)
    values = tl.load(logits + place, inside, -float("inf")).to(tl.float32)
    # Rows past the end hold only -inf: a finite maximum keeps them from becoming nan.
    peak = tl.maximum(tl.max(values, 1), -1e30)
    numerator = tl.exp(values - peak[:, None])
    total = tl.maximum(tl.sum(numerator, 1), 1e-30)
    tl.store(probs + place, numerator / total[:, None], inside)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(values, 1)
        tl.store(experts + row * TOP_K + k, best.to(tl.int64), row < tokens)
        values = tl.where(expert[None, :] == best[:, None], -float("inf"), values)


@triton.jit
def _count(experts, counts, n, n_experts, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(experts + place, place < n, -1)
    expert = tl.arange(0, WIDTH)
    hits = (chosen[:, None] == expert[None, :]).to(tl.int32)
    to = counts + tl.program_id(0) * n_experts + expert
    tl.store(to, tl.sum(hits, 0), expert < n_experts)


@triton.jit
def _sort(experts, starts, order, n, n_experts, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(experts + place, place < n, -1)
    expert = tl.arange(0, WIDTH)
    hits = (chosen[:, None] == expert[None, :]).to(tl.int32)
    earlier = tl.cumsum(hits, 0) - hits
    start = tl.load(starts + tl.program_id(0) * n_experts + expert, expert < n_experts, 0)
    to = tl.sum((earlier + start[None, :]) * hits, 1)
    tl.store(order + to, place.to(tl.int64), place < n)


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the naive one. Among equal logits the lowest expert is chosen."""
    tokens, n_experts = logits.shape
    probs = logits.new_empty(logits.shape, dtype=torch.float32)
    experts = logits.new_empty(tokens, top_k, dtype=torch.int64)
    width = triton.next_power_of_2(n_experts)
    rows = max(1, 2048 // width)
    if tokens:
        _softmax_topk[(triton.cdiv(tokens, rows),)](
            logits.contiguous(), probs, experts, tokens, n_experts, top_k, rows, width
        )
    return probs, experts, *sort_by_expert(experts.flatten(), n_experts)


def sort_by_expert(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """counts (n_experts,) and the stable order (n,) of experts (n,) int64: a counting sort.

    Each block of assignments counts its own; a running sum over blocks within experts says where
    each block writes. No atomics, so the order is stable and runs repeat exactly.
    """
    experts = experts.contiguous()
    n, width = len(experts), triton.next_power_of_2(n_experts)
    order = torch.empty_like(experts)
    if n == 0:
        return experts.new_zeros(n_experts), order
    block = max(16, min(256, 8192 // width))
    blocks = triton.cdiv(n, block)
    counts = torch.empty(blocks, n_experts, dtype=torch.int32, device=experts.device)
    _count[(blocks,)](experts, counts, n, n_experts, block, width)
    by_expert = counts.t().flatten()
    starts = (by_expert.cumsum(0) - by_expert).view(n_experts, blocks).t().to(torch.int32)
    _sort[(blocks,)](experts, starts.contiguous(), order, n, n_experts, block, width)
    return counts.sum(0), order
