"""Curves through measured points: power laws of one quantity and of two, and how sure they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

Group = TypeVar("Group")
Fitted = TypeVar("Fitted")


@dataclass(frozen=True)
class PowerLaw:
    """value = coefficient * n ^ exponent + floor."""

    coefficient: float
    exponent: float
    floor: float = 0.0

    def __call__(self, n: np.ndarray) -> np.ndarray:
        """n: any shape, positive -> as many values."""
        return self.coefficient * np.asarray(n, float) ** self.exponent + self.floor


@dataclass(frozen=True)
class JointLaw:
    """value = coefficient * a ^ -alpha * b ^ -(beta - interaction log a) + floor.

    Two quantities that help each other less the more there is of either: above 0, the interaction
    takes from b's exponent as a grows, and from a's as b does.
    """

    coefficient: float
    alpha: float
    beta: float
    interaction: float = 0.0
    floor: float = 0.0

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a, b: positive, of shapes that broadcast -> as many values."""
        a, b = np.log(np.asarray(a, float)), np.log(np.asarray(b, float))
        power = -self.alpha * a - self.beta * b + self.interaction * a * b
        return self.coefficient * np.exp(power) + self.floor

    def exponent(self, a: np.ndarray) -> np.ndarray:
        """The power that the value falls with in b, at given a."""
        return self.beta - self.interaction * np.log(np.asarray(a, float))


@dataclass(frozen=True)
class SumLaw:
    """value = first(a) + second(b) + floor: two power laws that know nothing of each other."""

    first: PowerLaw
    second: PowerLaw
    floor: float = 0.0

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """a, b: positive, of shapes that broadcast -> as many values."""
        return self.first(a) + self.second(b) + self.floor


def fit_power_law(n: np.ndarray, values: np.ndarray) -> PowerLaw:
    """Least squares on logarithms, so that equal ratios weigh the same; no floor.

    n, values: (m,), positive and finite, at least two different n. Raises ValueError otherwise.
    """
    n, values = _columns(values, n)
    if len(np.unique(n)) < 2:
        raise ValueError("a power law needs values at two different n at least")
    exponent, intercept = np.polyfit(np.log(n), np.log(values), 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent))


def fit_saturating_law(
    n: np.ndarray, values: np.ndarray, *, floor: float | None = None, delta: float = 1e-3
) -> PowerLaw:
    """A power law that falls to a floor, by Huber's loss on logarithms: see `huber_fit`.

    n, values: (m,), at least three different n, or two where the floor is given.
    Raises ValueError when there are fewer.
    """
    n, values = _columns(values, n)
    if len(np.unique(n)) < (3 if floor is None else 2):
        raise ValueError("a law with a floor needs three different n, or two and the floor")
    log_n = np.log(n)
    design = np.stack([np.ones_like(log_n), log_n], 1)
    theta, floor = _fit_above_floor(design, values, floor, delta)
    return PowerLaw(float(np.exp(theta[0])), float(theta[1]), floor)


def fit_joint_law(
    a: np.ndarray,
    b: np.ndarray,
    values: np.ndarray,
    *,
    interaction: bool = True,
    floor: float | None = None,
    delta: float = 1e-3,
) -> JointLaw:
    """`JointLaw` by Huber's loss on logarithms: see `huber_fit`.

    a, b, values: (m,), positive and finite, m at least the number of parameters.
    interaction: whether that term is fitted or left out. floor: fitted when None.
    Raises ValueError for fewer points, or points that leave a parameter undetermined.
    """
    a, b, values = _columns(values, a, b)
    log_a, log_b = np.log(a), np.log(b)
    terms = [np.ones_like(log_a), -log_a, -log_b] + [log_a * log_b] * interaction
    design = np.stack(terms, 1)  # (m, 3 or 4)
    if np.linalg.matrix_rank(design) < design.shape[1] or len(a) <= design.shape[1]:
        raise ValueError(f"{len(a)} points do not determine a law of {design.shape[1] + 1} numbers")
    theta, floor = _fit_above_floor(design, values, floor, delta)
    return JointLaw(float(np.exp(theta[0])), *map(float, theta[1:]), floor=floor)


def fit_sum_law(a: np.ndarray, b: np.ndarray, values: np.ndarray, *, delta: float = 1e-3) -> SumLaw:
    """`SumLaw` by Huber's loss on logarithms, from several starts: see `huber_fit`.

    a, b, values: (m,), positive and finite, m above 5. Raises ValueError otherwise.
    """
    a, b, values = _columns(values, a, b)
    if len(a) < 6:
        raise ValueError(f"{len(a)} points do not determine a law of 5 numbers")
    starts = np.exp(np.log(a).mean()), np.exp(np.log(b).mean())

    def predict(theta: np.ndarray) -> np.ndarray:
        first, second, floor = np.exp(theta[[0, 2, 4]])
        return first * (a / starts[0]) ** -theta[1] + second * (b / starts[1]) ** -theta[3] + floor

    low = values.min()
    tries = [
        np.array([np.log(share * low), power, np.log(share * low), power, np.log(rest * low)])
        for share, rest in ((0.05, 0.8), (0.2, 0.5), (0.4, 0.1))
        for power in (0.1, 0.5)
    ]
    theta = huber_fit(predict, tries, values, delta)
    one = PowerLaw(float(np.exp(theta[0]) * starts[0] ** theta[1]), -float(theta[1]))
    two = PowerLaw(float(np.exp(theta[2]) * starts[1] ** theta[3]), -float(theta[3]))
    return SumLaw(one, two, float(np.exp(theta[4])))


def huber_fit(
    predict: Callable[[np.ndarray], np.ndarray],
    starts: Sequence[np.ndarray],
    values: np.ndarray,
    delta: float = 1e-3,
) -> np.ndarray:
    """The parameters whose predictions have the least Huber loss on logarithms.

    predict: (parameters,) -> (m,), positive. starts: where to begin; the best end is taken.
    delta: residuals of the logarithm above it count linearly, so that outliers pull less.
    Source: Chinchilla (Hoffmann et al., 2022), section 3.3, whose delta is 1e-3.
    """
    from scipy.optimize import least_squares

    def residuals(theta: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            off = np.log(predict(theta)) - np.log(values)
        return np.nan_to_num(off, nan=1e3, posinf=1e3, neginf=-1e3)

    options = {"loss": "huber", "f_scale": delta, "x_scale": "jac", "max_nfev": 400}
    options |= dict.fromkeys(("ftol", "xtol", "gtol"), 1e-13)
    ends = [least_squares(residuals, start, **options) for start in starts]
    return min(ends, key=lambda end: end.cost).x


def bootstrap(
    fit: Callable[[list[Group]], Fitted],
    groups: Sequence[Group],
    times: int = 200,
    seed: int = 0,
) -> list[Fitted]:
    """`fit` of groups drawn again with replacement, so many times.

    groups: what is independent, such as the points of one seed. Raises ValueError for fewer than 2.
    """
    if len(groups) < 2:
        raise ValueError("there is nothing to draw from fewer than two groups")
    random = np.random.default_rng(seed)
    draws = random.integers(len(groups), size=(times, len(groups)))
    return [fit([groups[place] for place in draw]) for draw in draws]


def _fit_above_floor(
    design: np.ndarray, values: np.ndarray, floor: float | None, delta: float
) -> tuple[np.ndarray, float]:
    """theta and floor of values = exp(design @ theta) + floor.

    Starts are exact: with the floor held, logarithms are linear in theta.
    """

    def line(at: float) -> np.ndarray:
        return np.linalg.lstsq(design, np.log(values - at), rcond=None)[0]

    if floor is not None:
        if not floor < values.min():
            raise ValueError(f"a floor of {floor} is not below the least value, {values.min()}")
        theta = huber_fit(lambda t: np.exp(design @ t) + floor, [line(floor)], values, delta)
        return theta, floor
    low = values.min()
    starts = [np.append(line(share * low), np.log(share * low)) for share in (0.05, 0.3, 0.6, 0.9)]
    theta = huber_fit(lambda t: np.exp(design @ t[:-1]) + np.exp(t[-1]), starts, values, delta)
    return theta[:-1], float(np.exp(theta[-1]))


def _columns(values: Any, *columns: Any) -> list[np.ndarray]:
    """The columns, then the values, as arrays (m,). Raises ValueError unless all are positive."""
    arrays = [np.asarray(column, float) for column in (*columns, values)]
    if arrays[0].ndim != 1 or len({array.shape for array in arrays}) > 1:
        shapes = " and ".join(str(array.shape) for array in arrays)
        raise ValueError(f"{shapes} are not one value for each n")
    if not all((np.isfinite(array) & (array > 0)).all() for array in arrays):
        raise ValueError("a power law needs positive finite numbers: one of n or values is not")
    return arrays
