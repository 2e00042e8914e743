"""Compact the rows that a mask keeps, and add results back where they came from.

What is skipped then costs nothing: token skipping, early exit, experts at capacity.
"""

import torch
from torch import Tensor

from lablib.kernels.autocast import same_dtype
from lablib.kernels.derivatives import forward_mode
from lablib.kernels.select_tokens import naive


def select_tokens(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of x where mask holds, in order, and where they stand.

    x: (..., d); mask: (...) bool, x's leading axes.
    Returns rows (kept, d), differentiable in x, and index (kept,) int64 into the leading axes
    flattened. Raises ValueError when the shapes disagree, TypeError for a mask that isn't bool.
    """
    if mask.dtype != torch.bool:
        raise TypeError(f"mask is {mask.dtype}: select_tokens keeps where a bool mask is true")
    if x.shape[:-1] != mask.shape:
        raise ValueError(f"mask {tuple(mask.shape)} for x {tuple(x.shape)}: leading axes differ")
    select = naive.select_tokens if forward_mode() else _select
    return select(x.reshape(-1, x.shape[-1]), mask.reshape(-1))


def merge_tokens(x: Tensor, rows: Tensor, index: Tensor, weight: Tensor | None = None) -> Tensor:
    """x with weight * rows added at index; all other rows pass unchanged.

    x: (..., d); rows: (kept, d); index: (kept,) int64 into x's leading axes flattened, as
    `select_tokens` gives it; weight: (kept,), 1 without it. A repeated index adds up.
    Returns a new tensor of x's shape, differentiable in x, rows and weight.
    Raises ValueError when the shapes disagree, TypeError when the dtypes do.
    """
    if rows.shape != (*index.shape, x.shape[-1]):
        raise ValueError(
            f"rows {tuple(rows.shape)} and index {tuple(index.shape)} do not fit x {tuple(x.shape)}"
        )
    if weight is not None and weight.shape != index.shape:
        raise ValueError(f"{tuple(weight.shape)} weights for {len(index)} rows")
    same_dtype("merge_tokens", x=x, rows=rows)
    if weight is not None:
        weight = weight.to(x.dtype)
    merge = naive.merge_tokens if forward_mode() else _merge
    return merge(x.reshape(-1, x.shape[-1]), rows, index, weight).view(x.shape)


@torch.library.custom_op("lablib::select_tokens", mutates_args=(), device_types="cpu")
def _select(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    index = mask.nonzero().squeeze(1)
    return x.index_select(0, index), index


@_select.register_kernel("cuda")
def _(x, mask):
    from lablib.kernels.select_tokens.triton import select_tokens

    return select_tokens(x, mask)


@_select.register_fake
def _(x, mask):
    kept = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(kept, x.shape[1]), mask.new_empty(kept, dtype=torch.int64)


def _keep_index(ctx, inputs, output):
    ctx.save_for_backward(output[1])
    ctx.tokens = len(inputs[0])


def _scatter(ctx, grad, _):
    (index,) = ctx.saved_tensors
    return grad.new_zeros(ctx.tokens, grad.shape[1]).index_add_(0, index, grad), None


_select.register_autograd(_scatter, setup_context=_keep_index)


@torch.library.custom_op("lablib::merge_tokens", mutates_args=(), device_types="cpu")
def _merge(x: Tensor, rows: Tensor, index: Tensor, weight: Tensor | None) -> Tensor:
    if weight is not None:
        rows = rows * weight[:, None]
    return x.clone(memory_format=torch.contiguous_format).index_add_(0, index, rows)


@_merge.register_kernel("cuda")
def _(x, rows, index, weight):
    from lablib.kernels.select_tokens.triton import merge_tokens

    return merge_tokens(x, rows, index, weight)


@_merge.register_fake
def _(x, rows, index, weight):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_rows(ctx, inputs, output):
    _, rows, index, weight = inputs
    ctx.save_for_backward(index, weight, rows if weight is not None else None)


def _gather(ctx, grad):
    index, weight, rows = ctx.saved_tensors
    _, need_rows, _, need_weight = ctx.needs_input_grad[:4]
    taken = grad.index_select(0, index) if need_rows or need_weight else None
    by_weight = (taken * rows).sum(1) if need_weight else None
    by_row = taken * weight[:, None] if need_rows and weight is not None else taken
    return grad, by_row, None, by_weight


_merge.register_autograd(_gather, setup_context=_keep_rows)
