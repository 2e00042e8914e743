"""The study of scaling laws and batch size (Shuai et al., 2024): a part of the theme's grid, read.

Batches, rates and sizes are the shared grid's part "batch-rate": three rates for each batch, around
a middle that was tuned on another seed, and a fourth where the best lay at an end there. Three
sizes read 128 and 512 KiB, the smallest 2 MiB, too, in the place of the planned 256 KiB, 1 and 4
MiB, which were cut for time. Batches reach from one sequence, 64 bytes, to 8,192 bytes; with the
least text to 4,096, which leaves 32 steps. What lies above 2,048 bytes (4,096 with 2 MiB), the
fourth rates, and most of the largest size, which the plan had not here, came later, on the same
seeds, when the verdicts on the rest were known; the lab tells what the frontier says without most
of the largest size, and the exponent of the rate on either side of 1,024 bytes.
Points of its own:
- laws: no training. One number a seed from the grid's rows: the exponent of the rate in the batch,
  those of steps and batch along the compute frontier, and what the batch foretold from less text
  loses on the most text, beside the batch that was best on the least. A sum of the rows' losses is
  kept, so that a test notices rows of another grid.
- beta2: the grid takes 0.99 for AdamW's second moment below 1,024 bytes a batch, after Porian et
  al. (2024); here the smallest batches have 0.95 as the larger ones do, at the grid's three rates.
How a valley is read was fixed on seed 100: the rate by a parabola through three, the batch by least
squares through the five nearest the best, as the loss is flat around its bottom; a parabola through
three jumped by a factor of two. A bottom beyond the range counts as its end, and does not drop out
as planned: with little text that is one sequence, below which there is nothing, and growth is
understated. What less text foretells is fitted to all sizes together, as for one size it hangs on
two points. One quadratic in both logarithms was tried for all of a cell; it misses by more than
neighboring batches differ.
"""

import numpy as np

from lablib.data import Batches, byte_text
from lablib.evidence import Pair, grid
from lablib.evidence.studies import matching, study
from lablib.scaling import batch_size_law as law
from lablib.studies import scaling_grid
from lablib.training import evaluate, fit
from lablib.training.optimizers import adamw

KB, MB = 2**10, 2**20
LENGTH = 64
LEAST, MOST = MB // 8, 2 * MB  # bytes that the smallest model saw
SMALL = {"part": "batch-rate", "n_layers": 1, "dim": 32}
AS_GRID = {"length": 64, "end_lr": 1e-5, "points": 2}  # what all runs of the part share


def run(
    kind: str,
    seed: int,
    batch: int = 256,
    lr: float = 0.0125,
    tokens: int = LEAST,
    n_layers: int = 1,
    dim: int = 32,
    beta2: float = 0.95,
    end_lr: float = 1e-5,
) -> dict:
    """One point. kind: "beta2" trains as the grid does, but for beta2; "laws" reads the grid."""
    if kind == "laws":
        return exponents(study("scaling-grid").runs(), seed)
    text = byte_text()
    model = scaling_grid.build(seed, n_layers, dim, None)
    steps = tokens // batch
    fit(
        model,
        Batches(text.first(tokens, LENGTH), batch // LENGTH, LENGTH, seed),
        steps=steps,
        optimizer=adamw(lr, betas=(0.9, beta2)),
        seed=seed,
        progress=False,
        callbacks=[scaling_grid.falling_to(end_lr / lr, steps)],
    )
    held_out = text.windows(LENGTH, scaling_grid.FINAL * 128 // LENGTH)
    return {"loss": round(evaluate(model, held_out), 5)}


def exponents(runs: list, seed: int) -> dict:
    """What a seed's rows of the grid say.

    gamma: of the rate in the batch, the mean over sizes and texts; "constant" is one rate for all.
    steps, bytes_a_step: exponents of compute along the frontier, from its first to its last point.
    foretold, kept: the smallest model's losses on the most text, with the batch that all sizes'
    best batches on less text foretell, and with the one that was best for it on the least.
    """
    rows = matching(runs, part="batch-rate", seed=seed)
    front = law.optimal_batch(rows, hold="compute")
    compute = [one.compute for one in front]
    optima = law.optimal_batch(rows)
    batch = law.predict_batch([one for one in optima if one.D < MOST], MOST)
    last = matching(rows, tokens=MOST, **SMALL)
    kept = law.optimal_batch(matching(rows, tokens=LEAST, **SMALL))[0].batch
    return {
        "gamma": mean_gamma(rows),
        "constant": 0.0,
        "steps": law.exponent(compute, [one.steps for one in front]),
        "bytes_a_step": law.exponent(compute, [one.batch for one in front]),
        "front": len(front),
        "foretold_batch": batch,
        "foretold": law.loss_at(batch, last),
        "kept": law.loss_at(kept, last),
        "sum": float(sum(run["loss"] for run in rows)),
    }


def mean_gamma(rows: list) -> float:
    """gamma of one seed's rows, the mean over sizes and texts."""
    cells = {(run["N"], run["tokens"]) for run in rows}
    return float(np.mean([law.fit_gamma(matching(rows, N=N, tokens=D)) for N, D in sorted(cells)]))


SEEDS = range(5)
SMALLEST = (64, 128, 256)  # bytes a batch


def beta2(seed) -> list[dict]:
    """The smallest batches at the grid's rates."""
    made = []
    for batch in SMALLEST:
        lr = scaling_grid.three_rates(SMALL["dim"], batch)
        made += grid(kind="beta2", seed=seed, batch=batch, lr=lr)
    return made


POINTS = [*(point for seed in SEEDS for point in beta2(seed)), *grid(kind="laws", seed=SEEDS)]
TUNING = beta2(100)
CANARY = {
    "kind": "beta2",
    "seed": 200,
    "dim": 16,
    "tokens": 2 * KB,
    "batch": 128,
    "lr": 0.01,
}
READS = {"scaling-grid": {"part": ("batch-rate",)}}
# No control is stored: other cells with the least text have another size, which moves the best
# batch, too, and of one number a seed the baselines are what no law would say.
ROLES = {
    "optimum": {
        "method": SMALL | {"tokens": MOST},
        "baseline": SMALL | {"tokens": LEAST},
        "control": None,
    },
    "rate": {"method": "gamma", "baseline": "constant", "control": None},
    "frontier": {"method": "steps", "baseline": "bytes_a_step", "control": None},
    "foretold": {"method": "foretold", "baseline": "kept", "control": None},
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed."""
    made = {}
    laws = matching(runs, kind="laws")
    for id in ("rate", "frontier", "foretold"):
        ours, theirs = ROLES[id]["method"], ROLES[id]["baseline"]
        made[id] = [Pair(row["seed"], row[ours], row[theirs]) for row in laws]
    much, little = (best(runs, ROLES["optimum"][side]) for side in ("method", "baseline"))
    made["optimum"] = [Pair(seed, much[seed], little[seed]) for seed in sorted(little)]
    return made


def best(runs: list, cell: dict) -> dict[int, float]:
    """The best batch of a size and an amount of text, by seed."""
    rows = matching(runs, **cell)
    seeds = sorted({run["seed"] for run in rows})
    return {seed: law.optimal_batch(matching(rows, seed=seed))[0].batch for seed in seeds}


def gammas(runs: list, low: float, high: float) -> list[float]:
    """gamma over batches from low to high alone, by seed, the mean over sizes and texts."""
    rows = [run for run in matching(runs, part="batch-rate") if low <= run["batch"] <= high]
    return [mean_gamma(matching(rows, seed=seed)) for seed in sorted({r["seed"] for r in rows})]


def words(tokens: float) -> str:
    """An amount of text: 128 KiB, 2 MiB."""
    return f"{tokens // MB:.0f} MiB" if tokens >= MB else f"{tokens // KB:.0f} KiB"


def valley(runs: list, cell: dict) -> tuple[np.ndarray, np.ndarray]:
    """Batches, and each seed's losses with the rate tuned: (batches,) and (seeds, batches)."""
    rows = matching(runs, **cell)
    found = [law.tuned(matching(rows, seed=s)) for s in sorted({run["seed"] for run in rows})]
    return found[0].batch, np.array([one.loss for one in found])


def gain_of_beta2(runs: list) -> dict[int, list[float]]:
    """Nats that 0.95 costs above 0.99, the best of three rates each, by batch and seed."""
    made = {}
    for batch in SMALLEST:
        cell = SMALL | {"tokens": LEAST, "batch": batch}
        kinds = (matching(runs, kind="beta2", batch=batch), matching(runs, **cell))
        lows = [
            [min(run["loss"] for run in matching(kind, seed=seed)) for seed in SEEDS]
            for kind in kinds
        ]
        made[batch] = [ours - theirs for ours, theirs in zip(*lows)]
    return made
