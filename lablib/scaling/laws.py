"""Scaling laws as objects: named parameters, named columns, one vectorized function.

A law gives the logarithm of what it predicts, so that sums of powers are computed by log-sum-exp
and residuals are relative. Sources: Kaplan et al. (2020), equations 1.5 and 1.6; Hoffmann et al.
(2022), approach 3; Muennighoff et al. (2023), section 3; Frantar et al. (2023); Abnar et al.
(2025), equation 5; and the papers of labs 402, 406, 407 and 410.

What N counts differs between the papers: Kaplan's laws and the hyperparameters' leave embedding and
head out, Hoffmann's takes all parameters; of sparse models the generalized law counts the active,
Frantar's the non-zero and Abnar's all. A law takes the N that a table gives it. D are tokens seen,
U the different ones among them, S the share of parameters that is not active. `published` has the
values that papers without a lab of their own print for theirs.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from lablib.paths import data_dir

Columns = Mapping[str, Tensor]
Values = Mapping[str, float]
TINY = 1e-12


@dataclass(frozen=True)
class Parameter:
    """One number of a law.

    positive: it is fitted as its logarithm. low, high: what a fit keeps it between.
    starts: where fits begin.
    """

    name: str
    positive: bool
    low: float
    high: float
    starts: tuple[float, ...]


def scale(name: str, *starts: float) -> Parameter:
    """A positive factor: a coefficient, a floor, a number of tokens."""
    return Parameter(name, True, 1e-12, 1e30, starts)


def exponent(name: str, *starts: float) -> Parameter:
    """A positive exponent."""
    return Parameter(name, True, 1e-3, 5.0, starts)


def free(name: str, *starts: float) -> Parameter:
    """A number of either sign."""
    return Parameter(name, False, -100.0, 100.0, starts)


@dataclass(frozen=True)
class Law:
    """A scaling law.

    log_value: (parameters, columns) -> logarithm of the prediction; parameters broadcast with the
    columns, which are (m,) tensors of positive float64, and S, a share, from 0 to below 1.
    """

    name: str
    columns: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    log_value: Callable[[Mapping[str, Tensor], Columns], Tensor]

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters' names."""
        return tuple(parameter.name for parameter in self.parameters)

    def __call__(self, values: Values, **columns: float | np.ndarray) -> np.ndarray:
        """Predictions: values by parameter, columns of shapes that broadcast -> as many numbers.

        Raises KeyError when a parameter or a column is missing.
        """
        at = {name: torch.tensor(float(values[name]), dtype=torch.float64) for name in self.names}
        x = {n: torch.as_tensor(np.asarray(columns[n], float)) for n in self.columns}
        return self.log_value(at, x).exp().numpy()

    def starts(self) -> np.ndarray:
        """Every combination of the parameters' starting values: (starts, parameters)."""
        return np.array(list(itertools.product(*(p.starts for p in self.parameters))), float)


def _sum(*logs: Tensor) -> Tensor:
    """log of a sum of exponentials, term by term."""
    return torch.logsumexp(torch.stack(torch.broadcast_tensors(*logs)), 0)


def _log(x: Tensor) -> Tensor:
    """A logarithm that parameters of either sign can't break."""
    return x.clamp(min=TINY).log()


def _power(p, x):
    return p["a"].log() - p["b"] * x["x"].log()  # a x^-b


def _power_plus(p, x):
    return _sum(p["c"].log(), _power(p, x))  # c + a x^-b


def _kaplan_nd(p, x):
    """[(N_c/N)^(alpha_N/alpha_D) + D_c/D]^alpha_D"""
    by_size = p["alpha_N"] / p["alpha_D"] * (p["N_c"].log() - x["N"].log())
    return p["alpha_D"] * _sum(by_size, p["D_c"].log() - x["D"].log())


def _kaplan_ns(p, x):
    """(N_c/N)^alpha_N + (S_c/S)^alpha_S"""
    by_size = p["alpha_N"] * (p["N_c"].log() - x["N"].log())
    return _sum(by_size, p["alpha_S"] * (p["S_c"].log() - x["S"].log()))


def _hoffmann(p, x):
    """E + A/N^alpha + B/D^beta"""
    by_size = p["A"].log() - p["alpha"] * x["N"].log()
    return _sum(p["E"].log(), by_size, p["B"].log() - p["beta"] * x["D"].log())


def worth(unique: Tensor, seen: Tensor, star: Tensor) -> Tensor:
    """U + U R* (1 - exp(-R/R*)), R = seen/U - 1: what repeated tokens, or spare weights, are worth.

    Source: Muennighoff et al. (2023), equations 5 and 6.
    """
    repeats = (seen / unique - 1).clamp(min=0)
    return unique * (1 - star * torch.expm1(-repeats / star))


def optimal_size(p, tokens: Tensor) -> Tensor:
    """The N for which `tokens` are compute-optimal: alpha A N^-alpha = beta B D^-beta."""
    ratio = p["alpha"].log() + p["A"].log() - p["beta"].log() - p["B"].log()
    return ((ratio + p["beta"] * tokens.log()) / p["alpha"]).exp()


def _data_constrained(p, x):
    """E + A/N'^alpha + B/D'^beta; columns N, D seen, U unique."""
    unique = torch.minimum(x["U"], x["D"])
    useful = torch.minimum(x["N"], optimal_size(p, unique))
    size = worth(useful, x["N"], p["R_N"])
    return _hoffmann(p, {"N": size, "D": worth(unique, x["D"], p["R_D"])})


def _generalized(p, x):
    """e (1-S)^gamma + (a (1-S)^alpha + c S)/N^alpha + b/D^beta; N are the active parameters."""
    active = (1 - x["S"]).log()
    factor = _log(p["a"] * (p["alpha"] * active).exp() + p["c"] * x["S"])
    by_size = factor - p["alpha"] * x["N"].log()
    by_data = p["b"].log() - p["beta"] * x["D"].log()
    return _sum(p["e"].log() + p["gamma"] * active, by_size, by_data)


def _frantar(p, x):
    """(a_S (1-S)^b_S + c_S) N^-b_N + (a_D/D)^b_D + c; N are the non-zero parameters."""
    factor = _sum(p["a_S"].log() + p["b_S"] * (1 - x["S"]).log(), p["c_S"].log())
    by_data = p["b_D"] * (p["a_D"].log() - x["D"].log())
    return _sum(factor - p["b_N"] * x["N"].log(), by_data, p["c"].log())


def _abnar(p, x):
    """a/N^alpha + b/D^beta + c/(1-S)^lambda + d/((1-S)^delta N^gamma) + e; N are all parameters."""
    active, size = (1 - x["S"]).log(), x["N"].log()
    return _sum(
        p["a"].log() - p["alpha"] * size,
        p["b"].log() - p["beta"] * x["D"].log(),
        p["c"].log() - p["lambda"] * active,
        p["d"].log() - p["delta"] * active - p["gamma"] * size,
        p["e"].log(),
    )


def _cpt(p, x):
    """E + A/N^alpha + B/(D^beta N^gamma)"""
    size = x["N"].log()
    by_data = p["B"].log() - p["beta"] * x["D"].log() - p["gamma"] * size
    return _sum(p["E"].log(), p["A"].log() - p["alpha"] * size, by_data)


def _steps(p, x):
    return _sum(p["S_min"].log(), p["E_min"].log() - x["B"].log())  # S_min + E_min/B


def _hyperparameter(p, x):
    return p["c"].log() + p["a"] * x["N"].log() + p["b"] * x["D"].log()  # c N^a D^b


_ALPHA, _BETA = exponent("alpha", 0.2, 0.35, 0.6), exponent("beta", 0.2, 0.35, 0.6)
power = Law("power", ("x",), (scale("a", 1.0, 100.0), free("b", 0.1, 0.5)), _power)
power_plus = Law(
    "power with a floor",
    ("x",),
    (
        scale("c", 0.1, 0.5, 1.0, 2.0),
        scale("a", 0.1, 1.0, 10.0, 100.0),
        exponent("b", 0.1, 0.3, 0.6),
    ),
    _power_plus,
)
kaplan_nd = Law(
    "Kaplan, size and data",
    ("N", "D"),
    (
        scale("N_c", 1e5, 1e8, 1e11, 1e14),
        exponent("alpha_N", 0.07, 0.2),
        scale("D_c", 1e5, 1e8, 1e11, 1e14),
        exponent("alpha_D", 0.1, 0.25),
    ),
    _kaplan_nd,
)
kaplan_ns = Law(
    "Kaplan, size and steps",
    ("N", "S"),
    (
        scale("N_c", 1e4, 1e7, 1e10, 1e14),
        exponent("alpha_N", 0.07, 0.2),
        scale("S_c", 1e1, 1e2, 1e3, 1e4),
        exponent("alpha_S", 0.3, 0.7),
    ),
    _kaplan_ns,
)
hoffmann = Law(
    "Hoffmann",
    ("N", "D"),
    (
        scale("E", 0.3, 0.8, 1.5),
        scale("A", 5.0, 50.0, 500.0),
        scale("B", 20.0, 200.0, 2000.0),
        _ALPHA,
        _BETA,
    ),
    _hoffmann,
)
data_constrained = Law(
    "data-constrained",
    ("N", "D", "U"),
    (*hoffmann.parameters, scale("R_D", 3.0, 15.0), scale("R_N", 2.0, 8.0)),
    _data_constrained,
)
generalized = Law(
    "generalized",
    ("N", "D", "S"),
    (
        scale("e", 0.3, 0.8, 1.5),
        scale("a", 5.0, 50.0, 500.0),
        scale("b", 20.0, 200.0, 2000.0),
        Parameter("c", False, -1e6, 1e6, (0.1, 10.0)),
        _ALPHA,
        _BETA,
        free("gamma", -0.05, 0.05),
    ),
    _generalized,
)
frantar = Law(
    "Frantar",
    ("N", "D", "S"),
    (
        scale("a_S", 1.0, 20.0),
        exponent("b_S", 0.7),
        scale("c_S", 1.0, 40.0),
        exponent("b_N", 0.2, 0.4),
        scale("a_D", 1e4, 1e6, 1e9),
        exponent("b_D", 0.2, 0.4),
        scale("c", 0.3, 0.8, 1.5),
    ),
    _frantar,
)
abnar = Law(
    "Abnar",
    ("N", "D", "S"),
    (
        scale("a", 50.0, 5000.0),
        scale("b", 200.0, 5000.0),
        scale("c", 0.1, 0.5),
        scale("d", 1.0, 20.0),
        scale("e", 0.3, 1.0),
        exponent("alpha", 0.3, 0.6),
        exponent("beta", 0.3, 0.5),
        free("lambda", -0.2, 0.1),
        free("delta", 0.1),
        free("gamma", 0.15),
    ),
    _abnar,
)
cpt = Law(
    "continual pre-training",
    ("N", "D"),
    (*hoffmann.parameters, free("gamma", 0.0, 0.1)),
    _cpt,
)
steps = Law(
    "steps to a loss",
    ("B",),
    (scale("S_min", 10.0, 1e3, 1e5), scale("E_min", 1e4, 1e6, 1e8)),
    _steps,
)
hyperparameter = Law(
    "hyperparameter",
    ("N", "D"),
    (scale("c", 1e-3, 1.0), free("a", -0.7, 0.0), free("b", 0.0, 0.5)),
    _hyperparameter,
)


@lru_cache
def published(paper: str) -> Values:
    """A paper's values by name, as `data/published/PAPER.csv` lists them.

    paper: "hoffmann", where names with "corrected_" are those of Besiroglu et al. (2024), "frantar"
    or "abnar". Raises ValueError for another one.
    """
    if paper not in PAPERS:
        raise ValueError(f"no values of {paper!r} are stored: {', '.join(PAPERS)}")
    with (data_dir() / "published" / f"{paper}.csv").open(encoding="utf-8") as file:
        return MappingProxyType({r["name"]: float(r["value"]) for r in csv.DictReader(file)})


PAPERS = ("hoffmann", "frantar", "abnar")


def allocate(
    law: Law, values: Values, compute: float, *, flops: float = 6.0, **columns: float
) -> tuple[float, float]:
    """The N and D of least loss where `flops` N D = compute.

    Closed form for `hoffmann` and `cpt` (Hoffmann et al., 2022, equation 4); for the others a
    bounded search over log N. columns: the law's other columns, U or S.
    Raises ValueError for a law without N and D, or compute that is not positive.
    """
    if not {"N", "D"} <= set(law.columns):
        raise ValueError(f"the law {law.name!r} has no N and D to divide compute between")
    if not compute > 0:
        raise ValueError(f"compute is {compute}: give a number of FLOPs above 0")
    product = compute / flops
    if law.name in (hoffmann.name, cpt.name):
        gamma = values["gamma"] if law.name == cpt.name else 0.0
        size = _closed_form(values, product, gamma)
    else:
        size = _searched(law, values, product, columns)
    return size, product / size


def _closed_form(values: Values, product: float, gamma: float) -> float:
    """N = G product^(beta/k), G = (alpha A / ((beta-gamma) B))^(1/k), k = alpha + beta - gamma."""
    alpha, beta = values["alpha"], values["beta"]
    k = alpha + beta - gamma
    if k <= 0 or beta <= gamma:
        raise ValueError(f"gamma {gamma} is not below beta {beta}: larger is always better")
    g = alpha * values["A"] / ((beta - gamma) * values["B"])
    return g ** (1 / k) * product ** (beta / k)


def _searched(law: Law, values: Values, product: float, columns: Mapping[str, float]) -> float:
    """A dense look at log N, then a bounded search around the best."""
    from scipy.optimize import minimize_scalar

    def loss(log_size: float) -> float:
        size = math.exp(log_size)
        return float(law(values, N=size, D=product / size, **columns))

    sizes = np.linspace(0.0, math.log(product), 400)
    best = int(np.argmin([loss(size) for size in sizes]))
    bounds = sizes[max(0, best - 1)], sizes[min(len(sizes) - 1, best + 1)]
    options = {"xatol": 1e-10}
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options=options)
    return math.exp(float(found.x))
