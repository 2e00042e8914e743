"""The study of the critical batch size (Zhang et al., 2024): steps to a loss on the shared grid.

Trainings are the grid's part "steps": three sizes, a constant rate, exponential averages of the
weights over three windows, batches of 256 to 16,384 bytes. They read 2 MiB; large batches come
later to any loss, and read 3 or 4, with the smallest size up to 8. Warmup is a twentieth of each
run. A curve has a point every 64 KiB, or 128 with the two largest batches; a loss is found between
two of them.
For each seed and size the targets are the losses that the smallest batch's best average has after
256 and 512 KiB and 1 MiB. Planned was a fourth, after 2 MiB; but all others need more to get there,
and would have to read more. For each batch, the bytes to a target are the least over windows and
rates, as the paper picks both for each batch. S(B) = a + b/B is fitted to what the batches need,
and gives the critical batch. A batch that does not reach a target within its text is left out of
that target's fit.
The two smaller sizes have three rates a factor 2 apart on every seed, around one by a power law
through three rates at three batches of seed 100, or half of that where it was better there. The
third size, which was not planned for, has this one rate, for time: on seed 100 the lowest of the
three was the best for it up to 4,096 bytes at the end of 1 MiB, and its one lies just above that.
The lab tells what the two sizes alone say of the exponent in size, what all say at the one rate,
and what the smaller batches say.
Earlier rows were known on the same seeds: one rate each, and half the text. Three rates and 2 MiB
were the plan from the start. The lab shows, beside these, the grid's part "size-data": the same
sizes and text under a cosine.
Its own runs train nothing: each does this for one seed, and keeps a sum of the grid's losses, so
that other rows are noticed.
"""

import math

import numpy as np

from lablib.evidence import Pair, grid
from lablib.evidence.studies import matching, study
from lablib.scaling import critical_batch_size as cbs
from lablib.studies import scaling_grid

KB = 2**10
TARGETS = (256 * KB, 512 * KB, 1024 * KB)  # bytes after which the smallest batch has the loss
SIZES = (32, 48, 64)  # dims of the grid's three models
OPTIMAL = 256  # bytes a step: the smallest batch
FEW = 4096  # the largest batch from which the larger ones are foretold


def run(kind: str, seed: int) -> dict:
    """Critical batches of one seed. kind: "grid" reads its rows, "made up" a table of a known law.

    early, late: the critical batch of the smallest and the largest target, mean of logarithms over
    sizes. in_data, in_size: its exponents, each a slope, the mean over the sizes or the targets.
    For the grid, what `from_few` and `at_one_rate` say, too.
    """
    runs = study("scaling-grid").runs() if kind == "grid" else made_up(seed)
    rows = matching(runs, part="steps", seed=seed)
    more = from_few(rows) | at_one_rate(rows) if kind == "grid" else {}
    return exponents(rows) | more


def exponents(rows: list) -> dict:
    """What `run` gives, from the rows of one seed."""
    critical, in_data, in_size = with_slopes(lines(rows), rows)
    logs = np.log(critical)
    return {
        "critical": critical.tolist(),
        "early": float(np.exp(logs[:, 0].mean())),
        "late": float(np.exp(logs[:, -1].mean())),
        "in_data": in_data,
        "in_size": in_size,
        "sum": sum(row["loss"] for row in rows),
    }


def from_few(rows: list) -> dict:
    """What batches up to FEW say of one seed: the exponents, and what larger batches should need.

    few_in_data, few_in_size: as in `exponents`. beyond: (sizes, targets, larger batches), what each
    of these needs over what the line of the smaller ones says; None where it misses the target.
    """
    few = lines([row for row in rows if row["batch"] <= FEW])
    _, in_data, in_size = with_slopes(few, rows)
    ratios = [
        [beyond(rows, dim, seen, line) for seen, line in zip(TARGETS, of_size)]
        for dim, of_size in zip(SIZES, few)
    ]
    return {"few_in_data": in_data, "few_in_size": in_size, "beyond": ratios}


def at_one_rate(rows: list) -> dict:
    """The exponents of one seed where each batch has its tuned rate alone, and how rates end.

    one_in_data, one_in_size: as in `exponents`. lowest, highest: of the pairs of a batch and a
    target with three rates, the share whose best rate is at that end of the three.
    """
    _, in_data, in_size = with_slopes(lines(tuned(rows)), tuned(rows))
    best = [at for dim in SIZES for seen in TARGETS for at in best_rates(rows, dim, seen)]
    ends = {"lowest": best.count(0) / len(best), "highest": best.count(2) / len(best)}
    return {"one_in_data": in_data, "one_in_size": in_size} | ends


def tuned(rows: list) -> list:
    """The rows of the grid that have the rate that was tuned: the middle one, or the only one."""
    return [row for row in rows if row["lr"] == scaling_grid.tuned_rate(row["dim"], row["batch"])]


def best_rates(rows: list, dim: int, seen: int) -> list[int]:
    """By batch, the place of the rate that needs least; of batches with three rates."""
    loss, found = target(rows, dim, seen), []
    for batch in sorted({row["batch"] for row in matching(rows, dim=dim)}):
        tried = sorted(matching(rows, dim=dim, batch=batch), key=lambda row: row["lr"])
        needs = [bytes_needed([row], loss) for row in tried]
        if len(tried) == 3 and min(needs) < math.inf:
            found.append(needs.index(min(needs)))
    return found


def beyond(rows: list, dim: int, seen: int, line: cbs.Efficiency) -> list[float | None]:
    """What batches above FEW need over what a line says that is fitted to the others, by batch."""
    batches, steps = steps_needed(rows, dim, target(rows, dim, seen))
    ratios = dict(zip(batches, (steps / cbs.steps_of(batches, line.a, line.b)).tolist()))
    return [ratios.get(batch) for batch in larger(rows)]


def larger(rows: list) -> list[int]:
    """The batches above FEW, in bytes."""
    return sorted({row["batch"] for row in matching(rows, part="steps") if row["batch"] > FEW})


def beside_foretold(runs: list) -> dict[int, np.ndarray]:
    """Per cent that each larger batch needs over what smaller ones say: one a seed, means."""
    ratios = np.array([run["beyond"] for run in matching(runs, kind="grid")], float)
    return dict(zip(larger(runs), 100 * np.nanmean(ratios, axis=(1, 2)).T - 100))


def lines(rows: list) -> list[list[cbs.Efficiency]]:
    """S(B) of each size, to each target."""
    return [[fitted(rows, dim, seen) for seen in TARGETS] for dim in SIZES]


def with_slopes(of_sizes: list, rows: list) -> tuple[np.ndarray, float, float]:
    """The critical batches of such lines, (sizes, targets), and their exponents, as `slopes`."""
    critical = np.array([[line.critical() for line in of_size] for of_size in of_sizes])
    return critical, *slopes(critical, [matching(rows, dim=dim)[0]["N"] for dim in SIZES])


def slopes(critical: np.ndarray, sizes: list) -> tuple[float, float]:
    """The exponents in data, mean over sizes, and in size, mean over targets.

    critical: (sizes, targets). sizes: parameters of each.
    """
    logs = np.log(critical)
    in_data = np.polyfit(np.log(TARGETS), logs.T, 1)[0].mean()
    in_size = np.polyfit(np.log(sizes), logs, 1)[0].mean()
    return float(in_data), float(in_size)


def fitted(rows: list, dim: int, seen: int) -> cbs.Efficiency:
    """S(B) of one size, to the loss that the smallest batch has after `seen` bytes."""
    batches, steps = steps_needed(rows, dim, target(rows, dim, seen))
    return cbs.fit_steps(batches, steps, OPTIMAL)


def target(rows: list, dim: int, seen: int) -> float:
    """The loss of the smallest batch after so many bytes: the best of its averages and rates."""
    made = matching(rows, dim=dim, batch=OPTIMAL)
    return min(dict(curve(row, window))[seen] for row in made for window in windows(row))


def steps_needed(rows: list, dim: int, loss: float) -> tuple[np.ndarray, np.ndarray]:
    """Batches, in bytes, and the steps that each takes to the loss; those that never get there out.

    Steps are bytes over batch: a fraction where the loss is reached between two points of a curve.
    """
    found = matching(rows, dim=dim)
    every = sorted({row["batch"] for row in found})
    needed = np.array([bytes_needed(matching(found, batch=batch), loss) for batch in every])
    batches, reached = np.array(every), np.isfinite(needed)
    return batches[reached], needed[reached] / batches[reached]


def bytes_needed(rows: list, loss: float) -> float:
    """The least that these runs, with any of their averages, read to a loss; inf for never."""
    found = [cbs.steps_to(curve(row, window), loss) for row in rows for window in windows(row)]
    return float(np.nanmin([math.inf, *found]))


def windows(row: dict) -> range:
    """The averages of a row, by place."""
    return range(len(row["averaged"]))


def curve(row: dict, window: int) -> list[tuple[int, float]]:
    """(bytes seen, loss) of one of a row's averages."""
    losses = row["averaged"][window]
    every = max(1, row["tokens"] // row["batch"] // row["points"]) * row["batch"]
    return [(every * (i + 1), loss) for i, loss in enumerate(losses)]


def at_the_end(runs: list, dim: int, batch: int = 2048) -> np.ndarray:
    """Losses of the last weights, of the best average, and after a cosine: (seeds, 3).

    All at the rates that were tuned.
    """
    made = []
    for row in tuned(matching(runs, part="steps", dim=dim, batch=batch)):
        alike = {key: row[key] for key in ("N", "tokens", "batch", "seed")}
        (falling,) = matching(runs, part="size-data", **alike)
        average = min(losses[-1] for losses in row["averaged"])
        made.append((row["curve"][-1], average, falling["curve"][-1]))
    return np.array(made)


def made_up(seed: int, by_size: float = 0.0) -> list[dict]:
    """A table of rows whose losses follow a law: what the canary reads.

    by_size: the exponent of N in the batch that wastes half of what it reads.
    """
    rows = []
    for dim, N in zip(SIZES, (13_000, 56_000, 151_000), strict=True):
        for batch in (256, 512, 1024, 2048, 4096, 8192):
            seen = 64 * KB * np.arange(1, 97)
            half = (2e-3 * seen**0.5 * 1e3 + 10 * seed) * (N / 13_000) ** by_size
            useful = seen / (1 + batch / half)
            losses = (1.0 + 900 * N**-0.1 * useful**-0.5).round(6).tolist()
            size = {"dim": dim, "N": N, "batch": batch, "tokens": int(seen[-1]), "points": 96}
            row = {"part": "steps", "seed": seed, "loss": losses[-1], "averaged": [losses]}
            rows.append(size | row)
    return rows


POINTS: list[dict] = grid(kind="grid", seed=range(5))
TUNING: list[dict] = []
CANARY = {"kind": "made up", "seed": 7}
READS = {"scaling-grid": {"part": ("steps", "size-data")}}
# No control is stored: of a seed there are two ends of the data, and one exponent of each kind.
ROLES = {
    "data": {"method": "late", "baseline": "early", "control": None},
    "not-size": {"method": "in_data", "baseline": "in_size", "control": None},
}


def values(runs: list) -> dict:
    """What each claim is judged on. Raises ValueError for rows of another grid."""
    own = matching(runs, kind="grid")
    for row in own:
        rows = matching(runs, part="steps", seed=row["seed"])
        if abs(sum(r["loss"] for r in rows) - row["sum"]) > 1e-6:
            raise ValueError("the grid has changed: `python -m lablib study critical-batch-size`")
    made = {
        id: [Pair(row["seed"], row[role["method"]], row[role["baseline"]]) for row in own]
        for id, role in ROLES.items()
    }
    return made | {"coefficient": coefficient(), "per-token": coefficient(tokens=20)}


def redrawn(random: np.random.Generator) -> float:
    """The published exponent when each model's nine batches are drawn again."""
    found = []
    for rows in cbs.published().values():
        batches, steps = np.array([(row["batch"], row["value"]) for row in rows]).T
        draw = [0]
        while len(set(draw)) < 5:
            draw = random.integers(len(rows), size=len(rows)).tolist()
        # S = a + b/B is a line in 1/B; relative errors count
        design = np.stack([np.ones(len(draw)), 1 / batches[draw]], 1) / steps[draw, None]
        a, b = np.linalg.lstsq(design, np.ones(len(draw)), rcond=None)[0]
        found.append(cbs.critical_batch(max(a, 1.0), max(b, 1.0), 256))
    return cbs.critical_law(cbs.published_critical()[0], found).exponent


def coefficient(tokens: int = 1) -> float:
    """The published law's, in sequences at a million parameters; or tokens, so many a parameter."""
    sizes, critical = cbs.published_critical()
    return cbs.critical_law(tokens * sizes, critical).coefficient
