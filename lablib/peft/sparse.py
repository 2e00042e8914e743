"""Train few of the base's numbers, or all of them through a mask.

Sparse  W + scatter(v at places)      v: the k chosen numbers, a choice of
  FISH    the largest E[(d loss / d W)^2]              (Sung et al., 2021)
  LT-SFT  the largest |W after full tuning - W|        (Ansell et al., 2022)
Diff    W + z * w                     z: hard-concrete gates (Guo et al., 2021)
Masked  W * 1[score > threshold]      (Zhao et al., 2020)
Child   W, whose gradient g becomes   g * mask, which is fixed (D), or g * Bernoulli(p) / p (F)
                                      (Xu et al., 2021)

All are over projections; the papers' sparse methods choose among biases, norms and embeddings too.
Constants are those of the authors' code, except for the masks' sparsity at the start.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.peft.adapter import Adapter, WeightAdapter, adapters, matrix, method, remove_
from lablib.peft.subset import Tuned

Matrices = Mapping[str, Tensor]  # name of a projection -> (out, in)

LOW, HIGH = -1.5, 1.5  # l and r: what a gate is stretched to before it is cut to 0 to 1
OPEN = 5.0  # alpha at the start
EDGE = 1e-4  # of the uniform draws


class SparseLinear(WeightAdapter):
    """A projection of which k numbers train, W + scatter(v at indices). Starts as `base`.

    indices: (k,) int32, different places in the matrix (out, in) read row by row; a buffer, so that
        the saved file has them. The first k until others are put there, as `sparse_at_` does.
    """

    def __init__(self, base: nn.Module, k: int):
        super().__init__(base)
        numbers = matrix(base).numel()
        if not 0 < k <= numbers:
            raise ValueError(f"{k} numbers of a matrix of {numbers} can't be chosen")
        self.values = nn.Parameter(base.weight.new_zeros(k))  # v
        first = torch.arange(k, dtype=torch.int32, device=base.weight.device)
        self.register_buffer("indices", first)

    def delta(self) -> Tensor:
        """(out, in): v at its places, else 0."""
        shape = matrix(self.base).shape
        flat = self.values.new_zeros(shape.numel())
        return flat.scatter(0, self.indices.long(), self.values).view(shape)


@method
def sparse_(model: nn.Module, sizes: Mapping[str, int]) -> None:
    """Put a `SparseLinear` in the place of each named projection.

    sizes: full dotted name -> k, how many of its numbers train.
    """
    for name, k in sizes.items():
        anatomy.replace(model, name, SparseLinear(model.get_submodule(name), k))


def sparse_at_(model: nn.Module, places: Mapping[str, Tensor]) -> None:
    """Train the numbers at these places alone.

    places: name -> (k,), as `largest` returns them; a name that is missing stays frozen.
    """
    sparse_(model, {name: len(at) for name, at in places.items()})
    for name, at in places.items():
        model.get_submodule(name).indices.copy_(at)


def largest(scores: Matrices, share: float) -> dict[str, Tensor]:
    """Name -> places of the largest scores, this share of the numbers of all matrices together.

    Places (k,) int64 are those of a matrix read row by row, in order; a matrix without any is left
    out. Raises ValueError when the share is no number, or more than all.
    """
    flat = torch.cat([score.flatten() for score in scores.values()])
    k = round(share * len(flat))
    if not 0 < k <= len(flat):
        raise ValueError(f"a share of {share} is {k} of {len(flat)} numbers")
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.topk(k).indices] = True
    parts = chosen.split([score.numel() for score in scores.values()])
    named = zip(scores, parts, strict=True)
    return {name: part.nonzero()[:, 0] for name, part in named if part.any()}


# The choice of the largest Fisher information


def fisher(
    model: nn.Module,
    batches: Iterable,
    loss: Callable[[nn.Module, object], Tensor],
    *roles: str,
) -> dict[str, Tensor]:
    """Name -> E[(d loss / d W)^2], (out, in): the mean over batches of the squared gradient.

    The diagonal of the empirical Fisher information where a batch is one example, as in FISH, and
    the loss its -log p of the label. loss: of (model, batch). roles: as `anatomy.projections` names
    them, none for all.
    Raises ValueError where a projection has an adapter, or without a batch.
    """
    layers = anatomy.projections(model, *roles)
    for name, layer in layers.items():
        if isinstance(layer, Adapter):
            raise ValueError(f"{name} has an adapter: choose first, then add it")
    weights = [layer.weight for layer in layers.values()]
    means = [torch.zeros_like(weight) for weight in weights]
    n = 0
    with _asking(weights):
        for n, batch in enumerate(batches, start=1):
            slopes = torch.autograd.grad(loss(model, batch), weights)
            for mean, slope in zip(means, slopes, strict=True):
                mean += (slope.square() - mean) / n
    if not n:
        raise ValueError("Fisher information needs a batch at least")
    named = zip(layers.items(), means, strict=True)
    return {name: _turned(layer, mean) for (name, layer), mean in named}


@contextlib.contextmanager
def _asking(weights: Sequence[Tensor]) -> Iterator[None]:
    """While these ask for gradients, whether or not they do otherwise."""
    before = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, asked in zip(weights, before, strict=True):
            weight.requires_grad_(asked)


def _turned(layer: nn.Module, tensor: Tensor) -> Tensor:
    """(out, in) from the layout of the layer's weight, and back."""
    return tensor if matrix(layer) is layer.weight else tensor.T


def fish_(model: nn.Module, share: float, scores: Matrices) -> None:
    """FISH: train the numbers of the largest Fisher information, over all matrices together.

    share: of the numbers of the matrices in scores, 0.005 in the paper's table 1, from 1,024
    examples. scores: as `fisher` returns them. Source: Sung et al. (2021).
    """
    sparse_at_(model, largest(scores, share))


# The choice of what full tuning changes most


@torch.no_grad()
def matrices(model: nn.Module, *roles: str) -> dict[str, Tensor]:
    """Name -> a copy of each projection's weight, (out, in). roles: none for all."""
    return {n: matrix(layer).clone() for n, layer in anatomy.projections(model, *roles).items()}


def most_changed(before: Matrices, after: Matrices, share: float) -> dict[str, Tensor]:
    """Name -> places of the numbers that tuning changed most, |after - before|.

    before, after: as `matrices` returns them. Source: Ansell et al. (2022).
    """
    return largest({name: (after[name] - before[name]).abs() for name in before}, share)


def lt_sft_(model: nn.Module, share: float, before: Matrices, after: Matrices) -> None:
    """LT-SFT: tune everything, rewind, then train the numbers that had changed most.

    before, after: `matrices` of the model as it is now, rewound, and as it was after full tuning.
    Raises ValueError when the model is not as before.
    Source: Ansell et al. (2022), with one round of it, and without the L1 term.
    """
    for name, weight in before.items():
        if not torch.equal(matrix(model.get_submodule(name)), weight):
            raise ValueError(f"{name} is not as it was before: rewind the model, then choose")
    sparse_at_(model, most_changed(before, after, share))


# Diff pruning


def gate(alpha: Tensor, u: Tensor | None = None) -> Tensor:
    """The hard-concrete gate z, 0 to 1, of the same shape.

    u: uniform on 0 to 1; None puts its median, a half, there: the gate of evaluation mode.
    """
    # s = sigmoid(log u - log(1 - u) + alpha)
    s = (alpha if u is None else u.logit() + alpha).sigmoid()
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)  # z = min(1, max(0, s (r - l) + l))


def open_probability(alpha: Tensor) -> Tensor:
    """The chance that z is above 0: sigmoid(alpha - log(-l / r))."""
    return (alpha - math.log(-LOW / HIGH)).sigmoid()


class DiffLinear(WeightAdapter):
    """W + z * w: a difference of which gates keep a part. Starts as `base`, w = 0.

    Gates are drawn anew each time in training mode. structured: a gate more for the whole matrix,
    which multiplies all of its gates.
    """

    def __init__(self, base: nn.Module, structured: bool = True):
        super().__init__(base)
        like = matrix(base)
        self.difference = nn.Parameter(like.new_zeros(like.shape))  # w
        self.alpha = nn.Parameter(like.new_full(like.shape, OPEN))
        self.alpha_group = nn.Parameter(like.new_full((1,), OPEN)) if structured else None

    def gates(self, draw: bool = False) -> Tensor:
        """(out, in): z, drawn or those of evaluation mode."""
        z = 1.0
        for alpha in self._alphas():
            z = z * gate(alpha, torch.empty_like(alpha).uniform_(EDGE, 1 - EDGE) if draw else None)
        return z

    def delta(self) -> Tensor:
        """(out, in): z * w with the gates of evaluation mode."""
        return self.gates() * self.difference

    def changed(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        return self.base(x) + F.linear(x, self.gates(self.training) * self.difference)

    def expected_l0(self) -> Tensor:
        """The expected number of open gates: a scalar."""
        return math.prod(open_probability(alpha) for alpha in self._alphas()).sum()

    def _alphas(self) -> list[Tensor]:
        return [self.alpha] if self.alpha_group is None else [self.alpha, self.alpha_group]


@method
def diff_pruning_(model: nn.Module, roles: Sequence[str] = (), structured: bool = True) -> None:
    """Put a `DiffLinear` in the place of each projection; train with `expected_l0` as a penalty.

    This trains twice as many numbers as full tuning: few are left after `diff_fixed_`. The authors'
    code trains gates with AdamW at a rate of 0.1, and weighs the penalty by 1.25e-7 on SST-2.
    Source: Guo et al. (2021), in its structured form where a group is a matrix.
    """
    for name, layer in anatomy.projections(model, *roles).items():
        anatomy.replace(model, name, DiffLinear(layer, structured).train(layer.training))


def expected_l0(model: nn.Module) -> Tensor:
    """How many numbers of a diff-pruned model are expected to change: a scalar.

    sum over matrices and entries of P(z_entry > 0) P(z_matrix > 0). Here the authors' code adds the
    two chances instead. Raises ValueError without a `DiffLinear`.
    """
    layers = [a for a in adapters(model).values() if isinstance(a, DiffLinear)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no gates: diff_pruning_ it first")
    return torch.stack([layer.expected_l0() for layer in layers]).sum()


@torch.no_grad()
def diff_fixed_(model: nn.Module, share: float) -> None:
    """Keep this share of a diff-pruned model's differences, the largest |z * w|; they train on.

    Source: the last two steps of the authors' scripts, magnitude pruning and tuning with a fixed
    mask. Gates are those of evaluation mode here. Raises ValueError where there is another adapter,
    or none.
    """
    layers = adapters(model)
    if not layers or not all(isinstance(layer, DiffLinear) for layer in layers.values()):
        raise ValueError("diff_fixed_ is for a model that has diff pruning and no other adapter")
    differences = {name: layer.delta() for name, layer in layers.items()}
    remove_(model)
    places = largest({name: d.abs() for name, d in differences.items()}, share)
    sparse_at_(model, places)
    for name, at in places.items():
        model.get_submodule(name).values.copy_(differences[name].flatten()[at])


# Masking


def above(score: Tensor, threshold: float) -> Tensor:
    """1 where a score is above the threshold, else 0; the gradient of it passes to the score."""
    hard = (score > threshold).to(score.dtype)
    return hard + (score - score.detach())


class MaskedLinear(WeightAdapter):
    """W * 1[score > threshold]: what trains is which numbers are zero.

    sparsity: the share of zeros at the start, above 0, so that it doesn't start as `base`. Scores
    are uniform from -scale up to where that share is below the threshold.
    """

    def __init__(
        self,
        base: nn.Module,
        sparsity: float = 0.05,
        threshold: float = 0.01,
        scale: float = 0.02,
    ):
        super().__init__(base)
        if not 0 < sparsity <= 1:
            raise ValueError(f"a sparsity of {sparsity} is not above 0, up to 1")
        self.threshold = threshold
        like = matrix(base)
        self.score = nn.Parameter(like.new_empty(like.shape))
        nn.init.uniform_(self.score, -scale, (scale + threshold) / sparsity - scale)

    def mask(self) -> Tensor:
        """(out, in): 1 for what stays, 0 for what goes."""
        return above(self.score, self.threshold)

    def delta(self) -> Tensor:
        """(out, in): -W where the mask is 0, else 0."""
        return matrix(self.base) * (self.mask() - 1)


@method
def masked_(
    model: nn.Module,
    roles: Sequence[str] = (),
    sparsity: float = 0.05,
    threshold: float = 0.01,
    scale: float = 0.02,
) -> None:
    """Put a `MaskedLinear` in the place of each projection.

    The file that `save_adapter` writes has the scores; a bit a number would do to compute.
    Source: Zhao et al. (2020), whose example script masks blocks 2 to 11 alone.
    """
    for name, layer in anatomy.projections(model, *roles).items():
        anatomy.replace(model, name, MaskedLinear(layer, sparsity, threshold, scale))


# Child-Tuning


class _Masked(torch.autograd.Function):
    """The weight as it is; of its gradient, a part."""

    @staticmethod
    def forward(ctx, weight: Tensor, share: float, mask: Tensor | None) -> Tensor:
        ctx.share, ctx.mask = share, mask
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        if ctx.mask is not None:
            return gradient * ctx.mask, None, None  # g * mask
        kept = torch.empty_like(gradient).bernoulli_(ctx.share)
        return gradient * kept / ctx.share, None, None  # g * Bernoulli(p) / p


class Child(Tuned):
    """A projection whose weight trains, as a copy, with a part of its gradient.

    share: p, of the numbers that a backward pass moves. driven: by a mask that the task gives, a
    buffer in the weight's layout, all ones until it is set; else by a Bernoulli mask, drawn anew at
    each backward pass. Nothing of the forward pass is masked.
    """

    def __init__(self, base: nn.Module, share: float, driven: bool = False):
        super().__init__(base)
        if not 0 < share <= 1:
            raise ValueError(f"a share of {share} is not above 0, up to 1")
        self.share = share
        self._parameters["weight"] = nn.Parameter(base.weight.detach().clone())
        mask = torch.ones_like(base.weight, dtype=torch.bool) if driven else None
        self.register_buffer("mask", mask)

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        with super()._in_place():
            masked = _Masked.apply(self.weight, self.share, self.mask)
            self.base._parameters["weight"] = masked
            yield


@method
def child_(model: nn.Module, share: float, roles: Sequence[str] = (), driven: bool = False) -> None:
    """Child-Tuning F: train each projection's weight with Bernoulli masks of its gradient.

    share: p. driven: with fixed masks instead, which `child_d_` chooses.
    """
    for name, layer in anatomy.projections(model, *roles).items():
        child = Child(layer, share, driven).train(layer.training)
        anatomy.replace(model, name, child)


def child_d_(model: nn.Module, share: float, scores: Matrices, roles: Sequence[str] = ()) -> None:
    """Child-Tuning D: train each projection's numbers of the largest Fisher information.

    share: p, of the numbers of all matrices together. scores: as `fisher` returns them for these
    roles. The same numbers as in `fish_`, at the cost of full tuning; an optimizer that decays
    weights moves the others too.
    """
    places = largest({name: scores[name] for name in anatomy.projections(model, *roles)}, share)
    child_(model, share, roles, driven=True)
    for name, child in anatomy.projections(model, *roles).items():
        flat = torch.zeros(child.mask.numel(), dtype=torch.bool, device=child.mask.device)
        if name in places:
            flat[places[name]] = True
        child.mask.copy_(_turned(child.base, flat.view(matrix(child.base).shape)))
