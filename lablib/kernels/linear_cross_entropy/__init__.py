"""The loss of a language model's head without holding the logits of all tokens.

Logits are made for a chunk of tokens at a time and turned into their own gradient in place, so
the gradients of hidden and weight are ready when the loss is: three matrix products, as
logits-then-loss needs, and one chunk of memory. The approach of Cut Cross-Entropy (Wijmans et
al., 2024) and Liger Kernel (Hsu et al., 2024), of whom the latter chunks as we do.
"""

import math

import torch
from torch import Tensor

from lablib.kernels.autocast import cast, same_dtype
from lablib.kernels.derivatives import by_definition, forward_mode
from lablib.kernels.linear_cross_entropy import naive

CHUNK = 2**25  # logits held at once: 128 MiB in float32
HALF_PEAK = 64.0  # float16 gradients of logits are scaled to at most this, against underflow


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of hidden @ weight^T against target, in nats.

    hidden: (..., d); weight: (vocab, d), as nn.Linear's and nn.Embedding's; target: (...) int64,
    hidden's leading axes; those that equal ignore_index do not count.
    Returns a float32 scalar, the "mean" or "sum" over what counts (the mean of nothing is nan, as
    in PyTorch), differentiable in hidden and weight. Gradients that will be differentiated again
    (create_graph=True) and forward-mode ones hold all logits at once.
    Raises ValueError when shapes or targets (on CPU) do not fit or for another reduction,
    TypeError when dtypes differ.
    """
    if hidden.shape[:-1] != target.shape or weight.shape[1:] != hidden.shape[-1:]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and target "
            f"{tuple(target.shape)} are not (..., d), (vocab, d) and (...)"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction {reduction!r} is neither 'mean' nor 'sum'")
    hidden, weight = cast(hidden, weight)
    same_dtype("linear_cross_entropy", hidden=hidden, weight=weight)
    flat, labels = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1)
    mean = reduction == "mean"
    if forward_mode():
        return naive.linear_cross_entropy(flat, weight, labels, ignore_index, mean)
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    return _loss(flat, weight, labels, ignore_index, mean, *wanted)[0]


def _rows(logits: Tensor, target: Tensor, scale: float, ignore: int, gradient: bool) -> Tensor:
    """Losses (chunk,); with gradient, logits (chunk, vocab) become scale * their gradient."""
    kept = target != ignore
    safe = target.where(kept, 0)[:, None]
    values = logits if logits.dtype == torch.float32 else logits.float()
    chosen = values.gather(1, safe)
    normalizer = values.logsumexp(1, keepdim=True)
    if gradient:
        values = values.sub_(normalizer).exp_() if values is logits else (values - normalizer).exp()
        values.scatter_add_(1, safe, values.new_full(safe.shape, -1.0))
        torch.mul(values, (kept * scale)[:, None], out=values)
        if values is not logits:
            logits.copy_(values)
    return ((normalizer - chosen).squeeze(1)).where(kept, 0.0)


def _check(target: Tensor, vocab: int, ignore: int) -> None:
    outside = ((target < 0) | (target >= vocab)) & (target != ignore)
    if outside.any():
        raise ValueError(
            f"target {int(target[outside][0])} is outside the vocabulary of {vocab} "
            f"and is not ignore_index {ignore}"
        )


def _chunks(hidden, weight, target, ignore_index, mean, want_hidden, want_weight, rows):
    """(loss, gradient of hidden, gradient of weight), float32; a gradient not wanted is empty."""
    kept = (target != ignore_index).sum()
    share = 1.0 / max(int(kept), 1) if mean else 1.0
    half = hidden.dtype == torch.float16
    size = max(1, (2 if hidden.is_cuda else 1) * CHUNK // max(1, weight.shape[0]))
    scale = share * _power_of_two(HALF_PEAK / share) if half else share
    shrink = _shrink(hidden, min(size, len(target)) * scale) if half and want_weight else 1.0
    total = hidden.new_zeros((), dtype=torch.float32)
    by_hidden = hidden.new_empty(hidden.shape if want_hidden else 0, dtype=torch.float32)
    by_weight = weight.new_zeros(weight.shape if want_weight else 0, dtype=torch.float32)
    for start in range(0, len(target), size):
        part = slice(start, start + size)
        logits = hidden[part] @ weight.t()
        gradient = want_hidden or want_weight
        total += rows(logits, target[part], scale, ignore_index, gradient).sum()
        if want_hidden:
            _put_product(by_hidden[part], logits, weight)
        if want_weight:
            _add_product(by_weight, logits, hidden[part] * shrink if half else hidden[part])
    if half:
        by_hidden *= share / scale
        by_weight *= share / (scale * shrink)
    return (total / kept if mean else total), by_hidden, by_weight


def _shrink(hidden: Tensor, most: float) -> float:
    """What to multiply hidden with before sums of up to most * its largest entry.

    The sums then stay within float16, whose largest number is just below 2^16.
    """
    peak = float(hidden.abs().amax()) if hidden.numel() else 0.0
    if not 0.0 < peak < math.inf:
        return 1.0
    return _power_of_two(2.0**15 / (most * peak))


def _power_of_two(most: float) -> float:
    """The largest power of two that is at most `most`: a factor that rounds nothing."""
    return 2.0 ** math.floor(math.log2(most))


def _put_product(to: Tensor, left: Tensor, right: Tensor) -> None:
    """to = left @ right, where to may be wider."""
    if to.dtype == left.dtype:
        torch.mm(left, right, out=to)
    elif left.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out"):  # since torch 2.8
        torch.ops.aten.mm.dtype_out(left, right, to.dtype, out=to)
    else:
        to.copy_(left @ right)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, summed in float32 over the chunks whatever their dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    elif left.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):  # since torch 2.8
        torch.ops.aten.addmm.dtype_out(total, left.t(), right, total.dtype, out=total)
    else:
        total += left.t() @ right


@torch.library.custom_op("lablib::linear_cross_entropy", mutates_args=(), device_types="cpu")
def _loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    mean: bool,
    want_hidden: bool,
    want_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(target, len(weight), ignore_index)
    return _chunks(hidden, weight, target, ignore_index, mean, want_hidden, want_weight, rows=_rows)


@_loss.register_kernel("cuda")
def _(hidden, weight, target, ignore_index, mean, want_hidden, want_weight):
    from lablib.kernels.linear_cross_entropy.triton import rows

    return _chunks(hidden, weight, target, ignore_index, mean, want_hidden, want_weight, rows=rows)


@_loss.register_fake
def _(hidden, weight, target, ignore_index, mean, want_hidden, want_weight):
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape if want_hidden else 0, dtype=torch.float32),
        weight.new_empty(weight.shape if want_weight else 0, dtype=torch.float32),
    )


def _keep(ctx, inputs, output):
    hidden, weight, target, ctx.ignore_index, ctx.mean, *ctx.wanted = inputs
    ctx.save_for_backward(hidden, weight, target, *output[1:])


def _gradients(ctx, grad, *_):
    hidden, weight, target, *ready = ctx.saved_tensors
    if torch.is_grad_enabled():
        both = by_definition(
            lambda h, w: naive.linear_cross_entropy(h, w, target, ctx.ignore_index, ctx.mean),
            (hidden, weight), ctx.wanted, grad,
        )  # fmt: skip
    else:  # in float32 until the loss scale, which grad is under half precision, has been applied
        both = [
            (gradient * grad).to(hidden.dtype) if wanted else None
            for gradient, wanted in zip(ready, ctx.wanted, strict=True)
        ]
    return *both, None, None, None, None, None


_loss.register_autograd(_gradients, setup_context=_keep)
