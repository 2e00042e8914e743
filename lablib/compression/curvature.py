"""Kronecker factors: the curvature of a projection's weight from what it reads and what it is told.

A token that reads x, and at whose output the loss pulls by g, has the gradient g x^T. The weight's
Fisher information is F = E[(g (x) x) (g (x) x)^T], a matrix of (out in)^2 numbers. Where g and x
are independent it is G (x) A, with A = E[x x^T] and G = E[g g^T] (Martens and Grosse, 2015), which
takes in^2 + out^2. Pairs of tokens that share the weight are left out ("expand").
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.compression.calibration import _hooked, _only_these
from lablib.models import anatomy
from lablib.modes import kept_modes


@dataclass(frozen=True)
class Factors:
    """One product G (x) A: inputs, A (in, in), and outputs, G (out, out)."""

    inputs: Tensor
    outputs: Tensor

    def diagonal(self) -> Tensor:
        """The curvature of each weight by itself, G_ii A_jj: (out, in)."""
        return torch.outer(self.outputs.diagonal(), self.inputs.diagonal())

    def rise(self, change: Tensor) -> Tensor:
        """By how much the loss rises, to second order, when a weight changes by (out, in).

        1/2 d^T (G (x) A) d for the flattened change d, without that matrix.
        """
        return (self.outputs @ change @ self.inputs * change).sum() / 2


def kronecker_factors(
    model: nn.Module,
    rows: Tensor,
    *roles: str,
    blocks: Collection[int] | None = None,
    sampled: int | None = None,
    batch: int = 8,
) -> dict[str, Factors]:
    """Name -> factors of each projection, means over the tokens of rows (n, length + 1).

    g is the gradient of a row's summed losses, so that a token's g is the same in any batch. Labels
    are the text's own (the empirical Fisher information), or drawn from the model with the seed
    `sampled`. blocks: of these alone, since all factors of a large model take much memory.
    """
    layers = anatomy.projections(model, *roles)
    if blocks is not None:
        below = f"{anatomy.family(model).blocks}."
        places = {name: int(name.removeprefix(below).partition(".")[0]) for name in layers}
        layers = {name: layers[name] for name, place in places.items() if place in blocks}
    sums = {name: [0.0, 0.0] for name in layers}  # of x x^T and of g g^T

    def add(name: str, side: int, tokens: Tensor) -> None:
        sums[name][side] += tokens.t() @ tokens

    _watched(model, rows, layers, add, sampled, batch)
    n = rows[:, 1:].numel()
    return {name: Factors(*(total.div_(n) for total in pair)) for name, pair in sums.items()}


def by_blocks(
    model: nn.Module, rows: Tensor, *roles: str, at_once: int = 5, **how
) -> Iterator[dict[str, Factors]]:
    """The same factors, those of a few neighbouring blocks at a time, each measured by itself.

    All of SmolLM2's are 1.2 GB; of five blocks they are 0.2. Let a group go before the next one
    comes. how: sampled and batch, as `kronecker_factors` takes them.
    Raises ValueError when there is no block at once.
    """
    if at_once < 1:
        raise ValueError(f"{at_once} blocks at once are none")
    places = range(len(anatomy.blocks(model)))
    for first in places[::at_once]:
        group = places[first : first + at_once]
        yield kronecker_factors(model, rows, *roles, blocks=group, **how)


def token_pairs(model: nn.Module, rows: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """x (tokens, in) and g (tokens, out) of one projection, in the same order."""
    kept: tuple[list[Tensor], list[Tensor]] = ([], [])
    layers = {name: model.get_submodule(name)}
    _watched(model, rows, layers, lambda _, side, tokens: kept[side].append(tokens), None, 8)
    return torch.cat(kept[0]), torch.cat(kept[1])


def _watched(
    model: nn.Module,
    rows: Tensor,
    layers: Mapping[str, nn.Module],
    take: Callable[[str, int, Tensor], None],
    sampled: int | None,
    batch: int,
) -> None:
    """Passes forward and back; take(name, 0, x (tokens, in)), then take(name, 1, g (tokens, out)).

    No weight gets a gradient: the embedding's output is where the graph begins.
    """

    def watch(name: str):
        def hook(_, given, out: Tensor) -> None:
            take(name, 0, given[0].detach().float().flatten(0, -2))
            out.register_hook(lambda pull: take(name, 1, pull.float().flatten(0, -2)))

        return hook

    def begin(_, given, out: Tensor) -> Tensor:
        return out.detach().requires_grad_()

    place = anatomy.embedding(model).weight.device
    draw = None if sampled is None else torch.Generator(place).manual_seed(sampled)
    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    hooks.append(anatomy.embedding(model).register_forward_hook(begin))
    with _hooked(hooks), _only_these(model, []), kept_modes(model), torch.enable_grad():
        model.eval()
        for part in rows.to(place).split(batch):
            scores = anatomy.logits(model, part[:, :-1]).float().flatten(0, 1)
            labels = part[:, 1:].flatten() if draw is None else _drawn(scores, draw)
            F.cross_entropy(scores, labels, reduction="sum").backward()


def _drawn(scores: Tensor, draw: torch.Generator) -> Tensor:
    """A label for each token, by the model's own probabilities."""
    return torch.multinomial(scores.detach().softmax(1), 1, generator=draw)[:, 0]


def nearest_kronecker(x: Tensor, g: Tensor, rank: int = 1, steps: int = 10) -> list[Factors]:
    """The sum of `rank` products nearest to F in Frobenius norm: at rank 1 no further than G (x) A.

    x: (tokens, in); g: (tokens, out). Rearranged, F is sum_t vec(g g^T) vec(x x^T)^T, whose leading
    singular vectors are found by power iteration, one pair after the other.
    Raises ValueError for a rank below 1, or x and g of another number of tokens.
    """
    if rank < 1 or len(x) != len(g):
        raise ValueError(f"rank {rank}, {len(x)} inputs, {len(g)} pulls: no sum of products")
    terms: list[Factors] = []
    for _ in range(rank):
        inputs = x.t() @ x
        for _ in range(steps):
            inputs = inputs / inputs.norm()
            # G <- sum_t (x^T A x) g g^T / n - sum_r <A_r, A> G_r, and A from G alike
            outputs = _weighted(g, _form(x, inputs))
            outputs = outputs - sum((term.inputs * inputs).sum() * term.outputs for term in terms)
            outputs = outputs / outputs.norm()
            inputs = _weighted(x, _form(g, outputs))
            inputs = inputs - sum((term.outputs * outputs).sum() * term.inputs for term in terms)
        terms.append(Factors(inputs, outputs))
    return terms


def _form(tokens: Tensor, matrix: Tensor) -> Tensor:
    """t^T M t of each token: (tokens,)."""
    return (tokens @ matrix * tokens).sum(1)


def _weighted(tokens: Tensor, weights: Tensor) -> Tensor:
    """Mean of w t t^T."""
    return (tokens * weights[:, None]).t() @ tokens / len(tokens)


def kronecker_error(x: Tensor, g: Tensor, terms: Sequence[Factors]) -> float:
    """|F - sum of terms| over |F|, Frobenius norms, without forming F; (tokens)^2 numbers."""
    pairs = (x @ x.t()).square() * (g @ g.t()).square()
    whole = pairs.double().mean()
    across = sum((_form(x, t.inputs) * _form(g, t.outputs)).double().mean() for t in terms)
    own = sum(
        ((a.inputs * b.inputs).sum() * (a.outputs * b.outputs).sum()).double()
        for a in terms
        for b in terms
    )
    return ((whole - 2 * across + own).clamp_min(0) / whole).sqrt().item()
