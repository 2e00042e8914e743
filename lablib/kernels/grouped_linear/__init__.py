"""One matrix product a group over rows sorted by group: the experts of a mixture in one call."""

import torch
from torch import Tensor

from lablib.kernels.autocast import cast, same_dtype
from lablib.kernels.derivatives import forward_mode
from lablib.kernels.grouped_linear import naive
from lablib.kernels.memory import empty


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply the first counts[0] rows by weight[0]^T, the next counts[1] by weight[1]^T, ...

    x: (rows, d_in); weight: (groups, d_out, d_in); counts: (groups,) int64 that sum to rows,
    each 0 or more. Returns (rows, d_out), differentiable in x and weight; an empty group's
    gradient is zero. Follows autocast as nn.Linear does.
    Raises ValueError when shapes or (on CPU) counts do not fit, TypeError when dtypes differ.
    """
    if x.ndim != 2 or weight.ndim != 3 or x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} are not (rows, d_in) and "
            "(groups, d_out, d_in)"
        )
    if counts.shape != weight.shape[:1] or counts.dtype != torch.int64:
        raise ValueError(
            f"counts {tuple(counts.shape)} {counts.dtype} are not ({len(weight)},) int64"
        )
    x, weight = cast(x, weight)
    same_dtype("grouped_linear", x=x, weight=weight)
    return _multiply(x, weight, counts)


def bounds(rows: int, counts: Tensor) -> list[tuple[int, int, int]]:
    """(group, first row, end row) of the groups that have rows.

    Raises ValueError for a negative count, or counts that don't sum to rows.
    """
    found, start = [], 0
    for group, count in enumerate(counts.tolist()):
        if count < 0:
            raise ValueError(f"group {group} has {count} rows")
        if count:
            found.append((group, start, start + count))
        start += count
    if start != rows:
        raise ValueError(f"counts sum to {start}, but x has {rows} rows")
    return found


def zero_empty(matrices: Tensor, groups: list[tuple[int, int, int]]) -> None:
    """Zero the matrices (n_groups, ...) of groups without rows; the others will be overwritten."""
    with_rows = {group for group, _, _ in groups}
    for group in range(len(matrices)):
        if group not in with_rows:
            matrices[group].zero_()


@torch.library.custom_op("lablib::grouped_linear", mutates_args=(), device_types="cpu")
def _product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    out = empty(x, len(x), weight.shape[1])
    for group, start, end in bounds(len(x), counts):
        torch.mm(x[start:end], weight[group].t(), out=out[start:end])
    return out


@torch.library.custom_op("lablib::grouped_outer", mutates_args=(), device_types="cpu")
def _outer(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    out = empty(x, len(counts), grad.shape[1], x.shape[1])
    groups = bounds(len(x), counts)
    zero_empty(out, groups)
    for group, start, end in groups:
        torch.mm(grad[start:end].t(), x[start:end], out=out[group])
    return out


@_product.register_kernel("cuda")
def _(x, weight, counts):
    from lablib.kernels.grouped_linear.triton import product

    return product(x, weight, counts)


@_outer.register_kernel("cuda")
def _(grad, x, counts):
    from lablib.kernels.grouped_linear.triton import outer

    return outer(grad, x, counts)


@_product.register_fake
def _(x, weight, counts):
    return x.new_empty(x.shape[0], weight.shape[1])


@_outer.register_fake
def _(grad, x, counts):
    return x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])


def _multiply(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return (naive.grouped_linear if forward_mode() else _product)(x, weight, counts)


def _multiply_outer(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return (naive.grouped_outer if forward_mode() else _outer)(grad, x, counts)


def _keep(ctx, inputs, output):
    x, weight, counts = inputs
    need_x, need_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if need_weight else None, weight if need_x else None, counts)


def _gradients(ctx, grad):
    x, weight, counts = ctx.saved_tensors
    grad = grad.contiguous()
    by_x = None if weight is None else _multiply(grad, weight.transpose(1, 2), counts)
    by_weight = None if x is None else _multiply_outer(grad, x, counts)
    return by_x, by_weight, None


_product.register_autograd(_gradients, setup_context=_keep)


def _keep_outer(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients_of_outer(ctx, grad):
    left, right, counts = ctx.saved_tensors
    by_left = _multiply(right, grad, counts)
    return by_left, _multiply(left, grad.transpose(1, 2), counts), None


# The weight's gradient is itself differentiable, so that second derivatives are, too.
_outer.register_autograd(_gradients_of_outer, setup_context=_keep_outer)
