"""Step Law (Li et al., 2025): the best learning rate and batch for N parameters and D tokens.

Lab 407. The law and its rivals are those of the paper's Table 1, each a function of N and D; how
it was fitted is the authors' `code/fit_tool.py` (repository step-law/steplaw): a regression in
logarithms on all runs within 0.25 % of the best of their N and D. A run is a mapping with N, tokens
(seen), lr, batch (tokens a step) and loss. The printed values are in
`data/published/step-law.csv`. Two of the table's laws are missing here: MeiTuan's (Wang et al.,
2024) has the form lambda L^-alpha, and MiniCPM's gives a batch; both need the loss L, and of the
first no constants are printed.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from lablib.paths import data_dir
from lablib.scaling.curves import around

Run = Mapping[str, Any]
Number = float | np.ndarray


class Choice(NamedTuple):
    """A peak learning rate, and a batch in tokens; None where a law has nothing to say of it."""

    lr: Number
    batch: Number | None


def step_law(N: Number, D: Number) -> Choice:
    """N: parameters without embedding and head. D: tokens of training."""
    # eta(N, D) = 1.79 N^-0.713 D^0.307
    lr = 1.79 * N**-0.713 * D**0.307
    # B(D) = 0.58 D^0.571
    return Choice(lr, 0.58 * D**0.571)


def openai_law(N: Number, D: Number) -> Choice:
    """eta = 3.239e-3 - 1.395e-4 ln N; the batch is a function of the loss. Kaplan et al. (2020)."""
    return Choice(3.239e-3 - 1.395e-4 * np.log(N), None)


def microsoft_law(N: Number, D: Number) -> Choice:
    """eta = 1.55e-3 N^-0.23 D^-0.32, both in billions. Bjorck et al. (2024)."""
    return Choice(1.55e-3 * (N / 1e9) ** -0.23 * (D / 1e9) ** -0.32, None)


def deepseek_law(N: Number, D: Number) -> Choice:
    """eta = 0.3118 C^-0.125, B = 0.2920 C^0.3271, C = 6 N D. DeepSeek-AI (2024)."""
    C = 6 * N * D
    return Choice(0.3118 * C**-0.125, 0.2920 * C**0.3271)


def porian_law(N: Number, D: Number) -> Choice:
    """eta = 3.7 N^-0.36, B = 0.7576 N^0.703. Porian et al. (2024)."""
    return Choice(3.7 * N**-0.36, 0.7576 * N**0.703)


LAWS: Mapping[str, Callable[[Number, Number], Choice]] = MappingProxyType(
    {
        "Step Law": step_law,
        "OpenAI": openai_law,
        "Microsoft": microsoft_law,
        "DeepSeek": deepseek_law,
        "Porian": porian_law,
    }
)


def near_optimal(runs: Sequence[Run], within: float = 0.0025) -> list[Run]:
    """Runs whose loss is at most this share above the best of their N and D. Section 3."""
    best: dict[tuple, float] = {}
    for run in runs:
        cell = run["N"], run["tokens"]
        best[cell] = min(run["loss"], best.get(cell, np.inf))
    return [r for r in runs if r["loss"] <= (1 + within) * best[r["N"], r["tokens"]]]


def columns(runs: Sequence[Run]) -> dict[str, np.ndarray]:
    """N, D and C = 6 N D of each run: (runs,) each."""
    N, D = (np.array([run[key] for run in runs], float) for key in ("N", "tokens"))
    return {"N": N, "D": D, "C": 6 * N * D}


@dataclass(frozen=True)
class Fitted:
    """eta and B, each a constant times powers of some of N, D and C."""

    lr: Mapping[str, float]
    batch: Mapping[str, float]

    def __call__(self, N: Number, D: Number) -> Choice:
        """The choice of the fitted law."""
        at = {"N": np.asarray(N, float), "D": np.asarray(D, float)}
        at["C"] = 6 * at["N"] * at["D"]
        return Choice(*(_product(powers, at) for powers in (self.lr, self.batch)))


def _product(powers: Mapping[str, float], at: Mapping[str, np.ndarray]) -> np.ndarray:
    logs = [power * np.log(at[name]) for name, power in powers.items() if name != "constant"]
    return np.exp(powers["constant"] + sum(logs, np.zeros(())))


def fit_law(
    runs: Sequence[Run], lr: Sequence[str] = ("N", "D"), batch: Sequence[str] = ("D",)
) -> Fitted:
    """Least squares in logarithms: ln eta and ln B over a constant and the logarithms named.

    lr, batch: which of N, D and C each depends on. Give it near-optimal runs, as the authors do.
    Raises ValueError when the runs can't tell them apart.
    """
    at = columns(runs)
    made = []
    for names, key in ((lr, "lr"), (batch, "batch")):
        x = np.column_stack([np.ones(len(runs)), *(np.log(at[name]) for name in names)])
        y = np.log([run[key] for run in runs])
        values, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
        if rank < x.shape[1]:
            raise ValueError(f"{len(runs)} runs can't tell the powers of {', '.join(names)} apart")
        made.append(dict(zip(("constant", *names), values.tolist())))
    return Fitted(*made)


def bootstrap(runs: Sequence[Run], n: int = 200, seed: int = 0, **names) -> list[Fitted]:
    """Laws fitted to runs drawn again with replacement, as the authors' intervals are made."""
    draws = np.random.default_rng(seed).integers(len(runs), size=(n, len(runs)))
    return [fit_law([runs[place] for place in draw], **names) for draw in draws]


@dataclass(frozen=True)
class Surface:
    """Loss as a quadratic of x = ln eta and y = ln B: a bowl, when both eigenvalues are above 0.

    center: (2,) means of x and y; constant, gradient (2,) and hessian (2, 2) at it. low, high:
    (2,) the smallest and the largest x and y that were tried.
    """

    center: np.ndarray
    constant: float
    gradient: np.ndarray
    hessian: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def eigenvalues(self) -> np.ndarray:
        """Of the Hessian, the smaller first."""
        return np.linalg.eigvalsh(self.hessian)

    def loss(self, lr: Number, batch: Number) -> Number:
        """At any rate and batch, also beyond those that were tried."""
        x = np.stack(np.broadcast_arrays(np.log(lr), np.log(batch)), -1) - self.center  # (..., 2)
        return self.constant + x @ self.gradient + ((x @ self.hessian) * x).sum(-1) / 2

    def best(self) -> Choice:
        """The bottom of the bowl. Raises ValueError when the surface has none."""
        if not self.eigenvalues[0] > 0:
            raise ValueError("the surface has no bottom: it falls in some direction for ever")
        return Choice(*np.exp(self.center - np.linalg.solve(self.hessian, self.gradient)))

    def inside(self, choice: Choice) -> Choice:
        """The choice, moved to the nearest rate and batch that were tried."""
        x = np.clip(np.log([float(choice.lr), float(choice.batch)]), self.low, self.high)
        return Choice(*np.exp(x))

    def lowest(self) -> Choice:
        """Where the surface is lowest among what was tried: its bottom, or a point of the edge."""
        if self.eigenvalues[0] > 0:
            bottom = np.log([float(value) for value in self.best()])
            if (self.low <= bottom).all() and (bottom <= self.high).all():
                return Choice(*np.exp(bottom))
        edges = [self._lowest_at(axis, end) for axis in (0, 1) for end in (self.low, self.high)]
        return min((Choice(*np.exp(x)) for x in edges), key=lambda at: self.loss(*at))

    def _lowest_at(self, axis: int, end: np.ndarray) -> np.ndarray:
        """The lowest point (2,) of the edge on which x[axis] is end[axis]."""
        other = 1 - axis
        held = end[axis] - self.center[axis]
        slope, bend = self.gradient[other] + held * self.hessian[0, 1], self.hessian[other, other]
        tried = [self.low[other], self.high[other]]
        if bend > 0:  # the slope along the edge is 0 at center - slope / bend
            tried.append(np.clip(self.center[other] - slope / bend, *tried))
        x = np.tile(end, (len(tried), 1))  # x[other] is replaced, x[axis] stays
        x[:, other] = tried
        return x[self.loss(*np.exp(x.T)).argmin()]


def quadratic_surface(runs: Sequence[Run], batches: int = 5) -> Surface:
    """Least squares of L = c + g x + x H x / 2 over runs of one N and D. Section 4.

    Of all batches so many count as lie nearest the best run's: far from it the loss is no parabola.
    Raises ValueError when there are too few rates or batches for it.
    """
    runs = _near_best(runs, batches)
    x = np.log([[run["lr"], run["batch"]] for run in runs])  # (runs, 2)
    center = x.mean(0)
    a, b = (x - center).T
    terms = np.column_stack([np.ones(len(a)), a, b, a * a / 2, a * b, b * b / 2])
    loss = np.array([run["loss"] for run in runs])
    values, _, rank, _ = np.linalg.lstsq(terms, loss, rcond=None)
    if rank < 6:
        raise ValueError(f"{len(runs)} runs do not tell a quadratic: 3 rates and 3 batches do")
    c, *g, aa, ab, bb = values
    hessian = np.array([[aa, ab], [ab, bb]])
    return Surface(center, float(c), np.array(g), hessian, x.min(0), x.max(0))


def _near_best(runs: Sequence[Run], batches: int) -> list[Run]:
    tried = sorted({run["batch"] for run in runs})
    best = tried.index(min(runs, key=lambda run: run["loss"])["batch"])
    kept = tried[around(best, batches, len(tried))]
    return [run for run in runs if run["batch"] in kept]


def regret(choice: Choice, surface: Surface) -> float:
    """Loss at the choice over the least loss among what was tried, minus 1.

    Both are read off the surface; a choice beyond what was tried is moved to its edge.
    """
    at, best = surface.inside(choice), surface.lowest()
    return float(surface.loss(*at) / surface.loss(*best) - 1)


def plateau(surface: Surface, within: float = 0.0025) -> float:
    """Area in (ln eta, ln B) where the loss is at most this share above the least: an ellipse.

    With the loss at least L and H its Hessian, pi 2 (within L) / sqrt(det H).
    """
    least = float(surface.loss(*surface.best()))
    return 2 * np.pi * within * least / float(np.sqrt(np.linalg.det(surface.hessian)))


def along(
    compute: np.ndarray, law: Callable[[Number, Number], Choice] = step_law, ratio: float = 20.0
) -> tuple[float, float]:
    """Exponents of compute in a law's rate and batch where D = ratio N: (rate, batch)."""
    N = np.sqrt(compute / (6 * ratio))
    chosen = law(N, ratio * N)
    x = np.log(compute)
    return tuple(float(np.polyfit(x, np.log(value), 1)[0]) for value in chosen)


@lru_cache
def published() -> Mapping[str, float]:
    """The values of `data/published/step-law.csv` by name."""
    with (data_dir() / "published" / "step-law.csv").open(encoding="utf-8") as file:
        return MappingProxyType({r["name"]: float(r["value"]) for r in csv.DictReader(file)})
