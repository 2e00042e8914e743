"""The LLM Surgeon (van der Ouderaa et al., 2023): remove rows and columns, the rest makes up.

Lab 802. Around a trained model the loss is a bowl, L(w + d) = L(w) + 1/2 d^T F d. With F = G (x) A
(`curvature`) both questions have answers in closed form: what a row or a column costs when all
other weights are free to move, and how they move. One threshold over all layers picks what goes,
and after each of several shots the curvature is measured again.

The same code gives the paper's baselines: put the identity for G and A, and costs are magnitudes;
put diagonals for their inverses, and nothing makes up for what goes.

Rows and columns go jointly here: P W Q, which is the optimum under both constraints. The authors'
code adds the two updates and leaves out their product.
"""

from __future__ import annotations

import bisect
import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lablib.compression.calibration import input_norms
from lablib.compression.curvature import Factors, by_blocks, kronecker_factors
from lablib.models import anatomy
from lablib.paths import data_dir


def row_costs(weight: Tensor, inputs: Tensor, outputs_inverse: Tensor) -> Tensor:
    """By how much the loss rises when a row goes and the others make up for it: (out,)."""
    # (W A W^T)_ii / (2 (G^-1)_ii)
    return ((weight @ inputs) * weight).sum(1) / (2 * outputs_inverse.diagonal())


def column_costs(weight: Tensor, outputs: Tensor, inputs_inverse: Tensor) -> Tensor:
    """The same of columns: (in,)."""
    # (W^T G W)_jj / (2 (A^-1)_jj)
    return ((outputs @ weight) * weight).sum(0) / (2 * inputs_inverse.diagonal())


def without_rows(weight: Tensor, gone: Tensor, outputs_inverse: Tensor) -> Tensor:
    """The weight (out, in) with rows set to zero, and the others moved to where the loss is least.

    gone: (out,) bool.
    """
    # dW = -G^-1[:, R] (G^-1[R, R])^-1 W[R, :]
    pull = torch.linalg.solve(outputs_inverse[gone][:, gone], weight[gone])  # (gone, in)
    return (weight - outputs_inverse[:, gone] @ pull).masked_fill(gone[:, None], 0.0)


def without_columns(weight: Tensor, gone: Tensor, inputs_inverse: Tensor) -> Tensor:
    """The same with columns, gone: (in,) bool. Rows act from the left, columns from the right."""
    # dW = -W[:, C] (A^-1[C, C])^-1 A^-1[C, :]
    return without_rows(weight.t(), gone, inputs_inverse).t()


def global_threshold(costs: Mapping[str, tuple[Tensor, Tensor]], sparsity: float) -> float:
    """The cost up to which rows and columns go, so that this share of all weights goes at most.

    costs: name -> those of rows (out,) and of columns (in,); one threshold for all layers.
    Raises ValueError for a sparsity that is not from 0 to 1.
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"a sparsity of {sparsity} is not from 0 to 1")
    ordered = torch.cat([side for pair in costs.values() for side in pair]).sort().values.tolist()
    target = sparsity * removed(costs, float("inf"))
    place = bisect.bisect_right(ordered, target, key=lambda limit: removed(costs, limit))
    return ordered[place - 1] if place else -1.0


def removed(costs: Mapping[str, tuple[Tensor, Tensor]], limit: float) -> int:
    """How many weights go when all rows and columns do that cost no more; overlaps count once."""
    total = 0
    for rows, columns in costs.values():
        r, c = int((rows <= limit).sum()), int((columns <= limit).sum())
        total += r * len(columns) + c * len(rows) - r * c
    return total


def element_costs(weight: Tensor, inputs_inverse: Tensor, outputs_inverse: Tensor) -> Tensor:
    """The same of single weights: (out, in)."""
    # w_ij^2 / (2 (G^-1)_ii (A^-1)_jj)
    inverse = torch.outer(outputs_inverse.diagonal(), inputs_inverse.diagonal())
    return weight.square() / (2 * inverse)


def without_elements(
    weight: Tensor,
    gone: Tensor,
    inputs_inverse: Tensor,
    outputs_inverse: Tensor,
    max_correlate: int = 1024,
) -> Tensor:
    """The weight with single weights set to zero, and the others moved.

    gone: (out, in) bool. All of them at once would take a matrix of their number squared, so they
    go row by row, at most `max_correlate` at once, and each set sees what earlier ones have moved.
    """
    new = weight.clone()
    for row in gone.any(1).nonzero()[:, 0].tolist():
        share = outputs_inverse[:, row] / outputs_inverse[row, row]  # (out,), 1 for the row itself
        for part in gone[row].nonzero()[:, 0].split(max_correlate):
            pull = torch.linalg.solve(inputs_inverse[part][:, part], new[row, part])
            new -= torch.outer(share, inputs_inverse[:, part] @ pull)
    return new.masked_fill(gone, 0.0)


def cheapest_two(costs: Tensor) -> Tensor:
    """Of each four neighbours in a row, the two that cost least: (out, in) bool."""
    order = costs.unflatten(1, (-1, 4)).argsort(2)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(2, order[..., :2], True).flatten(1)


@dataclass(frozen=True)
class Method:
    """How a method sees a layer: which curvature, and whether other weights make up for it.

    curvature: "identity", "inputs" (the diagonal of A alone) or "kronecker"; correlated: whether
    costs count on others to move; update: whether they move.
    """

    curvature: str
    correlated: bool = False
    update: bool = False


METHODS = {
    "magnitude": Method("identity"),
    "l-obd": Method("inputs"),
    "k-obd": Method("kronecker"),
    "costs": Method("kronecker", correlated=True),
    "surgeon": Method("kronecker", correlated=True, update=True),
}
STRUCTURES = ("rows and columns", "2:4", "elements")


@dataclass(frozen=True)
class Layer:
    """What of a projection is alive, and its curvature; dead rows and columns can't make up."""

    whole: Tensor
    given: Factors
    method: Method
    damping: float = 0.01

    @cached_property
    def rows(self) -> Tensor:
        """(out,) bool: rows with a weight that is not zero."""
        return self.whole.any(1)

    @cached_property
    def columns(self) -> Tensor:
        """(in,) bool."""
        return self.whole.any(0)

    @cached_property
    def weight(self) -> Tensor:
        """The alive part, in double precision."""
        return self.whole[self.rows][:, self.columns].double()

    @cached_property
    def factors(self) -> Factors:
        """Of the alive part."""
        inputs = self.given.inputs[self.columns][:, self.columns]
        return Factors(inputs.double(), self.given.outputs[self.rows][:, self.rows].double())

    @cached_property
    def inverses(self) -> Factors:
        """A^-1 and G^-1, damped; those of the diagonals where the method knows no correlations."""
        inverse = self._damped if self.method.correlated else _of_diagonal
        return Factors(inverse(self.factors.inputs), inverse(self.factors.outputs))

    def _damped(self, matrix: Tensor) -> Tensor:
        if not len(matrix):
            return matrix
        mean = matrix.diagonal().mean()
        one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        # (M + 0.01 mean(M_ii) 1)^-1
        return torch.cholesky_inverse(
            torch.linalg.cholesky(matrix + (self.damping * mean + 1e-30) * one)
        )

    def costs(self) -> tuple[Tensor, Tensor]:
        """Of all rows (out,) and columns (in,), 0 for dead ones."""
        rows = row_costs(self.weight, self.factors.inputs, self.inverses.outputs)
        columns = column_costs(self.weight, self.factors.outputs, self.inverses.inputs)
        return _spread(rows, self.rows), _spread(columns, self.columns)

    def element_costs(self) -> Tensor:
        """Of all weights (out, in), 0 for dead ones."""
        costs = torch.zeros_like(self.whole, dtype=torch.double)
        alive = element_costs(self.weight, self.inverses.inputs, self.inverses.outputs)
        return costs.masked_scatter_(torch.outer(self.rows, self.columns), alive)

    def without(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The weight (out, in) after rows (out,) bool and columns (in,) bool are gone."""
        if not self.method.update:
            return self.whole.masked_fill(rows[:, None] | columns, 0.0)
        kept = without_rows(self.weight, rows[self.rows], self.inverses.outputs)
        return self._whole(without_columns(kept, columns[self.columns], self.inverses.inputs))

    def without_elements(self, gone: Tensor, max_correlate: int) -> Tensor:
        """The weight after single weights, (out, in) bool, are gone."""
        if not self.method.update:
            return self.whole.masked_fill(gone, 0.0)
        part = gone[self.rows][:, self.columns]
        sides = (self.inverses.inputs, self.inverses.outputs)
        return self._whole(without_elements(self.weight, part, *sides, max_correlate))

    def _whole(self, alive: Tensor) -> Tensor:
        place = torch.outer(self.rows, self.columns)
        return torch.zeros_like(self.whole).masked_scatter_(place, alive.to(self.whole.dtype))


def _of_diagonal(matrix: Tensor) -> Tensor:
    return torch.diag(1 / matrix.diagonal())


def _spread(values: Tensor, alive: Tensor) -> Tensor:
    whole = torch.zeros(len(alive), dtype=values.dtype, device=values.device)
    return whole.masked_scatter_(alive, values)


def curvatures(model: nn.Module, rows: Tensor, method: str, *roles: str) -> dict[str, Factors]:
    """Name -> factors of each projection, as a method sees them.

    Raises ValueError for a method that is none of METHODS.
    """
    if method not in METHODS:
        raise ValueError(f"{method!r} is none of {', '.join(METHODS)}")
    kind = METHODS[method].curvature
    if kind == "kronecker":
        return kronecker_factors(model, rows, *roles)
    found = {}
    seen = input_norms(model, rows, *roles) if kind == "inputs" else {}
    for name, layer in anatomy.projections(model, *roles).items():
        (out, size), place = layer.weight.shape, layer.weight.device
        inputs = torch.diag(seen[name].square()) if seen else torch.eye(size, device=place)
        found[name] = Factors(inputs, torch.eye(out, device=place))
    return found


def layers_of(
    model: nn.Module, factors: Mapping[str, Factors], method: str, damping: float = 0.01
) -> dict[str, Layer]:
    """Name -> what a method sees of each projection that `factors` names."""
    return {
        name: Layer(model.get_submodule(name).weight.detach(), given, METHODS[method], damping)
        for name, given in factors.items()
    }


def pruned(
    layers: Mapping[str, Layer],
    sparsity: float,
    structure: str = "rows and columns",
    max_correlate: int = 1024,
) -> dict[str, Tensor]:
    """Name -> weight (out, in) after one shot, so that this share of all weights is gone.

    Raises ValueError for a structure that is none of STRUCTURES, and for 2:4 beyond a half.
    """
    if structure == "rows and columns":
        costs = {name: layer.costs() for name, layer in layers.items()}
        limit = global_threshold(costs, sparsity)
        gone = {n: (rows <= limit, columns <= limit) for n, (rows, columns) in costs.items()}
        return {name: layer.without(*gone[name]) for name, layer in layers.items()}
    single = {name: layer.element_costs() for name, layer in layers.items()}
    if structure == "2:4":
        masks = two_of_four(single, sparsity)
    elif structure == "elements":
        limit = _limit(torch.cat([cost.flatten() for cost in single.values()]), sparsity)
        masks = {name: cost <= limit for name, cost in single.items()}
    else:
        raise ValueError(f"{structure!r} is none of {', '.join(STRUCTURES)}")
    return {n: layer.without_elements(masks[n], max_correlate) for n, layer in layers.items()}


def two_of_four(costs: Mapping[str, Tensor], sparsity: float = 0.5) -> dict[str, Tensor]:
    """Name -> which weights go, (out, in) bool: two of four neighbours, cheapest fours first.

    Raises ValueError when more than half shall go.
    """
    if not 0 <= sparsity <= 0.5:
        raise ValueError(f"two of four is half, and no sparsity of {sparsity}")
    masks = {name: cheapest_two(cost) for name, cost in costs.items()}
    block = {n: (cost * masks[n]).unflatten(1, (-1, 4)).sum(2) for n, cost in costs.items()}
    limit = _limit(torch.cat([sums.flatten() for sums in block.values()]), 2 * sparsity)
    return {n: masks[n] & (block[n] <= limit).repeat_interleave(4, 1) for n in masks}


def _limit(costs: Tensor, share: float) -> float:
    """The cost up to which this share of them goes."""
    count = int(share * len(costs))
    return costs.sort().values[count - 1].item() if count else -1.0


@torch.no_grad()
def shot_(model: nn.Module, rows: Tensor, sparsity: float, *roles: str, method="surgeon", **how):
    """One shot, in place: measure curvature on rows (n, length + 1), then prune to a sparsity.

    how: structure and max_correlate, as `pruned` takes them. Weights that were zero stay so and
    count. Returns the model.
    """
    seen = layers_of(model, curvatures(model, rows, method, *roles), method)
    for name, weight in pruned(seen, sparsity, **how).items():
        model.get_submodule(name).weight.copy_(weight)
    return model


@torch.no_grad()
def costs_by_blocks(
    model: nn.Module, rows: Tensor, method: str, *roles: str, at_once: int = 5
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> costs of rows (out,) and of columns (in,), curvature of a few blocks at a time.

    For a method with Kronecker factors. All of SmolLM2's projections take less than 1.6 GB so.
    """
    costs = {}
    for factors in by_blocks(model, rows, *roles, at_once=at_once, batch=1):
        costs |= _each(model, factors, method, lambda name, layer: layer.costs())
    return costs


@torch.no_grad()
def shot_by_blocks_(
    model: nn.Module,
    rows: Tensor,
    sparsity: float,
    *roles: str,
    method: str = "surgeon",
    at_once: int = 5,
) -> nn.Module:
    """`shot_` for a model whose curvature takes too much memory: a few blocks at a time, twice.

    First all costs, for the one threshold; then new weights, put in their place when the last
    curvature is measured. Rows and columns, by a method with Kronecker factors. Returns the model.
    """
    costs = costs_by_blocks(model, rows, method, *roles, at_once=at_once)
    limit = global_threshold(costs, sparsity)
    gone = {name: tuple(side <= limit for side in sides) for name, sides in costs.items()}
    new: dict[str, Tensor] = {}
    for factors in by_blocks(model, rows, *roles, at_once=at_once, batch=1):
        new |= _each(model, factors, method, lambda name, layer: layer.without(*gone[name]))
    for name, weight in new.items():
        model.get_submodule(name).weight.copy_(weight)
    return model


def _each(model: nn.Module, factors: dict, method: str, take: Callable[[str, Layer], Any]) -> dict:
    """What is taken of each layer, made and let go one by one: its inverses are kept with it."""
    return {
        name: take(name, layers_of(model, {name: factors.pop(name)}, method)[name])
        for name in list(factors)
    }


def prune_(
    model: nn.Module,
    rows: Tensor,
    sparsity: float,
    *roles: str,
    shots: int = 5,
    method: str = "surgeon",
    between: Callable[[nn.Module], object] | None = None,
    **how,
) -> nn.Module:
    """Several shots, in place, sparsity rising linearly; the paper takes 40 to 50 %.

    between: called with the model after each shot, to train low-rank corrections, say, as the
    authors' code can; what was removed is zero again afterwards. Returns the model.
    """
    for shot in range(1, shots + 1):
        shot_(model, rows, sparsity * shot / shots, *roles, method=method, **how)
        if between is not None:
            weights = [layer.weight for layer in anatomy.projections(model, *roles).values()]
            alive = [weight != 0 for weight in weights]
            between(model)
            with torch.no_grad():
                for weight, mask in zip(weights, alive, strict=True):
                    weight.mul_(mask)
    return model


@torch.no_grad()
def drop_neurons_(model: nn.Module) -> nn.Module:
    """Take out each neuron whose column in "down" is zero: it writes nothing. Returns the model.

    In place, a matrix at a time, and blocks may differ; `structures.sliced` makes a copy. A zero
    row saves nothing here: it writes to the stream that all blocks share.
    """
    for block in range(len(anatomy.blocks(model))):
        alive = anatomy.projection(model, block, "down").weight.any(0)
        if alive.all():
            continue
        for role in ("gate", "up", "down"):
            layer = anatomy.projection(model, block, role)
            kept = layer.weight[:, alive] if role == "down" else layer.weight[alive]
            layer.weight = nn.Parameter(kept, requires_grad=layer.weight.requires_grad)
            layer.out_features, layer.in_features = kept.shape
            if layer.bias is not None and role != "down":
                layer.bias = nn.Parameter(layer.bias[alive])
    return model


def published(text: str = "wikitext-2") -> dict[int, float]:
    """Sparsity, % -> right answers of Llama-2-7B, %, as a later paper has them; 0 is the whole.

    `data/published/llm-surgeon.csv`; the paper's own tables were not found.
    """
    path = data_dir() / "published" / "llm-surgeon.csv"
    rows = csv.DictReader(path.read_text("utf-8").splitlines())
    kept = [row for row in rows if row["what"].startswith("Llama") and row["text"] in ("", text)]
    return {int(row["sparsity"]): float(row["value"]) for row in kept}
