"""Fitting a law to runs, and how far to believe the fit.

Three traps, each of which has produced a wrong paper:
- The objective is the *sum* of the Huber terms. Their mean is of the order of 1e-6, and L-BFGS at
  its default tolerance stops there before it has begun (Besiroglu et al., 2024, found it in
  Hoffmann et al., 2022).
- A handful of runs far from all others can move an exponent a long way: show the fit without them.
- An interval that is narrow because residuals were treated as exact is no interval: draw whole runs
  again (`bootstrap`), or let the noise between seeds say how much worse a fit may be (`profile`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lablib.scaling.laws import Law, Parameter

LOSSES = ("log-huber", "log-squares", "squares")
TRIED = 10  # starts that are followed to their end: the best of all, judged where they begin
SAME = 0.01  # relative difference of objectives that count as one optimum
Table = Mapping[str, Any]  # name of a column -> (m,) numbers


def table(runs: Sequence[Mapping[str, Any]], **columns: str) -> dict[str, np.ndarray]:
    """Columns of a list of runs: table(runs, N="N", D="tokens", loss="loss")."""
    return {name: np.array([run[key] for run in runs], float) for name, key in columns.items()}


@dataclass(frozen=True)
class Fit:
    """A law fitted to a table.

    values: by parameter. objective: the sum of the loss over the rows. agreeing, tried: how many of
    the starts that were followed ended within 1 % of the best objective. warning: names parameters
    that sit on a bound; empty when there is none.
    """

    law: Law
    values: dict[str, float]
    objective: float
    agreeing: int
    tried: int
    warning: str
    table: dict[str, np.ndarray]
    target: str
    loss: str
    delta: float
    fixed: dict[str, float] = field(default_factory=dict)

    def predict(self, **columns: float | np.ndarray) -> np.ndarray:
        """The law's predictions."""
        return self.law(self.values, **columns)

    @property
    def residuals(self) -> np.ndarray:
        """log prediction - log measured, one a row."""
        predicted = self.predict(**{name: self.table[name] for name in self.law.columns})
        return np.log(predicted) - np.log(self.table[self.target])

    def again(self, **changes: Any) -> Fit:
        """The same fit with another table or other fixed values, begun at this one's end."""
        given = {"loss": self.loss, "delta": self.delta, "fixed": self.fixed} | changes
        rows = given.pop("table", self.table)
        return fit(self.law, rows, self.target, **given, starts=[self.values])


def fit(
    law: Law,
    table: Table,
    target: str,
    *,
    loss: str = "log-huber",
    delta: float = 1e-3,
    fixed: Mapping[str, float] | None = None,
    starts: Sequence[Mapping[str, float]] | None = None,
    weights: np.ndarray | None = None,
) -> Fit:
    """The law's parameters of least loss, from many starts.

    The objective is taken at every start of the law's grid, L-BFGS follows the best 10 of them, and
    Newton's method brings the best end to where the gradient vanishes. Gradients by autograd in
    float64; positive parameters are fitted as logarithms.
    table: (m,) positive numbers for each of the law's columns and for `target`.
    loss: "log-huber", Huber's loss of `delta` on log residuals (Hoffmann et al., 2022, appendix
        D.3); "log-squares"; or "squares" of plain residuals. Each is summed, with a factor 1/2.
    delta: where Huber's loss turns from squares to sizes. 1e-3 is Hoffmann et al.'s; on the grid of
        this theme seeds differ by more, so that nearly all residuals count by size (lab 401).
    fixed: parameters that are held. starts: values by parameter to begin at, in the grid's place.
    weights: (m,), how often each row counts.
    Raises ValueError for another loss, rows that are no positive numbers or too few, and unknown
    parameters.
    """
    fixed = dict(fixed or {})
    rows = _checked(law, table, target, loss, fixed)
    objective = _Objective(law, rows, target, loss, delta, fixed, weights)
    begin = objective.begin(starts)
    ends = [objective.descend(theta) for theta in begin]
    finite = [end for end in ends if np.isfinite(end[1])]
    if not finite:
        raise ValueError(f"no start of the law {law.name!r} led anywhere: give starts of your own")
    best = objective.polish(*min(finite, key=lambda end: end[1]))
    agreeing = sum(end[1] <= best[1] * (1 + SAME) + 1e-15 for end in finite)
    values = objective.values(best[0])
    warning = objective.on_bounds(best[0])
    return Fit(law, values, best[1], agreeing, len(ends), warning, rows, target, loss, delta, fixed)


def _checked(law: Law, table: Table, target: str, loss: str, fixed) -> dict[str, np.ndarray]:
    if loss not in LOSSES:
        raise ValueError(f"loss {loss!r} is none of {', '.join(LOSSES)}")
    if unknown := set(fixed) - set(law.names):
        raise ValueError(f"{law.name!r} has no parameter {min(unknown)!r}: {', '.join(law.names)}")
    rows = {name: np.asarray(table[name], float) for name in (*law.columns, target)}
    sizes = {column.shape for column in rows.values()}
    if len(sizes) > 1 or rows[target].ndim != 1:
        raise ValueError(f"columns are of one length each, not {sorted(sizes)}")
    for name, column in rows.items():
        if not (np.isfinite(column).all() and (column >= 0).all()):
            raise ValueError(f"column {name!r} holds something that is no positive number")
    free = len(law.names) - len(fixed)
    if len(rows[target]) < free:
        raise ValueError(f"{len(rows[target])} rows can't tell {free} parameters")
    return rows


class _Objective:
    """The summed loss as a function of the free parameters, each made unbounded."""

    def __init__(self, law, rows, target, loss, delta, fixed, weights):
        self.law, self.loss, self.delta = law, loss, delta
        self.columns = {n: torch.from_numpy(rows[n]) for n in law.columns}
        self.target = torch.from_numpy(rows[target])
        self.weights = None if weights is None else torch.from_numpy(np.asarray(weights, float))
        self.free = [p for p in law.parameters if p.name not in fixed]
        self.fixed = {n: torch.tensor(v, dtype=torch.float64) for n, v in fixed.items()}
        self.bounds = [_raw(p, np.array([p.low, p.high])) for p in self.free]

    def __call__(self, theta: Tensor) -> Tensor:
        """(..., parameters) -> (...,)."""
        at = {p.name: _natural(p, theta[..., i, None]) for i, p in enumerate(self.free)}
        predicted = self.law.log_value(at | self.fixed, self.columns)  # (..., m)
        if self.loss == "squares":
            terms = (predicted.exp() - self.target).square() / 2
        else:
            terms = self.terms(predicted - self.target.log())
        return (terms if self.weights is None else terms * self.weights).sum(-1)

    def terms(self, residuals: Tensor) -> Tensor:
        """Half of the square, or Huber's: linear beyond delta."""
        squares = residuals.square() / 2
        if self.loss == "log-squares":
            return squares
        size = residuals.abs()
        return torch.where(size < self.delta, squares, self.delta * (size - self.delta / 2))

    def begin(self, starts: Sequence[Mapping[str, float]] | None) -> np.ndarray:
        """The starts to follow: (starts, free parameters)."""
        if starts is not None:
            natural = np.array([[s[p.name] for p in self.free] for s in starts], float)
        else:
            places = [self.law.names.index(p.name) for p in self.free]
            natural = np.unique(self.law.starts()[:, places], axis=0)
        raw = np.stack([_raw(p, natural[:, i]) for i, p in enumerate(self.free)], 1)
        with torch.no_grad():
            first = self(torch.from_numpy(raw)).nan_to_num(torch.inf).numpy()
        return raw[np.argsort(first, kind="stable")[:TRIED]]

    def descend(self, theta: np.ndarray) -> tuple[np.ndarray, float]:
        """L-BFGS from one start."""
        from scipy.optimize import minimize

        options = {"maxiter": 3000, "maxfun": 6000, "ftol": 1e-14, "gtol": 1e-10, "maxcor": 20}
        made = minimize(
            self.with_gradient,
            theta,
            jac=True,
            method="L-BFGS-B",
            bounds=self.bounds,
            options=options,
        )
        return made.x, float(made.fun)

    def with_gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """The objective and its gradient; where either is not finite, a very large number."""
        at = torch.from_numpy(np.asarray(theta, float)).requires_grad_()
        value = self(at)
        (gradient,) = torch.autograd.grad(value, at)
        if not (value.isfinite() and gradient.isfinite().all()):
            return 1e30, np.zeros_like(theta)
        return float(value.detach()), gradient.numpy()

    def polish(self, theta: np.ndarray, value: float) -> tuple[np.ndarray, float]:
        """Newton's steps while they help; parameters that sit on a bound stay there."""
        inner = ~self.at_bound(theta)
        for _ in range(20):
            step = self.newton(theta, inner)
            for size in (1.0, 0.25, 0.05):
                tried = np.clip(theta + size * step, *np.array(self.bounds).T)
                with torch.no_grad():
                    new = float(self(torch.from_numpy(tried)))
                if new < value:
                    break
            else:
                return theta, value
            theta, value = tried, new
        return theta, value

    def newton(self, theta: np.ndarray, inner: np.ndarray) -> np.ndarray:
        """-H^-1 g over the parameters inside their bounds, H made positive."""
        step = np.zeros_like(theta)
        if not inner.any():
            return step
        at = torch.from_numpy(theta)
        hessian = torch.autograd.functional.hessian(self, at).numpy()[np.ix_(inner, inner)]
        gradient = self.with_gradient(theta)[1][inner]
        sizes, axes = np.linalg.eigh(np.nan_to_num(hessian))
        sizes = np.maximum(np.abs(sizes), 1e-14 * max(np.abs(sizes).max(), 1e-300))
        step[inner] = -axes @ ((axes.T @ gradient) / sizes)
        return step

    def at_bound(self, theta: np.ndarray) -> np.ndarray:
        low, high = np.array(self.bounds).T
        near = 1e-6 * (high - low)
        return (theta <= low + near) | (theta >= high - near)

    def on_bounds(self, theta: np.ndarray) -> str:
        names = [p.name for p, on in zip(self.free, self.at_bound(theta)) if on]
        return f"{', '.join(names)} on a bound: the rows do not tell it" if names else ""

    def values(self, theta: np.ndarray) -> dict[str, float]:
        at = {p.name: float(_natural(p, torch.tensor(v))) for p, v in zip(self.free, theta)}
        known = {name: float(value) for name, value in self.fixed.items()} | at
        return {name: known[name] for name in self.law.names}


def _raw(parameter: Parameter, values: np.ndarray) -> np.ndarray:
    return np.log(values) if parameter.positive else np.asarray(values, float)


def _natural(parameter: Parameter, raw: Tensor) -> Tensor:
    return raw.exp() if parameter.positive else raw


Quantity = str | Callable[[Mapping[str, float]], float]


@dataclass(frozen=True)
class Draws:
    """Fits of tables drawn again: their values by parameter, one dict a draw."""

    values: list[dict[str, float]]

    def of(self, quantity: Quantity) -> np.ndarray:
        """A parameter, or any function of the parameters: (draws,)."""
        get = quantity if callable(quantity) else lambda values: values[quantity]
        return np.array([get(values) for values in self.values])

    def interval(self, quantity: Quantity, level: float = 0.95) -> tuple[float, float]:
        """The middle `level` of the draws."""
        low, high = np.quantile(self.of(quantity), [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)


def bootstrap(fit: Fit, n: int = 200, group: np.ndarray | None = None, seed: int = 0) -> Draws:
    """The fit of rows drawn again with replacement, n times.

    group: (m,) labels of rows that are drawn together, such as the seed of each run.
    Raises ValueError for fewer than two groups.
    """
    labels = np.arange(len(fit.table[fit.target])) if group is None else np.asarray(group)
    kinds, places = np.unique(labels, return_inverse=True)
    if len(kinds) < 2:
        raise ValueError("there is nothing to draw from fewer than two groups")
    random = np.random.default_rng(seed)
    made = []
    for _ in range(n):
        counts = np.bincount(random.integers(len(kinds), size=len(kinds)), minlength=len(kinds))
        made.append(fit.again(weights=counts[places].astype(float)).values)
    return Draws(made)


@dataclass(frozen=True)
class HeldOut:
    """A fit without the largest runs, and its error on them: log prediction - log measured."""

    fit: Fit
    errors: np.ndarray

    @property
    def error(self) -> float:
        """The mean absolute error of the logarithm."""
        return float(np.abs(self.errors).mean())


def holdout(
    law: Law, table: Table, target: str, *, largest: str, n: int, **options: Any
) -> HeldOut:
    """Fit without the `n` largest values of a column, and predict the rows that have them.

    largest: a column of the table, such as compute, that the law need not use. All rows of one of
    these values are left out together, so seeds of one condition are never divided.
    Raises ValueError when nothing would be left.
    """
    rows = {name: np.asarray(column, float) for name, column in table.items()}
    values = np.unique(rows[largest])
    if not 0 < n < len(values):
        raise ValueError(f"{n} of {len(values)} values of {largest!r} can't be left out")
    out = rows[largest] >= values[-n]
    inside = {name: column[~out] for name, column in rows.items()}
    made = fit(law, inside, target, **options)
    predicted = made.predict(**{name: rows[name][out] for name in law.columns})
    return HeldOut(made, np.log(predicted) - np.log(rows[target][out]))


def compare(
    laws: Sequence[Law],
    table: Table,
    target: str,
    *,
    largest: str,
    n: int,
    draws: int = 100,
    seed: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """`holdout` of several laws, one row each: law, error, and what it errs more than the first.

    "difference" is (low, high), 95 % of the draws of the fitted rows, the same rows for every law.
    """
    held = [holdout(law, table, target, largest=largest, n=n, **options) for law in laws]
    random = np.random.default_rng(seed)
    m = len(held[0].fit.table[target])
    counts = [np.bincount(random.integers(m, size=m), minlength=m) for _ in range(draws)]
    errors = np.array([[_redrawn(one, table, largest, n, w) for w in counts] for one in held])
    return [
        {
            "law": law.name,
            "error": one.error,
            "difference": tuple(np.quantile(row - errors[0], [0.025, 0.975]).tolist()),
        }
        for law, one, row in zip(laws, held, errors)
    ]


def _redrawn(held: HeldOut, table: Table, largest: str, n: int, weights: np.ndarray) -> float:
    made = held.fit.again(weights=weights.astype(float))
    rows = {name: np.asarray(column, float) for name, column in table.items()}
    out = rows[largest] >= np.unique(rows[largest])[-n]
    predicted = made.predict(**{name: rows[name][out] for name in made.law.columns})
    return float(np.abs(np.log(predicted) - np.log(rows[made.target][out])).mean())


@dataclass(frozen=True)
class Profile:
    """The least objective at each value of one parameter, the others fitted anew."""

    fit: Fit
    name: str
    values: np.ndarray
    objectives: np.ndarray

    def interval(self, noise: float) -> tuple[float, float]:
        """Where the objective lies at most noise^2 / 2 above its least: one standard deviation.

        noise: the standard deviation of a residual. Ends outside the values are infinite.
        Refits the law at each step of a root search between two values.
        """
        from scipy.optimize import brentq

        allowed = self.fit.objective + noise**2 / 2
        excess = self.objectives - allowed
        best = self.fit.values[self.name]

        def over(value: float) -> float:
            return _held(self.fit, self.name, value).objective - allowed

        below = [v for v, e in zip(self.values, excess) if v < best and e > 0]
        above = [v for v, e in zip(self.values, excess) if v > best and e > 0]
        low = brentq(over, max(below), best, rtol=1e-10) if below else -np.inf
        high = brentq(over, best, min(above), rtol=1e-10) if above else np.inf
        return float(low), float(high)


def profile(fit: Fit, name: str, values: Sequence[float]) -> Profile:
    """Refit the other parameters at each value of one. Raises ValueError for an unknown one."""
    if name not in fit.law.names:
        raise ValueError(f"{fit.law.name!r} has no parameter {name!r}: {', '.join(fit.law.names)}")
    values = np.sort(np.asarray(values, float))
    return Profile(fit, name, values, np.array([_held(fit, name, v).objective for v in values]))


def _held(fit: Fit, name: str, value: float) -> Fit:
    return fit.again(fixed=fit.fixed | {name: float(value)})
