"""What is read off measured curves: valleys, envelopes, steps to a loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Valley(NamedTuple):
    """The vertex of a parabola through loss against log x.

    x, loss: of the vertex; nan when there is no minimum inside the range. curvature: of loss in
    log x. bracketed: whether the vertex lies strictly between the smallest and the largest x.
    """

    x: float
    loss: float
    curvature: float
    bracketed: bool


def valley(x: Sequence[float], loss: Sequence[float], points: int = 3) -> Valley:
    """The minimum of loss over log x, by a parabola through the best value and its neighbours.

    points: how many x nearest to the best are used, 3 or more: more than 3 by least squares.
    At the end of the range, or where the parabola has no minimum among these points, there is none:
    never an extrapolated vertex. Raises ValueError for fewer than 3 different x, or x not positive.
    """
    x, loss = (np.asarray(column, float) for column in (x, loss))
    if x.shape != loss.shape or len(np.unique(x)) < max(3, points) or points < 3:
        raise ValueError(
            f"a parabola of {points} points needs as many different x, each with one loss"
        )
    if not (x > 0).all():
        raise ValueError("a logarithm needs x above 0")
    order = np.argsort(x)
    x, loss = np.log(x[order]), loss[order]
    best = int(np.argmin(loss))
    if best in (0, len(x) - 1):
        return Valley(np.nan, np.nan, np.nan, False)
    near = around(best, points, len(x))
    a, b, c = np.polyfit(x[near] - x[best], loss[near], 2)
    place = -b / (2 * a) if a > 0 else np.inf
    if not x[near][0] < x[best] + place < x[near][-1]:
        return Valley(np.nan, np.nan, np.nan, False)
    return Valley(float(np.exp(x[best] + place)), float(c - b**2 / (4 * a)), float(2 * a), True)


def around(place: int, count: int, total: int) -> slice:
    """The `count` of `total` places nearest to one; all of them where there are no more."""
    first = int(np.clip(place - count // 2, 0, max(0, total - count)))
    return slice(first, first + count)


class Frontier(NamedTuple):
    """The lower envelope of several curves: compute, loss and which curve touches it, (m,) each."""

    compute: np.ndarray
    loss: np.ndarray
    curve: np.ndarray


def frontier(curves: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Frontier:
    """The least loss that any curve has reached with at most so much compute.

    curves: (compute, loss) each, compute rising. A point stays when no other has less loss for no
    more compute.
    """
    points = [
        (compute, loss, which)
        for which, curve in enumerate(curves)
        for compute, loss in zip(*curve, strict=True)
    ]
    kept, best = [], np.inf
    for compute, loss, which in sorted(points):
        if loss < best:
            kept.append((compute, loss, which))
            best = loss
    columns = [np.array(column) for column in zip(*kept)] or [np.array([])] * 3
    return Frontier(*columns)


def first_below(x: Sequence[float], loss: Sequence[float], target: float) -> float:
    """The x at which a curve first reaches a loss, interpolated in log x; nan when it never does.

    The first point counts as reached when it lies below already: then its x comes back.
    """
    x, loss = np.asarray(x, float), np.asarray(loss, float)
    below = np.flatnonzero(loss <= target)
    if not len(below):
        return float("nan")
    at = int(below[0])
    if at == 0:
        return float(x[0])
    share = (loss[at - 1] - target) / (loss[at - 1] - loss[at])
    return float(np.exp(np.log(x[at - 1]) + share * (np.log(x[at]) - np.log(x[at - 1]))))
