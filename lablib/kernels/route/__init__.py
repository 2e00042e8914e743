"""Send tokens to experts: softmax, top-k, and the permutation that sorts tokens by expert."""

from typing import NamedTuple

import torch
from torch import Tensor

from lablib.kernels.derivatives import forward_mode
from lablib.kernels.route import naive


class Routing(NamedTuple):
    """Where each token goes. Assignment a = token * top_k + choice.

    probs: (tokens, n_experts) float32, each row's softmax; differentiable.
    weights: (tokens, top_k) float32, what each choice's result is multiplied with; differentiable.
    experts: (tokens, top_k) int64, best first.
    counts: (n_experts,) int64, assignments of each expert.
    order: (tokens * top_k,) int64, assignments sorted by expert, tokens in order within each.
    """

    probs: Tensor
    weights: Tensor
    experts: Tensor
    counts: Tensor
    order: Tensor


def route(logits: Tensor, top_k: int, softmax: str = "before") -> Routing:
    """Choose each token's top_k experts by its router logits.

    logits: (tokens, n_experts); the softmax is computed in float32.
    softmax: "before" the selection - weights are the chosen probabilities, as in Switch and
        OLMoE - or "after" it, over the chosen logits alone, so that weights sum to 1 (Mixtral).
    Among equal logits it is not defined which is chosen.
    Raises ValueError for another softmax, logits of another rank, or a top_k out of range.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits are (tokens, n_experts), not {tuple(logits.shape)}")
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k {top_k} of {logits.shape[1]} experts")
    if softmax not in ("before", "after"):
        raise ValueError(f"softmax {softmax!r} is neither 'before' nor 'after' the selection")
    one = naive.route if forward_mode() else _route
    probs, experts, counts, order = one(logits, top_k)
    if softmax == "before":
        weights = probs.gather(1, experts)
    else:
        weights = logits.float().gather(1, experts).softmax(-1)
    return Routing(probs, weights, experts, counts, order)


@torch.library.custom_op("lablib::route", mutates_args=(), device_types="cpu")
def _route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    probs = torch.softmax(logits, -1, dtype=torch.float32)
    experts = probs.argmax(1, keepdim=True) if top_k == 1 else probs.topk(top_k).indices
    flat = experts.flatten()
    # PyTorch sorts short integers by radix, three times as fast as int64.
    narrow = flat.to(torch.int16) if logits.shape[1] < 2**15 else flat
    counts = flat.bincount(minlength=logits.shape[1])
    return probs, experts, counts, narrow.argsort(stable=True)


@_route.register_kernel("cuda")
def _(logits, top_k):
    from lablib.kernels.route.triton import route

    return route(logits, top_k)


@_route.register_fake
def _(logits, top_k):
    tokens, n_experts = logits.shape
    ints = {"dtype": torch.int64}
    return (
        logits.new_empty(tokens, n_experts, dtype=torch.float32),
        logits.new_empty(tokens, top_k, **ints),
        logits.new_empty(n_experts, **ints),
        logits.new_empty(tokens * top_k, **ints),
    )


def _keep_probs(ctx, inputs, output):
    ctx.save_for_backward(output[0])
    ctx.dtype = inputs[0].dtype


def _softmax_gradient(ctx, grad, *_):
    (probs,) = ctx.saved_tensors
    weighted = grad * probs
    return (weighted - probs * weighted.sum(-1, keepdim=True)).to(ctx.dtype), None


_route.register_autograd(_softmax_gradient, setup_context=_keep_probs)
