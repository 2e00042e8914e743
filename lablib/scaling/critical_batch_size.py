"""How Does Critical Batch Size Scale in Pre-training? (Zhang et al., 2024).

The definition: S(B) = a + b/B steps bring a batch of B to a loss; the critical batch is where
S(B) B has grown by a fifth over what the best batch needs. Then: its power laws in
parameters and data, the gradient noise scale, and least squares, where all of it is exact.
Batches are in one unit, sequences or tokens, throughout.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np
from torch import Tensor, nn

from lablib.paths import data_dir
from lablib.scaling import inference, laws
from lablib.scaling.curves import first_below
from lablib.scaling.fits import PowerLaw, fit_power_law


def steps_of(B: np.ndarray, a: float, b: float) -> np.ndarray:
    """S(B) = a + b/B: steps to the loss; no batch takes fewer than a, and b data are enough."""
    return a + b / np.asarray(B, float)


def critical_batch(a: float, b: float, optimal: float, overhead: float = 0.2) -> float:
    """The batch that needs `overhead` more data than the batch `optimal`.

    S(B*) B* = (1 + overhead) S(B_opt) B_opt, with S(B) B = a B + b, gives
    B* = (1 + overhead) B_opt + overhead b / a; b/(5 a) + 1.2 B_opt at a fifth (section 2).
    Raises ValueError for a, b or an overhead that is not positive.
    """
    if not (a > 0 and b > 0 and overhead > 0):
        raise ValueError(f"a {a}, b {b} and overhead {overhead} must be above 0")
    return (1 + overhead) * optimal + overhead * b / a


@dataclass(frozen=True)
class Efficiency:
    """S(B) = a + b/B as fitted. optimal: the batch that overhead is counted from."""

    a: float
    b: float
    optimal: float

    def critical(self, overhead: float = 0.2) -> float:
        """`critical_batch` of this curve."""
        return critical_batch(self.a, self.b, self.optimal, overhead)


def fit_steps(batches: Sequence[float], steps: Sequence[float], optimal: float) -> Efficiency:
    """a and b by least squares on logarithms, from many starts (`lablib.scaling.inference.fit`).

    batches, steps: positive, three different batches or more.
    """
    rows = {"B": np.asarray(batches, float), "S": np.asarray(steps, float)}
    if len(np.unique(rows["B"])) < 3:
        raise ValueError("two numbers need steps at three different batches at least")
    values = inference.fit(laws.steps, rows, "S", loss="log-squares").values
    return Efficiency(values["S_min"], values["E_min"], optimal)


def critical_law(x: Sequence[float], critical: Sequence[float]) -> PowerLaw:
    """B* = c x^k by least squares on logarithms; x: parameters, or tokens."""
    return fit_power_law(np.asarray(x, float), np.asarray(critical, float))


def steps_to(curve: Iterable[tuple[float, float]], loss: float) -> float:
    """The step at which a curve of (step, loss) first reaches a loss; nan when it never does."""
    steps, losses = zip(*curve)
    return first_below(steps, losses, loss)


def published() -> dict[str, list[dict[str, float]]]:
    """The paper's points: model -> rows of parameters (millions), loss, batch, steps."""
    path = data_dir() / "published" / "critical-batch-size.csv"
    rows: dict[str, list[dict[str, float]]] = {}
    with open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["unit"] == "steps":
                numbers = {key: float(row[key]) for key in ("parameters", "loss", "batch", "value")}
                rows.setdefault(row["model"], []).append(numbers)
    return rows


def printed_critical(tokens: float, length: int = 512) -> float:
    """The paper's critical batch after so many tokens, in tokens; its sequences have `length`."""
    path = data_dir() / "published" / "critical-batch-size.csv"
    with open(path, encoding="utf-8", newline="") as file:
        value = {
            row["unit"]: float(row["value"]) for row in csv.DictReader(file) if not row["model"]
        }
    at_a_million = value["sequences, at a million tokens"]
    power = value["exponent of the critical batch in parameters and in tokens"]
    return at_a_million * (tokens / 1e6) ** power * length


@lru_cache
def published_fits() -> Mapping[str, Efficiency]:
    """S(B) of each of the published models, from the batch of 256 sequences, the paper's best."""
    return MappingProxyType(
        {
            model: fit_steps([r["batch"] for r in rows], [r["value"] for r in rows], 256)
            for model, rows in published().items()
        }
    )


def published_critical(overhead: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Parameters in millions, and critical batches in sequences, of the five published sizes."""
    sizes = [rows[0]["parameters"] for rows in published().values()]
    return np.array(sizes), np.array([fit.critical(overhead) for fit in published_fits().values()])


def noise_scale(small: float, large: float, b_small: int, b_large: int) -> float:
    """tr(Sigma) / |g|^2 from squared norms of gradients of two batch sizes, each a mean over draws.

    E|G_B|^2 = |g|^2 + tr(Sigma)/B, so two batch sizes give both unknowns.
    Source: McCandlish et al. (2018), appendix A.1. Raises ValueError when the batches are equal.
    """
    if b_small == b_large:
        raise ValueError(
            f"both batches have {b_small}: it takes two sizes to tell noise from signal"
        )
    signal = (b_large * large - b_small * small) / (b_large - b_small)  # |g|^2
    noise = (small - large) / (1 / b_small - 1 / b_large)  # tr(Sigma)
    return noise / signal


def squared_norms(
    model: nn.Module,
    loss: Callable[[nn.Module, Tensor], Tensor],
    rows: Sequence[Tensor],
) -> tuple[float, float]:
    """Mean squared norm of the gradient of one part of a batch, and that of the whole batch.

    rows: parts of equal size; their mean gradient is that of the whole. Gradients that the model
    holds are cleared, before and after.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    parts: list[float] = []  # |g|^2 / n^2, one for each row and parameter
    hooks = [p.register_hook(lambda g: parts.append(float(g.square().sum()))) for p in parameters]
    model.zero_grad()
    try:
        for row in rows:
            (loss(model, row) / len(rows)).backward()  # adds to the one gradient that is kept
    finally:
        for hook in hooks:
            hook.remove()
    whole = sum(float(p.grad.square().sum()) for p in parameters if p.grad is not None)
    model.zero_grad()
    return len(rows) * sum(parts), whole


RATES = np.geomspace(0.005, 0.8, 14)


@dataclass(frozen=True)
class LeastSquares:
    """Linear regression on Gaussian inputs whose variances and target fall as powers.

    eigenvalue_i = i^-capacity, target_i^2 eigenvalue_i = i^-source; noise: variance of the labels.
    Source: section 4.2.
    """

    dim: int = 200
    capacity: float = 1.5
    source: float = 1.5
    noise: float = 1.0

    @property
    def eigenvalues(self) -> np.ndarray:
        """Of the inputs' covariance: (dim,)."""
        return np.arange(1.0, self.dim + 1) ** -self.capacity

    @property
    def target(self) -> np.ndarray:
        """The weights to be found: (dim,)."""
        return np.sqrt(np.arange(1.0, self.dim + 1) ** -self.source / self.eigenvalues)

    def risks(self, rate: float | np.ndarray, batch: int, steps: int) -> np.ndarray:
        """Exact expected excess risk, half of E (x.w - x.w*)^2, after 0 to `steps` steps.

        rate: one, or an array -> (steps + 1,) or (steps + 1, rates). Inputs are Gaussian, so that
        E[x x' M x x'] = 2 H M H + H tr(H M), and m, the expected squares of the weights' errors,
        follow a recursion of their own.
        """
        h, m = self.eigenvalues, self.target**2  # (dim,)
        r = np.asarray(rate, float)[..., None]  # (rates, 1)
        risks = [m @ h / 2 + 0 * r[..., 0]]
        for _ in range(steps):
            noise = (m @ h)[..., None] + self.noise
            # m <- m - 2 r h m + r^2 ((1 + 1/B) h^2 m + h (h . m + noise) / B)
            m = m - 2 * r * h * m + r**2 * ((1 + 1 / batch) * h**2 * m + h * noise / batch)
            risks.append(m @ h / 2)
        return np.array(risks)

    def best_risk(self, batch: int, data: int, rates: np.ndarray = RATES) -> float:
        """The least risk after one pass over `data` rows, over constant rates."""
        with np.errstate(all="ignore"):  # some rates diverge
            return float(np.nanmin(self.risks(rates, batch, data // batch)[-1]))

    def critical(self, data: int, overhead: float = 0.2) -> float:
        """The batch at which the best risk after `data` rows is `overhead` above that of one row.

        Between two powers of two, on a line in the logarithm of the batch; nan when none is.
        """
        batches = 2 ** np.arange(int(np.log2(data)))
        risks = np.array([self.best_risk(batch, data) for batch in batches])
        return first_below(batches, -risks, -(1 + overhead) * risks[0])

    def simulate(self, rate: float, batch: int, steps: int, runs: int, seed: int = 0) -> np.ndarray:
        """Excess risk after `steps` steps of mini-batch SGD from zero, one value a run: (runs,)."""
        random = np.random.default_rng(seed)
        h, target = self.eigenvalues, self.target
        w = np.zeros((runs, self.dim))
        for _ in range(steps):
            x = random.normal(size=(runs, batch, self.dim)) * np.sqrt(h)
            labels = x @ target + random.normal(size=(runs, batch)) * np.sqrt(self.noise)
            off = np.einsum("rbd,rd->rb", x, w) - labels
            w -= rate / batch * np.einsum("rb,rbd->rd", off, x)
        return ((w - target) ** 2 @ h) / 2
