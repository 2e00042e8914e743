"""Scaling laws for neural language models (Kaplan et al., 2020): power laws in size, data, compute.

Lab 401. The laws are equations 1.1 to 1.8 and appendix B; their values those of the paper's tables,
which `data/published/kaplan-scaling.csv` holds. N are parameters without embedding, C is in
PF-days, losses are nats a token. Counting N and FLOPs is `lablib.scaling.counts`.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from lablib.paths import data_dir

PF_DAY = 1e15 * 24 * 3600  # FLOPs
Number = float | np.ndarray


@lru_cache
def published() -> Mapping[str, float]:
    """The paper's values by name, as `data/published/kaplan-scaling.csv` lists them."""
    with (data_dir() / "published" / "kaplan-scaling.csv").open(encoding="utf-8") as file:
        return MappingProxyType({r["name"]: float(r["value"]) for r in csv.DictReader(file)})


def loss_of_size(N: Number, N_c: float = 8.8e13, alpha_N: float = 0.076) -> Number:
    """(N_c / N)^alpha_N: of a model that has seen all it can use. Equation 1.1."""
    return (N_c / N) ** alpha_N


def loss_of_data(D: Number, D_c: float = 5.4e13, alpha_D: float = 0.095) -> Number:
    """(D_c / D)^alpha_D: of a large model, stopped early on D tokens. Equation 1.2."""
    return (D_c / D) ** alpha_D


def loss_of_compute(C: Number, C_c: float = 3.1e8, alpha_C: float = 0.050) -> Number:
    """(C_c / C)^alpha_C: of the best use of C PF-days. Equation 1.3."""
    return (C_c / C) ** alpha_C


def loss_of_both(
    N: Number,
    D: Number,
    N_c: float = 6.4e13,
    alpha_N: float = 0.076,
    D_c: float = 1.8e13,
    alpha_D: float = 0.103,
) -> Number:
    """Of N parameters and D tokens, whichever is short. Equation 1.5, values of Table 2."""
    by_size = (N_c / N) ** (alpha_N / alpha_D)
    by_data = D_c / D
    # L(N, D) = [(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D
    return (by_size + by_data) ** alpha_D


def loss_of_steps(
    N: Number,
    S_min: Number,
    N_c: float = 6.5e13,
    alpha_N: float = 0.077,
    S_c: float = 2.1e3,
    alpha_S: float = 0.76,
) -> Number:
    """After S_min steps of very large batches. Equation 1.6, values of Table 3."""
    return (N_c / N) ** alpha_N + (S_c / S_min) ** alpha_S


def critical_batch(loss: Number, B_star: float = 2e8, alpha_B: float = 0.21) -> Number:
    """Tokens a step above which a batch saves few steps: B* / L^(1/alpha_B). Equation 1.4."""
    return B_star / loss ** (1 / alpha_B)


def least_steps(S: Number, B: Number, B_crit: Number) -> Number:
    """S_min = S / (1 + B_crit/B): steps that S steps of B tokens are worth. Equation 5.4."""
    return S / (1 + B_crit / B)


def least_compute(C: Number, B: Number, B_crit: Number) -> Number:
    """C_min = C / (1 + B/B_crit): what small batches would have needed. Equation 5.5."""
    return C / (1 + B / B_crit)


def compute_exponent(alpha_S: float = 0.76, alpha_B: float = 0.21, alpha_N: float = 0.076) -> float:
    """alpha_C of the best use of compute, from its parts. Equation 1.8 (and 6.4, B.7).

    1/alpha_C = 1/alpha_S + 1/alpha_B + 1/alpha_N, and the best N grows as C^(alpha_C/alpha_N).
    """
    return 1 / (1 / alpha_S + 1 / alpha_B + 1 / alpha_N)


def loss_at_budget(N: Number, C: Number, rounds: int = 80) -> Number:
    """The loss of N parameters trained with C PF-days at the critical batch.

    Equation B.3 has the loss on both sides, since the critical batch depends on it:
    L = (N_c/N)^alpha_N + (6 B* S_c N / (L^(1/alpha_B) C))^alpha_S. The right side falls as L
    rises, so bisection finds it. N and C broadcast.
    """
    N, C = np.broadcast_arrays(np.asarray(N, float), np.asarray(C, float))
    low, high = np.full(N.shape, 1e-3), np.full(N.shape, 1e6)
    for _ in range(rounds):
        middle = np.sqrt(low * high)
        steps = C * PF_DAY / (6 * N * critical_batch(middle))
        above = loss_of_steps(N, steps) > middle
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.sqrt(low * high)


def overfitting(N: Number, D: Number) -> Number:
    """Excess of D tokens over unlimited ones: L(N, D) / L(N, infinity) - 1. Equation 4.2."""
    return loss_of_both(N, D) / loss_of_both(N, np.inf) - 1


def data_needed(N: Number, excess: float = 0.02) -> Number:
    """Tokens at which `overfitting` is `excess`: they grow as N^0.74. Equation 4.4.

    Raises ValueError for an excess that is not above 0.
    """
    if not excess > 0:
        raise ValueError(f"an excess of {excess} asks for infinitely many tokens: give one above 0")
    at = published()
    ratio = at["joint_alpha_N"] / at["joint_alpha_D"]
    grown = (1 + excess) ** (1 / at["joint_alpha_D"]) - 1
    return at["joint_D_c"] / grown * (N / at["joint_N_c"]) ** ratio


def contradiction(
    alpha_C: float = 0.050,
    alpha_D: float = 0.095,
    p_D: float = 0.27,
    D_e: float = 2e10,
    C_c: float = 3.1e8,
    D_c: float = 5.4e13,
) -> tuple[float, float]:
    """The budget, PF-days, and loss where two of the laws meet, and beyond which one is wrong.

    The best use of C sees D_e C^p_D tokens (Table 6), once each. From them no model can learn more
    than loss_of_data says; yet loss_of_compute falls faster. Section 6.3.
    Raises ValueError when it does not fall faster, so that they never meet.
    """
    if alpha_C <= alpha_D * p_D:
        raise ValueError(f"alpha_C {alpha_C} is not above alpha_D p_D = {alpha_D * p_D:.4g}")
    # alpha_C (ln C_c - ln C) = alpha_D (ln D_c - ln D_e - p_D ln C)
    gap = alpha_C * np.log(C_c) - alpha_D * np.log(D_c / D_e)
    C = float(np.exp(gap / (alpha_C - alpha_D * p_D)))
    return C, float(loss_of_compute(C, C_c, alpha_C))


def best_by_curves(curves: list[tuple[float, np.ndarray, np.ndarray]]) -> np.ndarray:
    """Who is best at each budget: where the lower envelope passes from one size to the next.

    curves: (N, tokens, losses) of a size, tokens rising: of one training on its way, as Kaplan et
    al. read them, or of the ends of several. Between its points a curve is straight in logarithms.
    Returns rows (C, N), C = 6 N tokens, N the geometric middle of both sizes.
    """
    from lablib.scaling.curves import frontier

    sizes = np.array([N for N, _, _ in curves])
    edge = frontier([_dense(6 * N * tokens, losses) for N, tokens, losses in curves])
    N = sizes[edge.curve]
    turns = np.flatnonzero(N[1:] > np.maximum.accumulate(N)[:-1])
    rows = [np.sqrt([edge.compute[t] * edge.compute[t + 1], N[t] * N[t + 1]]) for t in turns]
    return np.array(rows).reshape(-1, 2)


def _dense(compute: np.ndarray, losses: np.ndarray, points: int = 300) -> tuple:
    x = np.linspace(np.log(compute[0]), np.log(compute[-1]), points)
    return np.exp(x), np.exp(np.interp(x, np.log(compute), np.log(losses)))


def by_position(losses: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean loss between positions: (windows, length) -> (len(edges) - 1,). Appendix D.5.

    edges: rising positions; a bin holds those from its edge up to the next.
    """
    means = losses.mean(0)
    return np.array([means[low:high].mean() for low, high in itertools.pairwise(edges)])
