"""Scaling law considering batch size (Shuai et al., 2024): which batch, for how much text?

Lab 405. At fixed data and at fixed compute the loss has a valley over the logarithm of the batch,
once the learning rate is tuned for each batch. How its bottom moves is the law. The printed values
are in `data/published/batch-size-law.csv`; how sizes and data share compute is
`lablib.scaling.laws`. A run is a mapping with N, tokens (seen), batch (tokens a step), lr and loss.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from lablib.paths import data_dir
from lablib.scaling.critical_batch_size import printed_critical
from lablib.scaling.curves import around, valley
from lablib.scaling.step_law import step_law

Run = Mapping[str, Any]
Number = float | np.ndarray


class Bottom(NamedTuple):
    """Of a valley: where, how deep, how narrow (the loss's second derivative in ln x).

    inside: whether it lies among the x that were tried; else it is the end next to it.
    """

    x: float
    loss: float
    curvature: float
    inside: bool


def bottom(x: Sequence[float], loss: Sequence[float], points: int = 5) -> Bottom:
    """The bottom of loss over ln x, by least squares through points near the best.

    Raises ValueError for fewer than 3 different x, or x that are not above 0.
    """
    u, loss = _sorted(x, loss)
    near = around(int(loss.argmin()), points, len(u))
    # L = a u^2 + b u + c,  u = ln x
    a, b, c = np.polyfit(u[near], loss[near], 2)
    # dL/du = 0 at u = -b / 2a
    place = -b / (2 * a) if a > 0 else np.nan
    if u[0] <= place <= u[-1]:
        return Bottom(float(np.exp(place)), float(c - b**2 / (4 * a)), float(2 * a), True)
    end = 0 if loss[0] < loss[-1] else -1
    return Bottom(float(np.exp(u[end])), float(loss[end]), float("nan"), False)


def _sorted(x: Sequence[float], loss: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    x, loss = (np.asarray(column, float) for column in (x, loss))
    if x.shape != loss.shape or len(np.unique(x)) < max(3, len(x)) or not (x > 0).all():
        raise ValueError(f"{x.tolist()}: give 3 or more different x above 0, each with one loss")
    order = x.argsort()
    return np.log(x[order]), loss[order]


class Tuned(NamedTuple):
    """Each batch with the rate that suits it: batches, rates and losses, (batches,) each."""

    batch: np.ndarray
    lr: np.ndarray
    loss: np.ndarray


def tuned(runs: Sequence[Run]) -> Tuned:
    """The rate tuned for each batch, by a valley over three rates or more.

    Where the best rate is the first or the last, that run is taken as it is.
    """
    rows = []
    for batch in sorted({run["batch"] for run in runs}):
        tried = [(run["lr"], run["loss"]) for run in runs if run["batch"] == batch]
        found = valley(*zip(*tried))
        best = min(tried, key=lambda pair: pair[1])
        rows.append((batch, *((found.x, found.loss) if found.bracketed else best)))
    return Tuned(*np.array(rows, float).T)


class Optimum(NamedTuple):
    """What is best for N parameters and D tokens: batch, its loss, and the steps D / batch."""

    N: float
    D: float
    batch: float
    loss: float
    inside: bool

    @property
    def compute(self) -> float:
        """6 N D FLOPs."""
        return 6 * self.N * self.D

    @property
    def steps(self) -> float:
        """S = D / B."""
        return self.D / self.batch


def optimal_batch(runs: Sequence[Run], hold: str = "data", points: int = 5) -> list[Optimum]:
    """The best batch of each (N, D), or of each budget of compute.

    hold: "data", one for every N and D, in order of D; "compute", those of them that no other
    undercuts for as little compute, in its order. Raises ValueError for another.
    """
    if hold not in ("data", "compute"):
        raise ValueError(f"hold is {hold!r}: 'data' or 'compute'")
    found = []
    for N, D in sorted({(run["N"], run["tokens"]) for run in runs}, key=lambda at: at[::-1]):
        rows = tuned([run for run in runs if (run["N"], run["tokens"]) == (N, D)])
        at = bottom(rows.batch, rows.loss, points)
        found.append(Optimum(N, D, at.x, at.loss, at.inside))
    return found if hold == "data" else frontier(found)


def frontier(optima: Sequence[Optimum]) -> list[Optimum]:
    """Those of less loss than all that take no more compute, in its order."""
    kept: list[Optimum] = []
    for one in sorted(optima, key=lambda one: (one.compute, one.loss)):
        if not kept or one.loss < kept[-1].loss:
            kept.append(one)
    return kept


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The b of y = a x^b, by least squares in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def predict_batch(optima: Sequence[Optimum], D: float) -> float:
    """The batch for D tokens by B = a D^b, fitted to smaller amounts of text."""
    b, log_a = np.polyfit(*np.log([(one.D, one.batch) for one in optima]).T, 1)
    return float(np.exp(log_a + b * np.log(D)))


def fit_gamma(runs: Sequence[Run]) -> float:
    """gamma of LR_opt ~ B^gamma, from all runs of one N and D.

    Least squares of L = F_B + q (ln lr)^2 + (p + m ln B) ln lr: each batch has a floor F_B of its
    own, all have one valley over ln lr, whose bottom -(p + m ln B) / 2q moves with B.
    Raises ValueError when the runs have no valley over the rate.
    """
    batch, lr, loss = (
        np.array([run[key] for run in runs], float) for key in ("batch", "lr", "loss")
    )
    floors = batch[:, None] == np.unique(batch)
    y = np.log(lr)
    columns = np.column_stack([floors, y**2, y, np.log(batch) * y])
    *_, q, _, m = np.linalg.lstsq(columns, loss, rcond=None)[0]
    if not q > 0:
        raise ValueError("the loss has no valley over the learning rate: try rates further apart")
    return float(-m / (2 * q))


def rate_for(batch: Number, gamma: float, at_batch: float, at_rate: float) -> Number:
    """The rate for another batch: at_rate (B / B_0)^gamma. gamma 1/2 is the square-root rule."""
    return at_rate * (batch / at_batch) ** gamma


def loss_off(ratio: Number, curvature: float) -> Number:
    """Nats lost with a batch `ratio` times the best: curvature / 2 (ln ratio)^2."""
    return curvature / 2 * np.log(ratio) ** 2


def loss_at(batch: float, runs: Sequence[Run], points: int = 5) -> float:
    """The loss of a batch, rate tuned, on the parabola of the valley's bottom.

    A batch beyond those that were tried has the loss of the last one. Where no bottom is among
    them, straight lines in ln B stand in for the parabola.
    """
    rows = tuned(runs)
    at = bottom(rows.batch, rows.loss, points)
    batch = float(np.clip(batch, rows.batch[0], rows.batch[-1]))
    if not at.inside:
        return float(np.interp(np.log(batch), np.log(rows.batch), rows.loss))
    return at.loss + float(loss_off(batch / at.x, at.curvature))


@lru_cache
def published() -> Mapping[str, float]:
    """The values of `data/published/batch-size-law.csv` by name."""
    with (data_dir() / "published" / "batch-size-law.csv").open(encoding="utf-8") as file:
        return MappingProxyType({r["name"]: float(r["value"]) for r in csv.DictReader(file)})


def printed_batch(D: Number) -> Number:
    """Tokens a step for D tokens of text: B_opt = 3.24e3 D^0.264."""
    at = published()
    return at["B_c"] * D ** at["B_D"]


RIVALS = ("Zhang et al., 2024", "Li et al., 2025")


def recommended(D: Number) -> dict[str, Number]:
    """What three papers take for a good batch, in tokens, by paper.

    Zhang et al. (lab 406) have the batch from which a larger one costs 20 % more; Li et al. (lab
    407) the best one after rate and batch are tuned together.
    """
    rivals = printed_critical(D), step_law(1.0, D).batch  # of Step Law's, the size changes nothing
    return {"Shuai et al., 2024": printed_batch(D), **dict(zip(RIVALS, rivals))}
