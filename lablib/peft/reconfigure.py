"""FAR, freeze and reconfigure (Vucetic et al., 2022): the feed-forward rows that learn, train on.

A node of a feed-forward projection is a row of its weight. A short run of full tuning, priming,
shows how much each learns, sum_j |W_ij after - W_ij before|. Those that learn most are learners:
    y = [W_l x + b_l; W_f x + b_f], put back in order,
where learners' rows W_l, b_l train and the others' W_f, b_f don't, so that gradients and states of
the optimizer are of learners' rows alone. Here the base stays whole, and what trains is a change:
    y = W x + b, and in learners' places + D_l x + c_l.
The paper itself was not at hand; metric and layout are as others' summaries of it give them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.modes import kept_requires_grad
from lablib.peft.adapter import Adapter, WeightAdapter, matrix, method

FEED_FORWARD = ("gate", "up", "down")


class LearnerLinear(WeightAdapter):
    """A projection of which k rows train, with their biases where it has any. Starts as `base`.

    places: (k,) int64, which rows; a buffer, so that the saved file has them. The first k until
        others are put there, as `far_` does.
    """

    def __init__(self, base: nn.Module, k: int):
        super().__init__(base)
        n_out, n_in = matrix(base).shape
        if not 0 < k <= n_out:
            raise ValueError(f"{k} rows of {n_out} can't be chosen")
        self.rows = nn.Parameter(base.weight.new_zeros(k, n_in))  # D_l
        has_bias = _bias(base) is not None
        self.shift = nn.Parameter(base.weight.new_zeros(k)) if has_bias else None  # c_l
        self.register_buffer("places", torch.arange(k, device=base.weight.device))
        self.original_bias: Tensor | None = None  # while merged

    def delta(self) -> Tensor:
        """(out, in): D_l in learners' rows, else 0. The bias changes beside it."""
        return self.rows.new_zeros(matrix(self.base).shape).index_copy(0, self.places, self.rows)

    def changed(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        learned = F.linear(x, self.rows, self.shift)  # in -> k
        return self.base(x).index_add(-1, self.places, learned)

    @torch.no_grad()
    def merge(self) -> None:
        """Write the change into the base's weight and bias; their own bits are kept beside them."""
        if not self.merged and self.shift is not None:
            bias = _bias(self.base)
            self.original_bias = bias.detach().clone()
            bias.index_add_(0, self.places, self.shift)
        super().merge()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base's own bits back."""
        super().unmerge()
        if self.original_bias is not None:
            _bias(self.base).copy_(self.original_bias)
            self.original_bias = None


def _bias(layer: nn.Module) -> Tensor | None:
    """The projection's bias, below the adapters on it."""
    while not hasattr(layer, "bias") and isinstance(layer, Adapter):
        layer = layer.base
    return getattr(layer, "bias", None)


def feed_forward(model: nn.Module) -> dict[str, nn.Module]:
    """Full dotted name -> projection, of all feed-forward layers."""
    known = anatomy.family(model).projections
    return anatomy.projections(model, *(role for role in FEED_FORWARD if role in known))


def learned(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> (out,): how much each row changed, the sum of |after - before| over it.

    before, after: name -> (out, in), as `sparse.matrices` returns them, ahead of priming and after
    it, a tenth of the training's steps. Source: the paper's learning metric.
    """
    return {name: (after[name] - weight).abs().sum(1) for name, weight in before.items()}


def at_once(
    model: nn.Module, batch: object, loss: Callable[[nn.Module, object], Tensor]
) -> dict[str, Tensor]:
    """Name -> (out,): as `learned`, of one step of plain descent with rate 1, which isn't made.

    A cheap priming: of all gradients, one is held at a time. The model stays as it was.
    """
    layers, found, hooks = feed_forward(model), {}, []
    with kept_requires_grad(model):
        model.requires_grad_(False)
        for name, layer in layers.items():
            across = int(matrix(layer) is layer.weight)  # GPT-2's are transposed

            def take(weight: Tensor, name: str = name, across: int = across) -> None:
                found[name] = weight.grad.abs().sum(across)
                weight.grad = None

            hooks.append(layer.weight.requires_grad_().register_post_accumulate_grad_hook(take))
        try:
            loss(model, batch).backward()
        finally:
            for hook in hooks:
                hook.remove()
    return {name: found[name] for name in layers}


def learners(amounts: Mapping[str, Tensor], retention: float) -> dict[str, Tensor]:
    """Name -> (k,) int64: the rows of each matrix that learned most, in order.

    amounts: as `learned` returns them. retention: learners' share of each matrix's rows, one at
        least.
    Raises ValueError when it is not above 0, up to 1.
    """
    if not 0 < retention <= 1:
        raise ValueError(f"a retention of {retention} is not above 0, up to 1")
    return {
        name: amount.topk(max(1, round(retention * len(amount)))).indices.sort().values
        for name, amount in amounts.items()
    }


@method
def learn_rows_(model: nn.Module, sizes: Mapping[str, int]) -> None:
    """Put a `LearnerLinear` in the place of each named projection. sizes: full dotted name -> k."""
    for name, k in sizes.items():
        anatomy.replace(model, name, LearnerLinear(model.get_submodule(name), k))


def far_(model: nn.Module, retention: float, amounts: Mapping[str, Tensor]) -> None:
    """Train the rows that learned most, and freeze the rest.

    retention, amounts: as in `learners`. The model is the one before priming: rewind it.
    """
    places = learners(amounts, retention)
    learn_rows_(model, {name: len(at) for name, at in places.items()})
    for name, at in places.items():
        model.get_submodule(name).places.copy_(at)
