"""Curves through measured points: power laws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """value = coefficient * n ^ exponent."""

    coefficient: float
    exponent: float

    def __call__(self, n: np.ndarray) -> np.ndarray:
        """n: any shape, positive -> as many values."""
        return self.coefficient * np.asarray(n, float) ** self.exponent


def fit_power_law(n: np.ndarray, values: np.ndarray) -> PowerLaw:
    """Least squares on logarithms, so that equal ratios weigh the same.

    n, values: (m,), positive and finite, at least two different n. Raises ValueError otherwise.
    """
    n, values = np.asarray(n, float), np.asarray(values, float)
    if n.ndim != 1 or n.shape != values.shape:
        raise ValueError(f"{n.shape} and {values.shape} are not one value for each n")
    if not (np.isfinite(n) & np.isfinite(values) & (n > 0) & (values > 0)).all():
        raise ValueError("a power law needs positive finite numbers: one of n or values is not")
    if len(np.unique(n)) < 2:
        raise ValueError("a power law needs values at two different n at least")
    exponent, intercept = np.polyfit(np.log(n), np.log(values), 1)
    return PowerLaw(float(np.exp(intercept)), float(exponent))
