"""Derivatives that a fast path does not have come from the op's definition."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on, as within `torch.func.jvp` and `dual_level`.

    An op of torch.library has no rule for it and drops tangents silently, so ours take their
    definition then.
    """
    return forward_ad._current_level >= 0  # as autocast's, its state has no public reader


def by_definition(
    definition: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    needed: Sequence[bool],
    grad: Tensor,
) -> list[Tensor | None]:
    """Gradients of definition(*inputs) at upstream gradient grad, None where not needed.

    They can be differentiated again when grad mode is on, as it is in a backward pass with
    create_graph=True.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, so that an input that was computed from another takes no part of its gradient.
        views = [tensor.view_as(tensor) for tensor in inputs]
        out = definition(*views)
    wanted = [view for view, need in zip(views, needed, strict=True) if need]
    gradients = iter(torch.autograd.grad(out, wanted, grad, create_graph=again))
    return [next(gradients) if need else None for need in needed]
