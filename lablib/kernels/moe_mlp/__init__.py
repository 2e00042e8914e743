"""Feed-forward experts over the tokens sent to them, weighted and summed by token.

On CUDA it is a gather, two calls of `grouped_linear` and `merge_tokens`. On CPU one expert is
finished before the next is begun, forward and backward: what lies between its two products stays
in the cache, copies of tokens never exist all at once, and no buffer is so large that the
allocator returns it to the system, to be faulted in again page by page.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lablib.kernels.autocast import cast, same_dtype
from lablib.kernels.grouped_linear import bounds, grouped_linear, zero_empty
from lablib.kernels.memory import empty
from lablib.kernels.select_tokens import merge_tokens

ACTIVATIONS = ("relu", "swiglu")


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
    Returns (tokens, dim), zero for tokens without rows; differentiable in x, weight, up and down,
    once on CPU outside torch.compile. Follows autocast.
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
    return _PerGroup.apply(x, token, weight.to(x.dtype), up, down, counts, activation)


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


class _PerGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, token, weight, up, down, counts, activation):
        ctx.groups, ctx.activation = bounds(len(token), counts), activation
        keep = any(ctx.needs_input_grad)
        hidden = empty(x, len(token), up.shape[1]) if keep else None
        rows = empty(x, len(token), x.shape[1]) if keep else None
        out = empty(x, *x.shape).zero_()
        for group, start, end in ctx.groups:
            part = slice(start, end)
            into, onto = (hidden[part], rows[part]) if keep else (None, None)
            inner = torch.mm(x.index_select(0, token[part]), up[group].t(), out=into)
            if activation == "relu":
                inner.relu_()
            row = torch.mm(_activate(inner, activation), down[group].t(), out=onto)
            out.index_add_(0, token[part], row * weight[part, None])
        ctx.save_for_backward(x, token, weight, up, down, hidden, rows)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, token, weight, up, down, all_hidden, all_rows = ctx.saved_tensors
        needs_x, _, needs_weight, needs_up, needs_down, *_ = ctx.needs_input_grad
        by_x = empty(x, *x.shape).zero_() if needs_x else None
        by_weight = torch.empty_like(weight) if needs_weight else None
        by_up = empty(up, *up.shape) if needs_up else None
        by_down = empty(down, *down.shape) if needs_down else None
        for gradient in (by_up, by_down):
            if gradient is not None:
                zero_empty(gradient, ctx.groups)
        for group, start, end in ctx.groups:
            place, hidden, rows = token[start:end], all_hidden[start:end], all_rows[start:end]
            by_row = grad.index_select(0, place)
            if needs_weight:
                torch.sum(rows * by_row, 1, out=by_weight[start:end])
            by_row.mul_(weight[start:end, None])
            if needs_down:
                active = _activate(hidden, ctx.activation)
                torch.mm(by_row.t(), active, out=by_down[group])
            by_hidden = _through_activation(by_row @ down[group], hidden, ctx.activation)
            if needs_up:
                torch.mm(by_hidden.t(), x.index_select(0, place), out=by_up[group])
            if needs_x:
                by_x.index_add_(0, place, by_hidden @ up[group])
        return by_x, None, by_weight, by_up, by_down, None, None
