"""FineGates (Svirsky et al., 2024): a frozen matrix learns which of its rows and columns to lose.

Lab 705. Every row and every column of W is multiplied by a gate, a number from 0 to 1. Gates and
the head are all that trains. A penalty wants so many gates open and no more; the task decides
which. Rows and columns whose gate ends at 0 are cut out: what is left is a smaller matrix.

Constants are those of the authors' code. There, biases of gated matrices train as well; here they
stay frozen with the rest of the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lablib.models import anatomy
from lablib.peft.adapter import Adapter, matrix, method

START, SPREAD = 1.0, 0.1  # of the logits: mean and standard deviation
NOISE, WIDTH = 0.1, 0.5  # sigma of what gates are jolted by, and of the penalty's estimate
WEIGHT = 50.0  # lambda
TAU = 100.0  # of the softmax over gates that are weighed by kurtosis


def gate(logits: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """From 0, closed, to 1, open: clamp(mu + 1/2 + noise, 0, 1) with mu = tanh(logits)."""
    return (logits.tanh() + 0.5 + noise).clamp(0, 1)


def open_probability(logits: Tensor) -> Tensor:
    """The chance that mu + 1/2 + e is above 0, with e ~ N(0, sigma^2), sigma = 1/2."""
    # 1/2 + 1/2 erf((mu + 1/2) / (sigma sqrt 2))
    return 0.5 + 0.5 * torch.erf((logits.tanh() + 0.5) / (WIDTH * math.sqrt(2)))


class GatedLinear(Adapter):
    """y = g_r * ((W + B A) (g_c * x) + b), with W and b frozen.

    base: nn.Linear, or GPT-2's Conv1D. rank: of B A, which starts at zero; 0 for none.
    """

    def __init__(self, base: nn.Module, rank: int = 0):
        super().__init__()
        n_out, n_in = matrix(base).shape
        if not 0 <= rank <= min(n_out, n_in):
            raise ValueError(f"rank {rank} is not 0 to {min(n_out, n_in)}")
        self.base = base
        self.row = nn.Parameter(base.weight.new_empty(n_out).normal_(START, SPREAD))
        self.column = nn.Parameter(base.weight.new_empty(n_in).normal_(START, SPREAD))
        if rank:
            self.down = nn.Parameter(base.weight.new_empty(rank, n_in))  # A
            self.up = nn.Parameter(base.weight.new_zeros(n_out, rank))  # B
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.rank = rank
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out)."""
        if not self.enabled:
            return self.base(x)
        rows, columns = self.gates()
        x = columns * x  # g_c * x
        y = self.base(x)  # W (g_c * x) + b
        if self.rank:
            y = y + F.linear(F.linear(x, self.down), self.up)
        return rows * y  # g_r * (...)

    def gates(self) -> tuple[Tensor, Tensor]:
        """Of rows (out,) and of columns (in,); jolted by noise in training alone."""
        both = (self.row, self.column)
        if not self.training:
            return tuple(gate(logits) for logits in both)
        return tuple(gate(logits, NOISE * torch.randn_like(logits)) for logits in both)

    @property
    def weight(self) -> Tensor:
        """(out, in): W + B A, before the gates."""
        whole = matrix(self.base)
        return whole + self.up @ self.down if self.rank and self.enabled else whole

    def take_out(self, model: nn.Module, name: str) -> None:
        """Put the base back."""
        anatomy.replace(model, name, self.base)


def penalty(model: nn.Module, target: float) -> Tensor:
    """How far the mean chance to be open is from 1 - target; a mean over rows', columns' gates.

    target: the share of gates that should close. A scalar; WEIGHT is not in it.
    """
    means = [
        open_probability(logits).mean()
        for layer in layers(model).values()
        for logits in (layer.row, layer.column)
    ]
    return (torch.stack(means) - (1 - target)).abs().mean()  # mean of |mean P - (1 - target)|


# A variant of the authors' code: gates of few but strong connections count less.


def weighed_penalty(model: nn.Module, target: float) -> Tensor:
    """`penalty` over the gates that are open, each weighed by the tails of what passes it.

    The model was passed through `watch_`, and has read something since. A scalar.
    Source: the option `kurt` of the authors' code; the paper's own words on it were not found.
    """
    means = []
    for layer in layers(model).values():
        places = kept(layer)
        weights = weighed(layer.weight[places[0]][:, places[1]], layer.read[places[1]])
        for logits, where, weight in zip((layer.row, layer.column), places, weights, strict=True):
            means.append((weight * open_probability(logits[where])).sum())
    return (torch.stack(means) - (1 - target)).abs().mean()


@torch.no_grad()
def weighed(weight: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of gates of rows (out,) and of columns (in,); each sums to 1.

    weight: (out, in). read: (in,), the mean input.
    """
    passing = weight * read  # (out, in), what each input adds to each output
    roots = kurtosis(passing.T).sqrt(), kurtosis(passing).sqrt()
    return tuple((-root / TAU).softmax(0) for root in roots)


def kurtosis(values: Tensor) -> Tensor:
    """Pearson's, of each column of (n, m): the mean of z^4, 3 for a normal one; 0 if constant."""
    centered = values - values.mean(0)
    variance = centered.square().mean(0)
    return centered.pow(4).mean(0) / variance.square().clamp(min=torch.finfo(values.dtype).tiny)


def watch_(model: nn.Module) -> None:
    """Gated projections note the mean of what they read in a pass, over texts and tokens."""
    for layer in layers(model).values():
        layer.register_forward_pre_hook(_note)


def _note(layer: GatedLinear, args: tuple) -> None:
    layer.read = args[0].detach().flatten(0, -2).mean(0)  # (..., in) -> (in,)


@method
def gate_(model: nn.Module, roles: Sequence[str] = (), rank: int = 0, below: int = 0) -> None:
    """Put a `GatedLinear` in the place of each projection, after the first `below` blocks.

    roles: as `anatomy.projections` names them, none for all.
    """
    for name, layer in upper(model, roles, below).items():
        anatomy.replace(model, name, GatedLinear(layer, rank))


def upper(model: nn.Module, roles: Sequence[str] = (), below: int = 0) -> dict[str, nn.Module]:
    """Full dotted name -> projection, of the blocks after the first `below`."""
    place = anatomy.family(model).blocks
    first = tuple(f"{place}.{block}." for block in range(below))
    found = anatomy.projections(model, *roles)
    return {name: layer for name, layer in found.items() if not name.startswith(first)}


def layers(model: nn.Module) -> dict[str, GatedLinear]:
    """Full dotted name -> gated projection."""
    return {n: m for n, m in model.named_modules() if isinstance(m, GatedLinear)}


# What the gates leave


def kept(layer: GatedLinear) -> tuple[Tensor, Tensor]:
    """Places of the open rows, and of the open columns, in order."""
    return tuple(gate(logits.detach()).nonzero()[:, 0] for logits in (layer.row, layer.column))


def removed(model: nn.Module) -> float:
    """Share of the gated weights that lie in a closed row or column."""
    found = layers(model).values()
    left = sum(math.prod(map(len, kept(layer))) for layer in found)
    return 1 - left / sum(layer.row.numel() * layer.column.numel() for layer in found)


def states(model: nn.Module) -> dict[str, float]:
    """Shares of all gates that are closed (0), open (1), and between."""
    gates = torch.cat([gate(g.detach()) for m in layers(model).values() for g in (m.row, m.column)])
    shares = {"closed": gates == 0, "between": (gates > 0) & (gates < 1), "open": gates == 1}
    return {name: found.double().mean().item() for name, found in shares.items()}


class CutLinear(nn.Module):
    """A matrix without its closed rows and columns.

    rows, columns: places of what is left, or None where the neighbor computes with those alone:
    then outputs are not scattered, or inputs not gathered.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows, columns, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        self.n_out = n_out

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) -> (..., out); closed rows are 0."""
        if self.columns is not None:
            x = x.index_select(-1, self.columns)  # (..., in) -> (..., open columns)
        y = F.linear(x, self.weight, self.bias)  # -> (..., open rows)
        if self.rows is None:
            return y
        whole = y.new_zeros(*y.shape[:-1], self.n_out)
        return whole.index_copy(-1, self.rows, y)  # -> (..., out)


@torch.no_grad()
def cut(layer: GatedLinear, rows: Tensor, columns: Tensor) -> CutLinear:
    """Rows and columns at these places, gates multiplied in."""
    g_r, g_c = gate(layer.row)[rows], gate(layer.column)[columns]
    weight = layer.weight.index_select(0, rows).index_select(1, columns)
    bias = getattr(layer.base, "bias", None)
    bias = None if bias is None else g_r * bias[rows]  # a closed row loses its bias, too
    n_out, n_in = matrix(layer.base).shape
    given, made = (
        None if len(places) == n else places for places, n in ((columns, n_in), (rows, n_out))
    )
    return CutLinear(g_r[:, None] * weight * g_c, bias, made, given, n_out)


def compress_(model: nn.Module) -> None:
    """Cut every gated projection, in place and for good.

    Between a feed-forward layer's matrices only neurons stay that both sides have open; they are
    neither scattered nor gathered. Sound where the activation of 0 is 0, as GELU's and SiLU's is.
    """
    found, shared = layers(model), _shared(model)
    for name, layer in found.items():
        rows, columns = kept(layer)
        into, out_of = shared.get((name, "rows")), shared.get((name, "columns"))
        smaller = cut(
            layer,
            rows if into is None else into,
            columns if out_of is None else out_of,
        )
        if into is not None:
            smaller.rows = None
        if out_of is not None:
            smaller.columns = None
        anatomy.replace(model, name, smaller)
    model.peft_methods = []


def _shared(model: nn.Module) -> dict[tuple[str, str], Tensor]:
    """Places of the inner neurons that stay, of each feed-forward layer that is gated whole."""
    family, found, shared = anatomy.family(model), layers(model), {}
    for block in range(len(anatomy.blocks(model))):
        names = {
            role: f"{family.blocks}.{block}.{family.projections[role]}"
            for role in ("gate", "up", "down")
            if role in family.projections
        }
        if not all(name in found for name in names.values()):
            continue
        down = names.pop("down")
        open_ = gate(found[down].column) > 0
        for name in names.values():
            open_ = open_ & (gate(found[name].row) > 0)
        places = open_.nonzero()[:, 0]
        shared[down, "columns"] = places
        shared |= {(name, "rows"): places for name in names.values()}
    return shared


# Rivals: the same shapes, chosen otherwise


@torch.no_grad()
def shut_(layer: GatedLinear, choice: str, rows: int, columns: int) -> None:
    """Leave so many rows and columns open, and close the others for good; open gates are at 1.

    choice: "magnitude", those with the largest norms; "random".
    Raises ValueError for another one.
    """
    weight = layer.weight
    for logits, axis, count in ((layer.row, 1, rows), (layer.column, 0, columns)):
        if choice == "random":
            order = torch.randperm(len(logits))
        elif choice == "magnitude":
            order = weight.norm(dim=axis).argsort(descending=True, stable=True)
        else:
            raise ValueError(f"{choice!r} is no choice: magnitude, random")
        logits.fill_(SHUT)
        logits[order[:count]] = START


SHUT = -5.0  # a logit so far below -atanh(1/2) that neither noise nor a gradient opens the gate


@torch.no_grad()
def harden_(model: nn.Module) -> None:
    """Every gate that is not closed goes to 1: the choice stays, the scaling goes."""
    for layer in layers(model).values():
        for logits in (layer.row, layer.column):
            logits.copy_(torch.where(gate(logits) > 0, START, SHUT))
