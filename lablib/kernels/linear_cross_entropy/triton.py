"""The loss of a chunk of logits and its gradient, written over the logits, on CUDA."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rows(
    logits, target, losses, vocab, scale, ignore, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(target + row)
    first = logits + row * vocab
    # One pass for the maximum and the sum of exponentials, rescaled as the maximum grows.
    peak = tl.full((), -float("inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        values = tl.load(first + column, column < vocab, -float("inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(values, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(values - higher), 0)
        peak = higher
    normalizer = peak + tl.log(total)
    kept = wanted != ignore
    chosen = tl.load(first + wanted, kept, 0.0).to(tl.float32)
    tl.store(losses + row, tl.where(kept, normalizer - chosen, 0.0))
    if GRADIENT:
        factor = tl.where(kept, scale, 0.0)
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            values = tl.load(first + column, column < vocab, -float("inf")).to(tl.float32)
            slope = tl.exp(values - normalizer) - (column == wanted).to(tl.float32)
            tl.store(first + column, (slope * factor).to(logits.dtype.element_ty), column < vocab)


def rows(logits: Tensor, target: Tensor, scale: float, ignore_index: int, gradient: bool) -> Tensor:
    """Losses (chunk,) float32; with gradient, logits (chunk, vocab) become scale * d loss."""
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    block = min(4096, triton.next_power_of_2(logits.shape[1]))
    if len(logits):
        _rows[(len(logits),)](
            logits, target.contiguous(), losses, logits.shape[1], scale, ignore_index, gradient,
            block,
        )  # fmt: skip
    return losses
