"""The feed-forward layers of all experts over rows sorted by expert.

On CUDA it is two calls of `grouped_linear`. On CPU one expert is finished before the next is
begun, forward and backward: what lies between its two products stays in the cache, and no buffer
is so large that the allocator returns it to the system, to be faulted in again page by page.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lablib.kernels.autocast import cast, same_dtype
from lablib.kernels.grouped_linear import bounds, grouped_linear
from lablib.kernels.memory import empty_like

ACTIVATIONS = ("relu", "swiglu")


def grouped_mlp(
    x: Tensor, up: Tensor, down: Tensor, counts: Tensor, activation: str = "swiglu"
) -> Tensor:
    """down[g] @ activation(up[g] @ row) for the counts[g] rows of each group g.

    x: (rows, dim), sorted by group; up: (groups, hidden, dim); down: (groups, dim, width);
    counts: (groups,) int64 that sum to rows. hidden is width for "relu", and 2 width for "swiglu":
    silu(first half) * second half. Returns (rows, dim), differentiable in x, up and down; follows
    autocast. On CPU, outside torch.compile, once differentiable.
    Raises ValueError for another activation or shapes that don't fit, TypeError for mixed dtypes.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
    width = up.shape[1] // 2 if activation == "swiglu" else up.shape[1]
    if down.shape != (up.shape[0], up.shape[2], width):
        raise ValueError(
            f"up {tuple(up.shape)} and down {tuple(down.shape)} do not fit {activation}: "
            f"down should be {(up.shape[0], up.shape[2], width)}"
        )
    if x.is_cuda or torch.compiler.is_compiling():
        hidden = activate(grouped_linear(x, up, counts), activation)
        return grouped_linear(hidden, down, counts)
    if x.ndim != 2 or x.shape[1] != up.shape[2]:
        raise ValueError(f"x {tuple(x.shape)} is not (rows, {up.shape[2]})")
    x, up, down = cast(x, up, down)
    same_dtype("grouped_mlp", x=x, up=up, down=down)
    return _PerGroup.apply(x, up, down, counts, activation)


def activate(hidden: Tensor, activation: str) -> Tensor:
    """(rows, hidden) -> (rows, width)."""
    if activation == "relu":
        return F.relu(hidden)
    gate, linear = hidden.chunk(2, -1)
    return F.silu(gate) * linear


def _activation_gradient(grad: Tensor, hidden: Tensor, activation: str) -> Tensor:
    """d loss / d hidden from d loss / d activate(hidden)."""
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad, hidden, 0)
    gate, linear = hidden.chunk(2, -1)
    open_ = gate.sigmoid()
    swish = gate * open_
    by_gate = grad * linear * (open_ + swish * (1 - open_))
    return torch.cat([by_gate, grad * swish], -1)


class _PerGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, down, counts, activation):
        ctx.groups, ctx.empty = bounds(len(x), counts), counts == 0
        ctx.activation, ctx.hidden = activation, []
        out = empty_like(x)
        for group, start, end in ctx.groups:
            hidden = x[start:end] @ up[group].t()
            if activation == "relu":
                hidden.relu_()
            if any(ctx.needs_input_grad):
                ctx.hidden.append(hidden)
            active = hidden if activation == "relu" else activate(hidden, activation)
            torch.mm(active, down[group].t(), out=out[start:end])
        ctx.save_for_backward(x, up, down)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, up, down = ctx.saved_tensors
        grads = [
            empty_like(t) if needed else None
            for t, needed in zip((x, up, down), ctx.needs_input_grad)
        ]
        by_x, by_up, by_down = grads
        for gradient in (by_up, by_down):
            if gradient is not None:  # groups with rows are overwritten
                gradient[ctx.empty] = 0
        for (group, start, end), hidden in zip(ctx.groups, ctx.hidden, strict=True):
            part = grad[start:end]
            if by_down is not None:
                active = hidden if ctx.activation == "relu" else activate(hidden, ctx.activation)
                torch.mm(part.t(), active, out=by_down[group])
            by_hidden = _activation_gradient(part @ down[group], hidden, ctx.activation)
            if by_up is not None:
                torch.mm(by_hidden.t(), x[start:end], out=by_up[group])
            if by_x is not None:
                torch.mm(by_hidden, up[group], out=by_x[start:end])
        return by_x, by_up, by_down, None, None
