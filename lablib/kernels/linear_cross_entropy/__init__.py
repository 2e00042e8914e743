"""The loss of a language model's head without holding the logits of all tokens.

Logits are made for a chunk of tokens at a time and turned into their own gradient in place, so
the gradients of hidden and weight are ready when the loss is: three matrix products, as
logits-then-loss needs, and one chunk of memory. The approach of Cut Cross-Entropy (Wijmans et
al., 2024) and Liger Kernel (Hsu et al., 2024), of whom the latter chunks as we do.
"""

import torch
from torch import Tensor

from lablib.kernels.autocast import cast, same_dtype

CHUNK = 2**25  # logits held at once: 128 MiB in float32


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
    in PyTorch), once differentiable in hidden and weight.
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
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden, weight)]
    flat = hidden.reshape(-1, hidden.shape[-1])
    mean = reduction == "mean"
    return _loss(flat, weight, target.reshape(-1), ignore_index, mean, *wanted)[0]


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
    """(loss, gradient of hidden, gradient of weight); a gradient not wanted is empty."""
    kept = (target != ignore_index).sum()
    scale = 1.0 / max(int(kept), 1) if mean else 1.0
    gradient = want_hidden or want_weight
    total = hidden.new_zeros((), dtype=torch.float32)
    by_hidden = torch.empty_like(hidden) if want_hidden else hidden.new_empty(0)
    shape = weight.shape if want_weight else (0,)
    by_weight = weight.new_zeros(shape, dtype=torch.float32)
    size = max(1, CHUNK // max(1, weight.shape[0]))
    for start in range(0, len(target), size):
        part = slice(start, start + size)
        logits = hidden[part] @ weight.t()
        total += rows(logits, target[part], scale, ignore_index, gradient).sum()
        if want_hidden:
            torch.mm(logits, weight, out=by_hidden[part])
        if want_weight:
            _add_product(by_weight, logits, hidden[part])
    return (total / kept if mean else total), by_hidden, by_weight.to(weight.dtype)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right, summed in float32 over the chunks whatever their dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
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
        torch.empty_like(hidden) if want_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if want_weight else weight.new_empty(0),
    )


def _keep(ctx, inputs, output):
    ctx.save_for_backward(output[1], output[2])
    ctx.wanted = inputs[5:]


def _scale(ctx, grad, *_):
    both = [
        (g * grad).to(g.dtype) if wanted else None
        for g, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    return *both, None, None, None, None, None


_loss.register_autograd(_scale, setup_context=_keep)
