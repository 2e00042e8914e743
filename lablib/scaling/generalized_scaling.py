"""Generalizing Scaling Laws for Dense and Sparse Large Language Models (Hossain et al., 2025).

Lab 402. One law for dense, pruned and mixture-of-experts models: `generalized_loss` is equation 7.
Then what follows from it, what N and S of a model are, and models to measure it on. The law as an
object for `lablib.scaling.inference.fit` is `laws.generalized`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lablib.experts.moe import MoE, SwiGLUExperts
from lablib.experts.routing import HashChoice, balanced_table, hash_by_token
from lablib.models import GPT, anatomy
from lablib.scaling.inference import Fit, Table, fit
from lablib.scaling.laws import Values, generalized, published


def generalized_loss(N, D, S, e, a, b, c, alpha, beta, gamma):
    """The loss, in nats, of a model that uses N parameters a token, S of all it has lying idle.

    N: active parameters, D: tokens, S: sparsity, from 0 to below 1; numbers or arrays.
    Source: equation 7.
    """
    # What no model and no data get below: e (1-S)^gamma
    floor = e * (1 - S) ** gamma
    # A dense model of the total size, N_total = N / (1-S): a (1-S)^alpha / N^alpha
    total_size = a * (1 - S) ** alpha / N**alpha
    # What idle parameters are short of active ones: c S / N^alpha
    idle = c * S / N**alpha
    # Too little text: b / D^beta
    data = b / D**beta
    return floor + total_size + idle + data


NAMES = ("e", "a", "b", "c", "alpha", "beta", "gamma")
# As printed in Tables VII to IX: fitted to what earlier laws say of dense models (Hoffmann et al.),
# of pruned ones (Frantar et al.) and of mixtures of experts (Abnar et al.).
DENSE = {"e": 1.69, "a": 406.4, "b": 410.7, "c": 0.0, "alpha": 0.34, "beta": 0.28, "gamma": 0.01}
PRUNED = {"e": 0.15, "a": 86.03, "b": 7.90, "c": 29.26, "alpha": 0.28, "beta": 0.08, "gamma": 2.00}
EXPERTS = {
    "e": 0.57,
    "a": 8.26,
    "b": 6324.82,
    "c": 3.57,
    "alpha": 0.08,
    "beta": 0.40,
    "gamma": 1.19,
}


def dense_equivalent(values: Values, N: float, S: float) -> float:
    """Parameters of the dense model that is as good as a sparse one with N active, on equal data.

    Infinite where the sparse model is below the floor of every dense one.
    """
    sparse = generalized_loss(N, 1.0, S, **{**values, "b": 0.0})
    above = sparse - values["e"]
    return float((values["a"] / above) ** (1 / values["alpha"])) if above > 0 else np.inf


def frantar_equivalent(S: float, values: Values | None = None) -> float:
    """How many times as many parameters a dense model needs as a pruned one has left.

    values: of Frantar et al.'s law, else those that they print. From
    (a_S (1-S)^b_S + c_S) N^-b_N = (a_S + c_S) N'^-b_N.
    """
    values = values or published("frantar")
    factor = values["a_S"] * (1 - S) ** values["b_S"] + values["c_S"]
    return float(((values["a_S"] + values["c_S"]) / factor) ** (1 / values["b_N"]))


def isoflop(values: Values, compute: float, S: float, N: np.ndarray) -> np.ndarray:
    """The losses of models with N active parameters that spend `compute` = 6 N D FLOPs."""
    return generalized_loss(N, compute / (6 * N), S, **values)


def at_total(values: Values, total: float, compute: float, S: np.ndarray) -> np.ndarray:
    """The losses of models of one total size that spend `compute` FLOPs, at each sparsity.

    More sparsity leaves fewer parameters active, so that the same FLOPs read more tokens.
    """
    return isoflop(values, compute, S, total * (1 - np.asarray(S)))


def best_sparsity(values: Values, total: float, compute: float, highest: float = 0.999) -> float:
    """The sparsity of least loss for a total size and a budget of FLOPs, by a search on a grid."""
    S = 1 - np.geomspace(1 - highest, 1, 2001)
    return float(S[at_total(values, total, compute, S).argmin()])


class Sizes(NamedTuple):
    """How many parameters outside embedding and head a token uses, and how many there are."""

    active: int
    total: int

    @property
    def sparsity(self) -> float:
        """The share that lies idle."""
        return 1 - self.active / self.total


def sizes(model: nn.Module) -> Sizes:
    """Of experts one of n is active, of masked or pruned matrices what is not zero.

    Works on `GPT` and transformers' models. Every expert layer must be top-1.
    """
    active = total = 0
    for block in anatomy.blocks(model):
        for module in block.modules():
            share = 1.0 if not isinstance(module, SwiGLUExperts) else 1 / module.n_experts
            for weight in own_weights(module):
                total += weight.numel()
                used = int((weight != 0).sum()) if weight.ndim == 2 else weight.numel()
                active += round(used * share)
    return Sizes(active, total)


def own_weights(module: nn.Module) -> list[Tensor]:
    """The module's own parameters, a masked one as its layer sees it."""
    if isinstance(module, parametrize.ParametrizationList):
        return []
    masked = [module.weight] if parametrize.is_parametrized(module, "weight") else []
    return masked + list(module.parameters(recurse=False))


def hash_experts_(model: GPT, n_experts: int, frequencies: Tensor) -> GPT:
    """Experts in every block, each token's chosen by its id: no router to learn, none dropped.

    frequencies: (vocab,), by which ids are dealt out so that experts get about as many tokens.
    Experts are as wide as the layer they replace, and begin as it does: FLOPs a token stay.
    Source: Hash Layers (Roller et al., 2021).
    """
    table = balanced_table(frequencies, n_experts)
    config, std = model.config, model.config.init_std
    for block in model.blocks:
        experts = SwiGLUExperts(n_experts, config.dim, config.ffn_dim)
        nn.init.normal_(experts.gate_up, 0.0, std)
        nn.init.normal_(experts.down, 0.0, std * (2 * config.n_layers) ** -0.5)
        block.mlp = MoE(HashChoice(table, n_experts), experts)
    hash_by_token(model)
    return model


class Mask(nn.Module):
    """Zeros that stay: weight -> weight * kept."""

    def __init__(self, kept: Tensor):
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.kept


def mask_(model: nn.Module, share: float) -> nn.Module:
    """Take a random share of each block's matrices away for good, before training, in place.

    What stays is made larger by (1 - share)^-0.5, so that outputs begin as large as without.
    Draws come from torch's generator.
    """
    for layer in anatomy.projections(model).values():
        kept = (torch.rand_like(layer.weight) >= share).to(layer.weight)
        with torch.no_grad():
            layer.weight *= (1 - share) ** -0.5
        parametrize.register_parametrization(layer, "weight", Mask(kept))
    return model


@torch.no_grad()
def prune_(model: nn.Module, share: float) -> nn.Module:
    """Set the smallest share of each block's matrices to zero, in place; no training follows."""
    for layer in anatomy.projections(model).values() if share else ():
        size = layer.weight.abs()
        smallest = size.flatten().kthvalue(max(1, round(share * size.numel()))).values
        layer.weight *= size > smallest
    return model


def fit_generalized(table: Table, delta: float = 1e-3) -> dict[str, float]:
    """The law's parameters from columns N, D, S and loss: of least Huber loss of log residuals.

    Where S is 0 in all rows, c and gamma are 0, and the others are Hoffmann's law. gamma stays from
    -2 to 2, as printed ones do: a few runs don't hold it. By a trust region's least squares, in a
    tenth of the time of `lablib.scaling.inference.fit`: a study fits many such laws. On rows that
    tell all seven parameters both find one minimum. On a study's few rows the general fit, whose
    bounds are wider, ends lower. Begun with the floor as half of the least loss.
    """
    from scipy.optimize import least_squares

    N, D, S, loss = (np.asarray(table[name], float) for name in ("N", "D", "S", "loss"))
    size, data, low = np.exp(np.log(N).mean()), np.exp(np.log(D).mean()), loss.min()
    sparse = 2 if np.any(S) else 0

    def values(theta: np.ndarray) -> dict[str, float]:
        e, a, b, alpha, beta = np.exp(theta[:5]).tolist()
        c, gamma = (float(theta[5]) * a, float(theta[6])) if sparse else (0.0, 0.0)
        return dict(zip(NAMES, (e, a, b, c, alpha, beta, gamma)))

    def residuals(theta: np.ndarray) -> np.ndarray:
        predicted = generalized_loss(N, D, S, **values(theta))
        return np.log(np.maximum(predicted, 1e-9) / loss)

    bounds = np.array(
        [(-27.0, 60.0)] * 3 + [(-6.9, 1.6)] * 2 + [(-100.0, 100.0), (-2.0, 2.0)][:sparse]
    ).T
    ends = []
    for alpha, beta in itertools.product((0.2, 0.5), repeat=2):
        start = [low / 2, low / 4 * size**alpha, low / 4 * data**beta, alpha, beta]
        theta = [*np.log(start), *[0.0] * sparse]
        options = {"loss": "huber", "f_scale": delta, "x_scale": "jac", "max_nfev": 300}
        tight = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-12)
        ends.append(least_squares(residuals, theta, bounds=bounds, **options, **tight))
    return values(min(ends, key=lambda end: end.cost).x)


def fit_widely(table: Table) -> Fit:
    """The same loss within the law's own bounds, by `lablib.scaling.inference.fit`.

    Begun where `fit_generalized` ends, and once more from a floor that rises with sparsity: on each
    of the study's seeds as low as from all starts of the law's grid, in a fifth of their time. With
    so few rows parameters run to a bound.
    """
    inner = fit_generalized(table)
    return fit(generalized, table, "loss", starts=[inner, inner | {"c": 0.0, "gamma": -5.0}])


Bounds = Mapping[str, tuple[float, float]]


def search(table: Table, bounds: Bounds, seed: int = 0, steps: int = 300) -> dict[str, float]:
    """The law's parameters of least squared error of log loss, by differential evolution.

    A black-box search within bounds, as the paper's, which is Bayesian (the package ytopt).
    bounds: (low, high) by parameter. steps: generations of 15 candidates a parameter.
    """
    from scipy.optimize import differential_evolution

    N, D, S, loss = (np.asarray(table[name], float)[:, None] for name in ("N", "D", "S", "loss"))

    def error(theta: np.ndarray) -> np.ndarray:  # (parameters, candidates) -> (candidates,)
        predicted = generalized_loss(N, D, S, **dict(zip(bounds, theta)))  # (rows, candidates)
        off = np.log(np.maximum(predicted, 1e-9)) - np.log(loss)
        return np.square(off).sum(0)

    options = {"vectorized": True, "updating": "deferred", "polish": False, "tol": 0.0}
    made = differential_evolution(error, list(bounds.values()), seed=seed, maxiter=steps, **options)
    return dict(zip(bounds, made.x.tolist()))
