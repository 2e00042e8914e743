"""The study of Step Law (Li et al., 2025): one part of the theme's grid, read.

Rates, batches, sizes and texts are the shared grid's part "batch-rate", under a cosine to a fixed
floor as in the paper; the rates' middle was moved to where the best lay on another seed, and a
fourth rate was added where the best lay at an end. The largest model has, as the smaller ones, 128
and 512 KiB of text in the place of the planned 256 KiB and 1 MiB. Points of its own:
- laws: no training. From the grid's rows of one seed: the smallest eigenvalue of all surfaces, and
  what laws lose at a cell that they were not fitted to. Rivals have the paper's forms and are
  fitted as it is: a law of compute alone, of size alone, and constants. A sum of the rows' losses
  is kept, so that a test notices rows of another grid.
- floor: the smallest model under a cosine to a tenth of the peak, at two amounts of text, for one
  batch and the grid's three rates: is it the schedule that raises the rate with the data?
Fixed on seed 100: runs within 1 % of the best are fitted, not within 0.25 %, which leaves one or
two a cell, as our rates lie further apart than the paper's; optima are read off the quadratic
surface of a cell, as a parabola over the batch alone was less steady; the surface is laid through
the five batches nearest the best run's, as through all eight it misses the runs around the bottom;
and each cell is left out in turn, not only the largest, as the paper would: two cells took nearly
as much compute, and which of them was left out decided who was ahead. A choice beyond those five
batches costs what the nearest of them does, which spares the laws that are far off.
Since then the grid has grown twice, on the same seeds and when the verdicts on the rest were known:
by most batches and a text of its largest model, then by batches above 2,048 bytes (above 4,096 with
2 MiB), one of 64 bytes, and the fourth rates. One cell takes more than twice as much compute as any
other. The verdicts on the largest alone are of that cell, beside the mean over all; the lab tells
both.
"""

import numpy as np

from lablib.evidence import Pair, grid
from lablib.evidence.studies import matching, study
from lablib.scaling import batch_size_law, step_law
from lablib.studies import scaling_grid

KB, MB = 2**10, 2**20
LEAST, MORE, MOST = MB // 8, MB // 2, 2 * MB  # bytes seen
WITHIN = 0.01
LENGTH, END_LR = 64, 1e-5
AS_GRID = {"length": LENGTH, "end_lr": END_LR, "points": 2}  # what all runs of the part share
PART = {"part": "batch-rate"}
SMALL = PART | {"n_layers": 1, "dim": 32}
LARGE = PART | {"n_layers": 3, "dim": 64}


def run(
    kind: str,
    seed: int,
    batch: int = 256,
    lr: float = 0.0125,
    tokens: int = LEAST,
    n_layers: int = 1,
    dim: int = 32,
) -> dict:
    """One point. kind: "floor" trains as the grid does, to a tenth of the peak; "laws" reads it."""
    if kind == "laws":
        return laws(study("scaling-grid").runs(), seed)
    size = {"n_layers": n_layers, "dim": dim, "tokens": tokens, "batch": batch}
    made = scaling_grid.run("floor", seed, **size, lr=lr, length=LENGTH, points=2)
    return {key: made[key] for key in ("N", "loss")}


FORMS = {  # what rate and batch depend on
    "step": {"lr": ("N", "D"), "batch": ("D",)},
    "compute": {"lr": ("C",), "batch": ("C",)},
    "size": {"lr": ("N",), "batch": ("N",)},
    "same": {"lr": (), "batch": ()},
}


def laws(runs: list, seed: int) -> dict:
    """What a seed's rows of the grid say.

    eigenvalue: the smallest of every cell's Hessian, in nats; "plane" has none. step, compute, size
    and same: the fitted laws' regrets in per mille of the loss, the mean over the cells, each left
    out of the fit in turn; largest_step and so on: of the same four at the cell of most compute.
    """
    rows = matching(runs, **PART, seed=seed)
    surfaces = {cell: step_law.quadratic_surface(found) for cell, found in cells_of(rows).items()}
    regrets = {cell: left_out(rows, cell, surface) for cell, surface in surfaces.items()}
    largest = max(regrets, key=lambda cell: cell[0] * cell[1])
    return {
        "eigenvalue": float(min(surface.eigenvalues[0] for surface in surfaces.values())),
        "plane": 0.0,
        **{name: float(np.mean([each[name] for each in regrets.values()])) for name in FORMS},
        **{f"largest_{name}": regret for name, regret in regrets[largest].items()},
        "sum": float(sum(run["loss"] for run in rows)),
    }


def left_out(rows: list, cell: tuple[float, float], surface: step_law.Surface) -> dict[str, float]:
    """The regret of each form at a cell, in per mille, fitted to near-optimal runs of others."""
    others = [run for run in rows if cell_of(run) != cell]
    near = step_law.near_optimal(others, WITHIN)
    fitted = {name: step_law.fit_law(near, **form) for name, form in FORMS.items()}
    return {name: 1000 * step_law.regret(law(*cell), surface) for name, law in fitted.items()}


def cell_of(run: dict) -> tuple[float, float]:
    """(N, D)."""
    return run["N"], run["tokens"]


def cells_of(rows: list) -> dict[tuple[float, float], list]:
    """The rows of each (N, D)."""
    made: dict[tuple[float, float], list] = {}
    for row in rows:
        made.setdefault(cell_of(row), []).append(row)
    return made


SEEDS = range(5)
FLOOR_BATCHES = (512,)


def floor(seed) -> list[dict]:
    """Two amounts of text, one batch, the grid's three rates."""
    made = []
    for batch in FLOOR_BATCHES:
        lr = scaling_grid.three_rates(SMALL["dim"], batch)
        made += grid(kind="floor", seed=seed, tokens=(LEAST, MORE), batch=batch, lr=lr)
    return made


POINTS = [*(point for seed in SEEDS for point in floor(seed)), *grid(kind="laws", seed=SEEDS)]
TUNING = floor(100)
CANARY = {
    "kind": "floor",
    "seed": 200,
    "dim": 16,
    "tokens": 2 * KB,
    "batch": 128,
    "lr": 0.01,
}
READS = {"scaling-grid": {"part": ("batch-rate",)}}


def foretelling(rival: str, which: str = "") -> dict:
    """The roles of Step Law and a rival. The control is one rate and batch for all, or a rival."""
    control = None if rival == "same" else f"{which}same"
    return {"method": f"{which}step", "baseline": f"{which}{rival}", "control": control}


_AT_FIRST = SMALL | {"tokens": LEAST}
# The control of more text is a larger model, that of a larger model is more text. None: the plane,
# and one rate and batch for all, are controls themselves.
ROLES = {
    "rate-data": {
        "method": SMALL | {"tokens": MOST},
        "baseline": _AT_FIRST,
        "control": LARGE | {"tokens": LEAST},
    },
    "rate-size": {
        "method": LARGE | {"tokens": LEAST},
        "baseline": _AT_FIRST,
        "control": SMALL | {"tokens": MORE},
    },
    "foretold": foretelling("compute"),
    "foretold-size": foretelling("size"),
    "foretold-same": foretelling("same"),
    "largest-compute": foretelling("compute", "largest_"),
    "largest-size": foretelling("size", "largest_"),
    "largest-same": foretelling("same", "largest_"),
    "convex": {"method": "eigenvalue", "baseline": "plane", "control": None},
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed."""
    made = {}
    for id, role in ROLES.items():
        if isinstance(role["method"], str):
            rows = matching(runs, kind="laws")
            made[id] = [Pair(r["seed"], r[role["method"]], r[role["baseline"]]) for r in rows]
            continue
        ours, theirs = (best_rate(runs, role[side]) for side in ("method", "baseline"))
        made[id] = [Pair(seed, ours[seed], theirs[seed]) for seed in sorted(theirs)]
    rate, _ = step_law.along(np.geomspace(1e18, 1e24, 7))
    return made | {"compute-rate": rate}


def by_seed(runs: list, cell: dict) -> dict[int, list]:
    """The rows of a cell, by seed."""
    rows = matching(runs, **cell)
    return {seed: matching(rows, seed=seed) for seed in sorted({run["seed"] for run in rows})}


def best_rate(runs: list, cell: dict) -> dict[int, float]:
    """The rate at the bottom of a cell's surface, kept within what was tried, by seed."""
    made = {}
    for seed, rows in by_seed(runs, cell).items():
        surface = step_law.quadratic_surface(rows)
        made[seed] = float(surface.lowest().lr)
    return made


def within(rows: list, surface: step_law.Surface) -> list:
    """The rows of a cell with the batches that its surface was fitted to."""
    low, high = surface.low[1] - 1e-9, surface.high[1] + 1e-9
    return [run for run in rows if low <= np.log(run["batch"]) <= high]


def misses(rows: list, batches: int) -> float:
    """By how many nats a cell's surface through so many batches misses its runs, root mean square.

    The runs are those that the surface of `quadratic_surface` was fitted to, each seed by itself.
    """
    off: list[float] = []
    for found in by_seed(rows, {}).values():
        near = within(found, step_law.quadratic_surface(found))
        surface = step_law.quadratic_surface(found, batches)
        off += [run["loss"] - float(surface.loss(run["lr"], run["batch"])) for run in near]
    return float(np.sqrt(np.mean(np.square(off))))


def averaged(rows: list) -> dict[tuple[float, float], float]:
    """(rate, batch) -> the loss of a cell's runs, the mean over seeds."""
    made: dict[tuple[float, float], list[float]] = {}
    for run in rows:
        made.setdefault((run["lr"], run["batch"]), []).append(run["loss"])
    return {at: float(np.mean(losses)) for at, losses in made.items()}


def words(tokens: float) -> str:
    """An amount of text: 128 KiB, 2 MiB."""
    return f"{tokens // MB:.0f} MiB" if tokens >= MB else f"{tokens // KB:.0f} KiB"


def near_a_run(rows: list, lr: np.ndarray, batch: np.ndarray) -> np.ndarray:
    """Whether a rate lies between those that were tried for a batch, straight in logarithms."""
    batches = sorted({run["batch"] for run in rows})
    ends = [sorted(run["lr"] for run in matching(rows, batch=one)) for one in batches]
    low, high = (
        np.interp(np.log(batch), np.log(batches), np.log([end[place] for end in ends]))
        for place in (0, -1)
    )
    inside = (batch >= batches[0]) & (batch <= batches[-1])
    return inside & (np.log(lr) >= low) & (np.log(lr) <= high)


def growth(runs: list, cell: dict) -> list[float]:
    """The exponent of the text in the best rate at a given batch, the batches' mean, by seed."""
    made: dict[int, list[float]] = {}
    for batch in FLOOR_BATCHES:
        at = [by_seed(runs, cell | {"tokens": D, "batch": batch}) for D in (LEAST, MORE)]
        for seed in at[0]:
            few, many = (float(batch_size_law.tuned(side[seed]).lr[0]) for side in at)
            made.setdefault(seed, []).append(float(np.log(many / few) / np.log(MORE / LEAST)))
    return [float(np.mean(slopes)) for slopes in made.values()]
