"""Intervals over seeds."""

from collections.abc import Sequence

import numpy as np


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and two-sided Student-t interval of a few independent values: (mean, low, high).

    One value has no interval: low and high are then minus and plus infinity.
    Raises ValueError when there is no value, or one that is not finite.
    """
    found = np.asarray(values, dtype=float)
    if found.ndim != 1 or not found.size or not np.isfinite(found).all():
        raise ValueError(f"an interval needs finite values in one row, not {values!r}")
    mean = float(found.mean())
    if len(found) == 1:
        return mean, -np.inf, np.inf
    from scipy.stats import t

    half = t.ppf((1 + level) / 2, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found))
    return mean, mean - float(half), mean + float(half)
