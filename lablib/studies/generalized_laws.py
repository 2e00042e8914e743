"""Laws of sparse models, fitted to the trainings of the study of generalized scaling.

Nothing is trained here. A run joins one seed's rows, all sizes and texts, fits laws to a part of
them, and keeps how far they are off on the rest. Left out, and predicted, are the sparse models of
the largest size and, at every size, those with 8 experts. Laws are the generalized one, the dense
law told active or all parameters, and the two older laws of sparse models. The parts, the laws and
the way to fit them were fixed before the rows of the larger models were made. A sum of the rows'
losses is kept, so that other rows are noticed.
The study of generalized scaling reads these runs; its trainings come first.
"""

from statistics import fmean

import numpy as np

from lablib.evidence import grid, matching
from lablib.evidence.studies import study
from lablib.scaling import generalized_scaling as gs
from lablib.scaling.inference import fit
from lablib.scaling.laws import abnar, frantar, generalized
from lablib.studies import generalized_scaling as trainings

KB = 2**10
LARGEST, MOST = (3, 64), 8  # the size and the number of experts that are left out
RIVALS = {"frantar": (frantar, "N"), "abnar": (abnar, "N_total")}  # and the size that each is told


def run(kind: str, seed: int) -> dict:
    """Errors and coefficients of one seed's laws.

    kind: "grid" reads a seed's rows, "pooled" those of all seeds together; "made up" has rows of a
        known law, and no older laws.
    told, active, total, frantar, abnar: mean differences of log loss on what is left out; untold is
    the smaller of active and total. dense, experts: mean losses over the cells that have both, in
    nats a byte. c, gamma, off: of the law fitted to all rows, and its mean difference on them;
    c_still, off_still: the same where gamma is held at 0. A warning names what no row tells.
    """
    rows = made_up() if kind == "made up" else rows_of(kind, seed)
    errors = {name: error(rows, reading) for name, reading in trainings.READINGS.items()}
    both = [cell for cell in cells_of(rows).values() if {1, MOST} <= cell.keys()]
    made = errors | {"untold": min(errors["active"], errors["total"])}
    for name, n in (("dense", 1), ("experts", MOST)):
        made[name] = fmean(loss for cell in both for loss in cell[n])
    made |= coefficients(rows) | {"no_c": 0.0, "sum": float(sum(row["loss"] for row in rows))}
    return made if kind == "made up" else made | rivals(rows)


def rows_of(kind: str, seed: int) -> list[dict]:
    """The stored trainings' rows, of one seed or of all that are judged."""
    stored = [row["point"] | row["result"] for row in study("generalized-scaling").read()[1]]
    seeds = trainings.by_seed(stored)
    return seeds[seed] if kind == "grid" else [row for s in trainings.SEEDS for row in seeds[s]]


def divided(rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """What laws are fitted to, and what they have to predict."""
    near, far = [], []
    for row in rows:
        (far if trainings.left_out(row, LARGEST) else near).append(row)
    return near, far


def error(rows: list[dict], reading: tuple) -> float:
    """By a law that was fitted to the rest, on what is left out; reading: as in `READINGS`."""
    near, far = divided(rows)
    return trainings.off(trainings.predicted(trainings.fitted(near, *reading), far, *reading), far)


def rivals(rows: list[dict]) -> dict:
    """The older laws' errors on what is left out, fitted to the rest from all of their starts."""
    near, far = divided(rows)
    made = {}
    for name, (law, size) in RIVALS.items():
        best = fit(law, trainings.columns(near, size), "loss")
        table = trainings.columns(far, size)
        made[name] = trainings.off(best.predict(N=table["N"], D=table["D"], S=table["S"]), far)
        made[f"{name}_warning"] = best.warning
    return made


def coefficients(rows: list[dict]) -> dict[str, float]:
    """Of the generalized law fitted to all rows, and of one whose floor may not move."""
    law, still = trainings.fitted(rows), without_gamma(rows)
    offs = [trainings.off(trainings.predicted(values, rows), rows) for values in (law, still)]
    made = {"c": law["c"], "gamma": law["gamma"], "c_still": still["c"]}
    return made | dict(zip(("off", "off_still"), offs))


def without_gamma(rows: list[dict]) -> dict[str, float]:
    """The generalized law fitted to rows with a floor that may not move."""
    options = {"fixed": {"gamma": 0.0}, "starts": [trainings.fitted(rows)]}
    return fit(generalized, trainings.columns(rows), "loss", **options).values


def cells_of(rows: list[dict]) -> dict[tuple, dict[int, list[float]]]:
    """(layers, dim, bytes seen) -> {number of experts: losses, one a seed}."""
    cells: dict[tuple, dict[int, list[float]]] = {}
    for row in rows:
        cell = cells.setdefault((row["n_layers"], row["dim"], row["tokens"]), {})
        cell.setdefault(row["n_experts"], []).append(row["loss"])
    return cells


def means(rows: list[dict], tokens: int, n_experts: int) -> np.ndarray:
    """Active parameters, all, and loss, (3, sizes): of each size the means over rows."""
    kept = matching(rows, tokens=tokens, n_experts=n_experts)
    sizes = [matching(kept, N=N) for N in sorted({row["N"] for row in kept})]
    keys = ("N", "N_total", "loss")
    return np.array([[fmean(row[key] for row in size) for size in sizes] for key in keys])


def made_up() -> list[dict]:
    """Rows of a known law on a smaller grid, off by up to a hundredth: what the canary reads."""
    law = {"e": 0.7, "a": 15.0, "b": 90.0, "c": 4.0, "alpha": 0.3, "beta": 0.35, "gamma": 0.05}
    sizes = {(1, 16): 3360, (2, 32): 26752, LARGEST: 150912}
    cells = [(*size, n, seen * KB) for size in sizes for n in (1, 2, 4, 8) for seen in (512, 2048)]
    rows = []
    for place, (layers, dim, n, seen) in enumerate(cells):
        N = sizes[layers, dim]
        total = N * (1 + 0.69 * (n - 1))
        loss = gs.generalized_loss(N, seen, 1 - N / total, **law) * (1 + 0.01 * np.sin(7 * place))
        rows.append(dict(zip(trainings.COLUMNS, (layers, dim, n, seen, N, total, float(loss)))))
    return rows


POINTS = [*grid(kind="grid", seed=trainings.SEEDS), {"kind": "pooled", "seed": 0}]
TUNING: list[dict] = []
CANARY = {"kind": "made up", "seed": 7}
