"""Feed-forward experts over the tokens sent to them, weighted and summed by token.

On CUDA it is a gather, two calls of `grouped_linear` and `merge_tokens`. On CPU groups are taken
in chunks, one large group or several small ones, and a chunk is finished before the next is begun:
what lies between its products stays in the cache, copies of tokens never exist all at once, and
many small groups still share what is not a matrix product.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lablib.kernels.autocast import cast, same_dtype
from lablib.kernels.derivatives import by_definition, forward_mode
from lablib.kernels.grouped_linear import bounds, grouped_linear, zero_empty
from lablib.kernels.memory import empty
from lablib.kernels.moe_mlp import naive
from lablib.kernels.select_tokens import merge_tokens

ACTIVATIONS = ("relu", "swiglu")
CHUNK = 2**18  # numbers between the two products, 1 MiB: about what a core's cache holds


def moe_mlp(
    x: Tensor,
    token: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    counts: Tensor,
    activation: str = "swiglu",
) -> Tensor:
    """Each token's sum over its rows r of weight[r] * down[g] @ activation(up[g] @ x[token[r]]).

    x: (tokens, dim); token: (rows,) int64, sorted by r's group g, repeats allowed; weight: (rows,);
    up: (groups, hidden, dim); down: (groups, dim, width); counts: (groups,) int64, sum rows.
    hidden is width for "relu", and 2 width for "swiglu": silu(first half) * second half.
    Returns (tokens, dim), zero for tokens without rows; differentiable in x, weight, up and down.
    Follows autocast.
    Raises ValueError for another activation or shapes that don't fit, TypeError for mixed dtypes.
    """
    _check(x, token, weight, up, down, activation)
    if x.is_cuda or torch.compiler.is_compiling():
        hidden = grouped_linear(x.index_select(0, token), up, counts)
        hidden = F.relu(hidden) if activation == "relu" else hidden
        rows = grouped_linear(_activate(hidden, activation), down, counts)
        return merge_tokens(rows.new_zeros(x.shape), rows, token, weight)
    x, up, down = cast(x, up, down)
    same_dtype("moe_mlp", x=x, up=up, down=down)
    one = naive.moe_mlp if forward_mode() else _PerChunk.apply
    return one(x, token, weight.to(x.dtype), up, down, counts, activation)


def _check(x, token, weight, up, down, activation) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    if token.shape != weight.shape or token.ndim != 1:
        raise ValueError(f"token {tuple(token.shape)} and weight {tuple(weight.shape)} differ")
    if x.ndim != 2 or up.ndim != 3 or x.shape[1] != up.shape[2]:
        raise ValueError(f"x {tuple(x.shape)} and up {tuple(up.shape)} do not fit")
    width = up.shape[1] // 2 if activation == "swiglu" else up.shape[1]
    if down.shape != (up.shape[0], up.shape[2], width):
        raise ValueError(
            f"down {tuple(down.shape)} does not fit up {tuple(up.shape)} and {activation}: "
            f"it should be {(up.shape[0], up.shape[2], width)}"
        )


def _activate(hidden: Tensor, activation: str) -> Tensor:
    """(rows, hidden) -> (rows, width). For "relu", hidden went through it in place already."""
    if activation == "relu":
        return hidden
    gate, linear = hidden.chunk(2, -1)
    return F.silu(gate) * linear


def _through_activation(grad: Tensor, hidden: Tensor, activation: str) -> Tensor:
    """d loss / d hidden from d loss / d _activate(hidden), which is overwritten."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward.grad_input(grad, hidden, 0, grad_input=grad)
    gate, linear = hidden.chunk(2, -1)
    out = torch.empty_like(hidden)
    by_gate, by_linear = out.chunk(2, -1)
    torch.mul(grad, F.silu(gate), out=by_linear)
    by_gate.copy_(torch.ops.aten.silu_backward(grad.mul_(linear), gate))
    return out


class _Chunk(NamedTuple):
    """Consecutive groups: their rows start to end, their numbers, and how many rows each has."""

    start: int
    end: int
    groups: list[int]
    sizes: list[int]

    def multiply(self, left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        """out[rows of g] = left[rows of g] @ right[g], g by g."""
        for group, part, into in zip(self.groups, left.split(self.sizes), out.split(self.sizes)):
            torch.mm(part, right[group], out=into)
        return out

    def outer(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """out[g] = left[rows of g]^T @ right[rows of g], g by g."""
        for group, a, b in zip(self.groups, left.split(self.sizes), right.split(self.sizes)):
            torch.mm(a.t(), b, out=out[group])


def _chunks(groups: list[tuple[int, int, int]], hidden: int) -> Iterator[_Chunk]:
    """Groups (number, start, end) in chunks of at most CHUNK // hidden rows, or of one group."""
    taken: list[tuple[int, int, int]] = []
    for group in [*groups, None]:
        if taken and (group is None or (group[2] - taken[0][1]) * hidden > CHUNK):
            numbers, sizes = [g for g, _, _ in taken], [end - start for _, start, end in taken]
            yield _Chunk(taken[0][1], taken[-1][2], numbers, sizes)
            taken = []
        taken.append(group)


class _PerChunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token, weight, up, down, counts, activation):
        ctx.groups, ctx.activation = bounds(len(token), counts), activation
        keep = any(ctx.needs_input_grad)
        hidden = empty(x, len(token), up.shape[1]) if keep else None
        rows = empty(x, len(token), x.shape[1]) if keep else None
        up_t, down_t = up.transpose(1, 2), down.transpose(1, 2)
        out = empty(x, *x.shape).zero_()
        for chunk in _chunks(ctx.groups, up.shape[1]):
            part = slice(chunk.start, chunk.end)
            taken, n = x.index_select(0, token[part]), chunk.end - chunk.start
            inner = hidden[part] if keep else x.new_empty(n, up.shape[1])
            chunk.multiply(taken, up_t, inner)
            if activation == "relu":
                inner.relu_()
            row = rows[part] if keep else taken  # read already, so free to be written
            chunk.multiply(_activate(inner, activation), down_t, row)
            out.index_add_(0, token[part], row * weight[part, None])
        ctx.save_for_backward(x, token, weight, up, down, counts, hidden, rows)
        return out

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled() or forward_mode():
            return _by_definition(ctx, grad)
        x, token, weight, up, down, _, hidden, rows = ctx.saved_tensors
        needs_x, _, needs_weight, needs_up, needs_down, *_ = ctx.needs_input_grad
        by_x = empty(x, *x.shape).zero_() if needs_x else None
        by_weight = torch.empty_like(weight) if needs_weight else None
        by_up = empty(up, *up.shape) if needs_up else None
        by_down = empty(down, *down.shape) if needs_down else None
        for gradient in (by_up, by_down):
            if gradient is not None:
                zero_empty(gradient, ctx.groups)
        for chunk in _chunks(ctx.groups, up.shape[1]):
            part = slice(chunk.start, chunk.end)
            place, inner = token[part], hidden[part]
            by_row = grad.index_select(0, place)
            if needs_weight:
                torch.sum(rows[part] * by_row, 1, out=by_weight[part])
            by_row.mul_(weight[part, None])
            if needs_down:
                chunk.outer(by_row, _activate(inner, ctx.activation), by_down)
            by_active = by_row.new_empty(len(place), down.shape[2])
            chunk.multiply(by_row, down, by_active)
            by_inner = _through_activation(by_active, inner, ctx.activation)
            if needs_up:
                chunk.outer(by_inner, x.index_select(0, place), by_up)
            if needs_x:
                by_x.index_add_(0, place, chunk.multiply(by_inner, up, by_row))
        return by_x, None, by_weight, by_up, by_down, None, None


def _by_definition(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """What `_PerChunk.backward` returns, differentiable in its turn."""
    x, token, weight, up, down, counts, *_ = ctx.saved_tensors
    needs_x, _, *needed, _, _ = ctx.needs_input_grad
    by_x, *others = by_definition(
        lambda x, *matrices: naive.moe_mlp(x, token, *matrices, counts, ctx.activation),
        (x, weight, up, down), (needs_x, *needed), grad,
    )  # fmt: skip
    return by_x, None, *others, None, None
