"""Sensi-BERT (Kundu et al., 2023): a budget goes to the tensors that the task feels most.

One pass over a few examples says how much the loss would change, to first order, if a head or an
inner neuron went. Tensors are ranked by it; each keeps a share of its units that grows with its
rank, so that the shares meet a budget of parameters or of operations; what is left is fine-tuned.
The abstract names the analysis, the rank, the trimming and the budgets; score and schedule are this
module's reading of it. Shares that grow with rank are `by_rank`; others are in `ALLOCATIONS`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lablib.compression.structures import Keep
from lablib.models import anatomy

Part = tuple[int, str]  # block, "heads" or "neurons"
Scores = dict[Part, Tensor]  # of each part's units, (units,)
READERS = {"heads": "output", "neurons": "down"}  # the matrix whose columns read a part's units


def sensitivity(
    model: nn.Module, batches: Iterable, loss: Callable[[nn.Module, object], Tensor]
) -> Scores:
    """How much the loss changes, to first order, when a unit's output is scaled down to nothing.

    loss(model, batch) is a mean. Returns (units,) scores of each part, a mean over batches.
    """
    totals: Scores = {}
    for n, batch in enumerate(batches, start=1):
        model.zero_grad()
        loss(model, batch).backward()
        for part, weight in _readers(model).items():
            # d loss / d gate = sum over the unit's columns of g w
            felt = _by_unit(model, part, weight.grad * weight.detach()).abs()  # (out, in) -> (u,)
            totals[part] = totals.get(part, 0) + (felt - totals.get(part, 0)) / n
    model.zero_grad()
    return totals


def by_tensor(
    model: nn.Module, batches: Iterable, loss: Callable[[nn.Module, object], Tensor]
) -> dict[tuple[int, str], float]:
    """The same of whole matrices: how much the loss changes when one is scaled down to nothing.

    Returns |sum g w| of each block's and role's weight, roles as in `anatomy.projections`, a mean
    over batches.
    """
    weights = {
        (block, role): anatomy.projection(model, block, role).weight
        for block in range(len(anatomy.blocks(model)))
        for role in anatomy.family(model).projections
    }
    totals = dict.fromkeys(weights, 0.0)
    for n, batch in enumerate(batches, start=1):
        model.zero_grad()
        loss(model, batch).backward()
        for place, weight in weights.items():
            felt = (weight.grad * weight.detach()).sum().abs().item()
            totals[place] += (felt - totals[place]) / n
    model.zero_grad()
    return totals


def by_rank(scores: Scores, sizes: Mapping[Part, int], budget: float) -> dict[Part, float]:
    """Share of its units that each part keeps: c rank, at most 1, and a budget in all.

    Parts are ranked by the sum of their scores for each parameter: 1 is the least sensitive.
    """
    felt = {part: scores[part].sum().item() / sizes[part] for part in scores}
    order = sorted(felt, key=felt.get)
    return _filled({part: 1.0 + order.index(part) for part in felt}, sizes, budget)


def by_score(scores: Scores, sizes: Mapping[Part, int], budget: float) -> dict[Part, float]:
    """The same in proportion to what the rank is made of."""
    felt = {part: scores[part].sum().item() / sizes[part] for part in scores}
    return _filled(felt, sizes, budget)


def uniform(scores: Scores, sizes: Mapping[Part, int], budget: float) -> dict[Part, float]:
    """Every part keeps the same share."""
    return dict.fromkeys(scores, budget)


def from_below(scores: Scores, sizes: Mapping[Part, int], budget: float) -> dict[Part, float]:
    """Whole blocks from the first one up, and of the one at the edge what remains."""
    left, shares = budget * sum(sizes.values()), {}
    for block in sorted({part[0] for part in scores}):
        parts = [part for part in scores if part[0] == block]
        size = sum(sizes[part] for part in parts)
        shares |= dict.fromkeys(parts, max(0.0, min(1.0, left / size)))
        left -= size
    return shares


ALLOCATIONS = {"rank": by_rank, "score": by_score, "uniform": uniform, "depth": from_below}


def _filled(
    weights: Mapping[Part, float], sizes: Mapping[Part, int], budget: float
) -> dict[Part, float]:
    """min(1, c weight) for the c at which the parts keep `budget` of all their sizes."""
    whole, low, high = budget * sum(sizes.values()), 0.0, 1.0
    kept = {}
    while sum(sizes[p] * min(1.0, high * weights[p]) for p in weights) < whole - 1e-9:
        high *= 2
        if high > 1e30:
            raise ValueError("parts of no sensitivity can't be ranked by it")
    for _ in range(100):
        middle = (low + high) / 2
        kept = {p: min(1.0, middle * weights[p]) for p in weights}
        enough = sum(sizes[p] * kept[p] for p in kept) >= whole
        low, high = (low, middle) if enough else (middle, high)
    return kept


def _readers(model: nn.Module) -> dict[Part, Tensor]:
    return {
        (block, kind): anatomy.projection(model, block, role).weight
        for block in range(len(anatomy.blocks(model)))
        for kind, role in READERS.items()
    }


def _by_unit(model: nn.Module, part: Part, columns: Tensor) -> Tensor:
    """Sum over rows and over the columns of each unit: (out, in) -> (units,)."""
    width = 1 if part[1] == "neurons" else head_dim(model, part[0])
    return columns.sum(0).unflatten(0, (-1, width)).sum(1)


def head_dim(model: nn.Module, block: int = 0) -> int:
    """Width of a head."""
    attention = anatomy.part(model, block, "attention")
    inner = getattr(attention, "self", attention)
    return getattr(inner, "attention_head_size", None) or inner.head_dim


def magnitude(model: nn.Module, batches: Iterable = (), loss: Callable | None = None) -> Scores:
    """The norm of the columns that read a unit: what it can add at most. Needs no text."""
    return {
        part: _by_unit(model, part, weight.detach().square()).sqrt()
        for part, weight in _readers(model).items()
    }


def at_random(model: nn.Module) -> Scores:
    """Numbers drawn for each unit, from torch's own generator: a choice that knows nothing."""
    readers = _readers(model)
    return {part: torch.rand(n, device=readers[part].device) for part, n in units(model).items()}


def fisher(model: nn.Module, batches: Iterable, loss: Callable) -> Scores:
    """The mean square of the derivative that `sensitivity` takes the size of."""
    totals: Scores = {}
    for n, batch in enumerate(batches, start=1):
        single = sensitivity(model, [batch], loss)
        for part, felt in single.items():
            totals[part] = totals.get(part, 0) + (felt.square() - totals.get(part, 0)) / n
    return totals


@torch.no_grad()
def left_out(
    model: nn.Module, batches: list, loss: Callable, parts: Iterable[Part] | None = None
) -> Scores:
    """How much the loss changes without a unit, one by one: exact, slow. parts: None for all."""
    whole = sum(loss(model, batch) for batch in batches) / len(batches)
    found = {}
    for part in units(model) if parts is None else parts:
        n = units(model)[part]
        losses = []
        for unit in range(n):
            rest = torch.tensor([u for u in range(n) if u != unit])
            with masked(model, {part: rest}):
                losses.append(sum(loss(model, batch) for batch in batches) / len(batches) - whole)
        found[part] = torch.stack(losses).abs()
    return found


@torch.no_grad()
def slopes(
    model: nn.Module,
    batch: object,
    loss: Callable,
    part: Part,
    chosen: Iterable[int],
    step: float = 1e-5,
) -> dict[int, float]:
    """Unit -> |d loss / d gate| by central differences; for a model in float64."""
    weight, found = _readers(model)[part], {}
    for unit in chosen:
        bits, columns = weight.detach().clone(), _columns(model, part, torch.tensor([unit]))
        losses = []
        for gate in (1 + step, 1 - step):
            weight[:, columns] = gate * bits[:, columns]
            losses.append(loss(model, batch).item())
        weight.copy_(bits)
        found[unit] = abs(losses[0] - losses[1]) / (2 * step)
    return found


SCORES = {
    "sensitivity": sensitivity,
    "magnitude": magnitude,
    "fisher": fisher,
    "left out": left_out,
}


# What a unit costs


def units(model: nn.Module) -> dict[Part, int]:
    """How many heads or neurons each part has."""
    return {
        part: weight.shape[1] // (1 if part[1] == "neurons" else head_dim(model, part[0]))
        for part, weight in _readers(model).items()
    }


def unit_sizes(model: nn.Module) -> dict[Part, int]:
    """Parameters that go with one unit, its biases included."""
    dim = anatomy.embedding(model).weight.shape[1]
    sizes = {}
    for block, kind in _readers(model):
        written = ("query", "key", "value") if kind == "heads" else ("gate", "up")
        width = head_dim(model, block) if kind == "heads" else 1
        layers = _there(model, block, written)
        sizes[block, kind] = width * (dim + sum(dim + (layer.bias is not None) for layer in layers))
    return sizes


def unit_flops(model: nn.Module, length: int) -> dict[Part, int]:
    """Operations a token that go with one unit, in a text of so many tokens.

    Two for a weight; a head also compares with every token and mixes their values.
    """
    flops = {}
    for (block, kind), n in unit_sizes(model).items():
        written = ("query", "key", "value") if kind == "heads" else ("gate", "up")
        width = head_dim(model, block) if kind == "heads" else 1
        biases = width * sum(m.bias is not None for m in _there(model, block, written))
        flops[block, kind] = 2 * (n - biases) + (4 * width * length if kind == "heads" else 0)
    return flops


def _there(model: nn.Module, block: int, roles: Iterable[str]) -> list[nn.Module]:
    known = anatomy.family(model).projections
    return [anatomy.projection(model, block, role) for role in roles if role in known]


@dataclass(frozen=True)
class Trimmed:
    """What stays of each part, and the share that each was given."""

    keep: dict[Part, Tensor]  # places of the units, sorted
    shares: dict[Part, float]


def budgeted(
    scores: Scores,
    costs: Mapping[Part, int],
    budget: float,
    allocation: Callable = by_rank,
) -> Trimmed:
    """The units that stay: of each part the best by score, as many as its share allows.

    costs: of one unit, parameters (`unit_sizes`) or operations (`unit_flops`). budget: the share of
    all units' costs that stays, 0 to 1. Met to within the smallest unit, and never exceeded; every
    part keeps a unit at least.
    Raises ValueError for a budget that does not leave every part one unit, or is above 1.
    """
    counts = {part: len(score) for part, score in scores.items()}
    sizes = {part: counts[part] * costs[part] for part in counts}
    whole = budget * sum(sizes.values())
    if not sum(costs[p] for p in counts) <= whole + 1e-6 <= sum(sizes.values()) + 1e-3:
        raise ValueError(f"a budget of {budget} leaves some part no unit, or is above 1")
    shares = allocation(scores, sizes, budget)
    kept = _whole_units(shares, counts, costs, whole)
    best = {p: scores[p].topk(kept[p]).indices.sort().values for p in counts}
    return Trimmed(best, shares)


def _whole_units(shares, counts, costs, whole: float) -> dict[Part, int]:
    """Counts nearest to the shares, at least 1, whose cost is `whole` to within one unit."""
    wanted = {p: shares[p] * counts[p] for p in counts}
    kept = {p: min(counts[p], max(1, round(wanted[p]))) for p in counts}

    def left() -> float:
        return whole - sum(kept[p] * costs[p] for p in kept)

    def over(part: Part, change: int) -> float:  # the share that it would be off by
        return (kept[part] + change - wanted[part]) / counts[part]

    while left() < -1e-6:  # too much: from the part that stays furthest above its share
        kept[max((p for p in kept if kept[p] > 1), key=lambda p: (over(p, -1), p))] -= 1
    while open_ := [p for p in kept if kept[p] < counts[p] and costs[p] <= left() + 1e-6]:
        kept[min(open_, key=lambda p: (over(p, 1), p))] += 1
    return kept


# Trimming


@contextlib.contextmanager
def masked(model: nn.Module, keep: Mapping[Part, Tensor]) -> Iterator[None]:
    """The model as if units that are not kept were gone; its own weights come back afterwards."""
    before = {}
    try:
        with torch.no_grad():
            for part, places in keep.items():
                weight = _readers(model)[part]
                before[part] = (weight, weight.detach().clone())
                weight[:, ~_columns(model, part, places)] = 0
        yield
    finally:
        with torch.no_grad():
            for weight, bits in before.values():
                weight.copy_(bits)


def _columns(model: nn.Module, part: Part, places: Tensor) -> Tensor:
    """Which columns of the reader are those units': (in,) bool."""
    stays = torch.zeros(units(model)[part], dtype=torch.bool)
    stays[places] = True
    return stays.repeat_interleave(head_dim(model, part[0]) if part[1] == "heads" else 1)


@torch.no_grad()
def trim_(model: nn.Module, keep: Mapping[Part, Tensor]) -> None:
    """Cut whole heads and neurons out of BERT's or RoBERTa's matrices, in place.

    Outputs are those of `masked`. Raises ValueError for another family: `as_keep` says what
    `structures.sliced` takes there.
    """
    if anatomy.family(model).name not in ("BERT", "RoBERTa"):
        raise ValueError(
            f"{type(model).__name__} is trimmed by structures.sliced(model, as_keep(...))"
        )
    for part, places in keep.items():
        block, kind = part
        stays = _columns(model, part, places).nonzero()[:, 0]
        for role in ("query", "key", "value") if kind == "heads" else ("up",):
            _cut(anatomy.projection(model, block, role), stays, 0)
        _cut(anatomy.projection(model, block, READERS[kind]), stays, 1)
        if kind == "heads":
            inner = anatomy.part(model, block, "attention").self
            inner.num_attention_heads = len(places)
            inner.all_head_size = len(stays)


def _cut(layer: nn.Linear, stays: Tensor, axis: int) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().index_select(axis, stays).clone())
    if axis == 0:
        layer.out_features = len(stays)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach()[stays].clone())
    else:
        layer.in_features = len(stays)


def trimmed(model: nn.Module, keep: Mapping[Part, Tensor]) -> nn.Module:
    """A copy that is trimmed."""
    smaller = copy.deepcopy(model)
    trim_(smaller, keep)
    return smaller


def as_keep(model: nn.Module, keep: Mapping[Part, Tensor]) -> Keep:
    """The same for `structures`, which slices decoders; parts that are not named stay whole."""
    n_blocks = len(anatomy.blocks(model))
    entries = {
        kind: [keep[b, kind].tolist() if (b, kind) in keep else None for b in range(n_blocks)]
        for kind in READERS
    }
    return Keep(heads=entries["heads"], neurons=entries["neurons"])


def n_encoder(model: nn.Module) -> int:
    """Parameters of the blocks."""
    return sum(p.numel() for p in anatomy.blocks(model).parameters())
