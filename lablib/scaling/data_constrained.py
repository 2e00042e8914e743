"""Scaling data-constrained language models (Muennighoff et al., 2023): what repeated text is worth.

Lab 403. The law is equations 5 and 6 of section 3, fitted as in appendix A: the exponents on runs
that saw each token once, then the two decays. Its values and the losses of the authors' runs are in
`data/published/data-constrained.csv`. `lablib.scaling.laws.data_constrained` is the same law for
`fit` and `allocate`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from lablib.data import Batches
from lablib.paths import data_dir
from lablib.scaling import laws
from lablib.scaling.inference import Fit, Table, fit

R_D, R_N = 15.387756, 5.309743  # appendix A
Number = float | np.ndarray


def effective_tokens(D: Number, U: Number, star: float = R_D) -> Number:
    """Fresh tokens that D tokens are worth when only U of them differ. Equation 5."""
    repeats = np.maximum(D / U - 1, 0)  # R_D: passes after the first
    # D' = U + U R* (1 - exp(-R_D / R*)), expm1 being exp - 1 without loss at large R*
    return np.minimum(D, U) - U * star * np.expm1(-repeats / star)


def effective_parameters(N: Number, useful: Number, star: float = R_N) -> Number:
    """The same for parameters: those above what U tokens can train are worth less. Equation 6.

    useful: N_opt(U), the size for which U tokens are the best use of compute.
    """
    return effective_tokens(N, useful, star)


def loss(N: Number, D: Number, U: Number, values: Mapping[str, float] | None = None) -> Number:
    """L = E + A / N'^alpha + B / D'^beta. values: of the law, None for the paper's."""
    p = values or published()
    useful = useful_parameters(U, p)
    size = effective_parameters(N, useful, p["R_N"])
    data = effective_tokens(D, U, p["R_D"])
    return p["E"] + p["A"] / size ** p["alpha"] + p["B"] / data ** p["beta"]


def useful_parameters(U: Number, values: Mapping[str, float] | None = None) -> Number:
    """N_opt(U): where alpha A N^-alpha = beta B U^-beta, both shortages cost the same."""
    p = values or published()
    ratio = p["alpha"] * p["A"] / (p["beta"] * p["B"])
    return (ratio * U ** p["beta"]) ** (1 / p["alpha"])


def value_of(epoch: Number, star: float = R_D) -> Number:
    """What one more token is worth at the end of so many epochs, a fresh one being 1.

    The derivative of `effective_tokens` by D: exp(-(epoch - 1) / R*).
    """
    return np.exp(-(np.asarray(epoch) - 1) / star)


def half_value(star: float = R_D) -> float:
    """The epoch at whose end a token is worth half of a fresh one."""
    return 1 + star * math.log(2)


def best_epochs(compute: float, U: float, values: Mapping[str, float] | None = None) -> float:
    """Epochs over U tokens of the best use of `compute` FLOPs, by search. Section 5."""
    _, D = laws.allocate(laws.data_constrained, values or published(), compute, U=U)
    return D / U


def fit_decay(table: Table, target: str = "loss", **options) -> Fit:
    """The law fitted as in appendix A: first the rows that saw nothing twice, then R_D and R_N.

    table: columns N, D, U and the target. options: of `lablib.scaling.inference.fit`.
    Raises ValueError when too few rows saw nothing twice, or none saw anything.
    """
    rows = {name: np.asarray(column, float) for name, column in table.items()}
    once = rows["U"] >= rows["D"]
    if once.all():
        raise ValueError("no row saw anything twice: there is no decay to fit")
    first = fit(laws.hoffmann, _kept(rows, once), target, **options).values
    return fit(laws.data_constrained, _kept(rows, ~once), target, fixed=first, **options)


def _kept(rows: dict[str, np.ndarray], which: np.ndarray) -> dict[str, np.ndarray]:
    return {name: column[which] for name, column in rows.items()}


def repeated(tokens: np.ndarray, unique: int, batch_size: int, length: int, seed: int) -> Batches:
    """Batches that go over the first `unique` tokens again and again, each pass in a new order.

    Raises ValueError when there are fewer tokens, or too few for a batch.
    """
    if len(tokens) <= unique + length:
        raise ValueError(f"{unique} of {len(tokens)} tokens: each pass starts at another offset")
    return Batches(tokens[: unique + length + 1], batch_size, length, seed)


def filled_up(text: np.ndarray, passes: int, other: np.ndarray) -> np.ndarray:
    """A remedy of section 7: text `passes` times, and other text, such as code, once.

    Batches of it are drawn from all of it at random. text, other: (n,) and (m,) ids ->
    (passes n + m,). Raises ValueError for less than one pass.
    """
    if passes < 1:
        raise ValueError(f"{passes} passes leave nothing of the text")
    return np.concatenate([np.tile(text, passes), other])


@lru_cache
def published() -> Mapping[str, float]:
    """The paper's values of the law: E, A, B, alpha, beta, R_D and R_N."""
    rows = {row["name"]: row for row in _rows()}
    names = ("alpha", "beta", "R_D", "R_N")
    logs = {"E": "e", "A": "a", "B": "b"}
    values = {name: math.exp(float(rows[key]["value"])) for name, key in logs.items()}
    return MappingProxyType(values | {name: float(rows[name]["value"]) for name in names})


def published_runs() -> list[dict]:
    """Runs of the authors: name, N, D, U, and the held-out loss in nats a token."""
    return [
        {
            "name": row["name"],
            "N": float(row["parameters"]),
            "D": float(row["tokens"]),
            "U": float(row["unique"]),
            "loss": float(row["value"]),
        }
        for row in _rows()
        if "return.ipynb" in row["source"]
    ]


def printed(name: str) -> dict[str, str]:
    """A row of the published values that is no run: name, value, unit, source and its point."""
    return {row["name"]: row for row in _rows()}[name]


@lru_cache
def _rows() -> list[dict[str, str]]:
    path = data_dir() / "published" / "data-constrained.csv"
    return list(csv.DictReader(path.read_text("utf-8").splitlines()))
