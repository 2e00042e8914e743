"""Cross-lingual continual pre-training (Zheng et al., 2024): a new language for an old model.

Lab 410. A model that has read one language goes on reading another; the law says how much of the
new language it saves. Equations are numbered as in the paper, whose values are in
`data/published/cross-lingual-cpt.csv`. `lablib.scaling.laws.cpt` is the same law for `fit`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lablib.paths import data_dir
from lablib.scaling import laws
from lablib.scaling.inference import Fit, Table, fit

Number = float | np.ndarray
Values = Mapping[str, float]  # E, A, alpha, B, beta and gamma; without gamma: from scratch
KEPT = ("E", "A", "alpha")  # what continuing leaves as training from scratch has it (section 3.2)


def loss(values: Values, N: Number, D: Number) -> Number:
    """Loss of N parameters after D new tokens. Equation 4; without gamma, equation 1."""
    shared = values["E"] + values["A"] / N ** values["alpha"]
    # B' / (D^beta' N^gamma): what is left to learn, less of it in a larger model
    return shared + values["B"] / (D ** values["beta"] * N ** values.get("gamma", 0.0))


def tokens_from_scratch(scratch: Values, continued: Values, N: Number, D: Number) -> Number:
    """Tokens that a fresh model needs for the loss that a continued one has after D.

    E, A and alpha are the same in both, so B / D_scratch^beta = B' / (D^beta' N^gamma).
    """
    left = continued["B"] / (D ** continued["beta"] * N ** continued["gamma"])
    return (scratch["B"] / left) ** (1 / scratch["beta"])


def saved(tokens: Number, from_scratch: Number) -> Number:
    """Share of tokens, and of FLOPs, that are saved at equal loss: below 0 where none are."""
    return 1 - tokens / from_scratch


def transferred_data(tokens: Number, from_scratch: Number) -> Number:
    """Tokens that the first language was worth: D_scratch - D_continued, as in Figure 2."""
    return from_scratch - tokens


def forgotten(before: Number, after: Number) -> Number:
    """Nats that the first language has lost: its loss after the second minus its loss before."""
    return after - before


def tokens_to(tokens: np.ndarray, losses: np.ndarray, target: Number) -> Number:
    """Tokens at which measured losses reach a target: straight lines in log-log coordinates.

    tokens, losses: (m,) of runs that each ended there, losses falling. Beyond either end the
    nearest line is carried on. Raises ValueError when losses do not fall.
    """
    x, y = np.log(np.asarray(tokens, float)), np.log(np.asarray(losses, float))
    if len(y) < 2 or not (np.diff(y) < 0).all():
        raise ValueError(f"losses must fall with tokens, not go {np.round(losses, 4).tolist()}")
    goal = np.log(target)
    place = np.clip(np.searchsorted(-y, -goal) - 1, 0, len(y) - 2)  # the line's left end
    slope = (x[place + 1] - x[place]) / (y[place + 1] - y[place])
    return np.exp(x[place] + slope * (goal - y[place]))


class Frontier(NamedTuple):
    """Best size and data at C FLOPs: N = size C^a, D = data C^b."""

    size: float
    a: float
    data: float
    b: float


def frontier(values: Values) -> Frontier:
    """The compute-optimal allocation, C = 6 N D. Equations 2 and 5."""
    alpha, beta, gamma = values["alpha"], values["beta"], values.get("gamma", 0.0)
    k = alpha + beta - gamma
    a, b = beta / k, (alpha - gamma) / k
    G = (alpha * values["A"] / ((beta - gamma) * values["B"])) ** (1 / k)
    return Frontier(G * 6**-a, a, 6**-b / G, b)  # N = G (C/6)^a, D = (C/6)^b / G


def least_loss(values: Values, compute: Number) -> Number:
    """Loss of the best allocation of so many FLOPs, C = 6 N D."""
    best = frontier(values)
    return loss(values, best.size * compute**best.a, best.data * compute**best.b)


def reported_loss(kind: str, compute: Number) -> Number:
    """The least loss that the paper's runs reached, as section 4.2 fits it: a C^-b."""
    coefficient, exponent = (printed(f"{kind} loss {n}") for n in ("coefficient", "exponent"))
    return coefficient * compute**-exponent


def turning_point(scratch: Values, continued: Values) -> float:
    """FLOPs at which both are best spent on one size; below it a continued model is larger."""
    one, other = frontier(scratch), frontier(continued)
    return (other.size / one.size) ** (1 / (one.a - other.a))


def pays_until(scratch: Values, continued: Values, N: Number) -> Number:
    """Tokens after which the laws say that a fresh model is as good: B / D^beta = B' / (...)."""
    ratio = scratch["B"] * N ** continued["gamma"] / continued["B"]
    return ratio ** (1 / (scratch["beta"] - continued["beta"]))


def fit_continued(scratch: Values, table: Table, target: str = "loss", **options) -> Fit:
    """B', beta' and gamma from continued runs; the rest stays as from scratch. Equation 7."""
    return fit(laws.cpt, table, target, fixed={name: scratch[name] for name in KEPT}, **options)


def replay(
    source: np.ndarray, target: np.ndarray, ratio: float, piece: int = 4096, seed: int = 0
) -> np.ndarray:
    """The target's text with so much of the source's mixed in that it is `ratio` of all.

    source, target: (n,) integers; the first of the source that are needed are taken. Both are cut
    into pieces, which are put in a random order. Returns (len(target) / (1 - ratio),).
    Raises ValueError for a ratio outside 0 to below 1, or when the source is too short.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is {ratio}: give a share from 0 to below 1")
    needed = round(len(target) * ratio / (1 - ratio))
    if needed > len(source):
        raise ValueError(f"{needed} of the source are needed; there are {len(source)}")
    if not needed:
        return target
    both = (target, source[:needed])
    pieces = [t[start : start + piece] for t in both for start in range(0, len(t), piece)]
    order = np.random.default_rng(seed).permutation(len(pieces))
    return np.concatenate([pieces[place] for place in order])


def published(kind: str) -> Values:
    """The paper's values of the law, "scratch" or "continued" (Table 2a)."""
    names = (*KEPT, "B", "beta", *(["gamma"] if kind == "continued" else []))
    return {name: printed(f"{kind} {name}") for name in names}


def printed(name: str) -> float:
    """A figure of the paper, by its name in `data/published/cross-lingual-cpt.csv`."""
    return _rows()[name]


@lru_cache
def _rows() -> dict[str, float]:
    path = data_dir() / "published" / "cross-lingual-cpt.csv"
    table = csv.DictReader(path.read_text("utf-8").splitlines())
    return {row["name"]: float(row["value"]) for row in table}
