"""The study of generalized scaling laws (2025): dense models and experts on one grid.

Models and text are those of the shared grid of small trainings, initialized with dim^-0.5, experts
too. Experts are top-1 without drops, chosen by the byte's id. A learned router was tried first, on
seed 100, with 2 and 8 experts, three rates, two strengths of balancing, three scales of the experts
and two of the router: at up to 1 MiB seen it lost to the dense model in every case, and top-2 of
narrower experts did, too. Fixed routing gained at once and at every length. So what is judged here
is what idle parameters are worth once tokens go to the right ones, not how routers learn.

A seed's grid has every number of experts at 1x16, 1x32, 2x32, 2x48 and 3x64 with half a MiB, at the
last three with 1 MiB, and at 2x32 and 2x48 with 2 MiB; the two smallest see a quarter of a MiB,
too, dense and with 4 experts. It was made in two steps. A run of the first, {"seed": s}, holds the
three smaller sizes with up to half a MiB and the laws that are fitted to them, whose verdicts
("held-out-small", "idle-small") are asides now. The rest, GROWN, came later, on the same seeds, its
rates and what is judged on it fixed before. Laws of the whole grid are fitted in a study of their
own, generalized-laws, which says what is left out there and predicted. In the smaller grid it is
the sparse models of its largest size and, at every size, 8 experts.

Rates were tuned on seed 100 and half a MiB, for dense models and for 8 experts with as many tries.
At 2x48 and 3x64, of four, one rate is the best of both kinds or within 0.005 nats of the best. On a
quarter of a MiB experts of 2x32 were best at half of the dense models' rate; the grids keep one
rate a width, the experts' there. On half a MiB the dense 2x32 was better at twice that rate by a
tenth of what a seed moves it. It was trained again there on the judging seeds, and was worse:
claims are judged on the grids, where dense models are the better ones.

Masked models were tuned at each share: at 2x32 five rates, of which four times the width's was the
best for seven eighths, at 2x48 three, and a fourth where the highest won. They were trained again
at those. The dense ones that "masks" compares with were best at their width's rate, the middle one
of five. The two smallest sizes stand for the plan's; more text for all sizes was cut for time.
"""

from functools import partial

import numpy as np
import torch

from lablib.data import Batches, byte_text
from lablib.evidence import Pair, grid, paired
from lablib.evidence.studies import against
from lablib.scaling import generalized_scaling as gs
from lablib.studies.scaling_grid import build
from lablib.training import evaluate, fit
from lablib.training.optimizers import adamw

KB = 2**10
BATCH, LENGTH = 2048, 128
SIZES = ((1, 16), (1, 32), (2, 32))  # layers, dim
COUNTS = (1, 2, 4, 8)  # experts
MOST, LESS = 512 * KB, 256 * KB
RATES = {16: 0.0437, 32: 0.0219}  # by dim
COLUMNS = ("n_layers", "dim", "n_experts", "tokens", "N", "N_total", "loss")


def run(
    seed: int,
    sizes: tuple = SIZES,
    experts: tuple = COUNTS,
    tokens: int = MOST,
    less: int = LESS,
    masked: float = 0.875,
    lr: float | None = None,
    windows: int = 512,
) -> dict:
    """Train one seed's models and fit the laws; "rows" has the columns of COLUMNS.

    sizes: (layers, dim) each; every one gets every number of experts. less: bytes that all but the
    last size also see, dense and with 4 experts; 0 leaves it out. masked: the share of weights that
    a model of the last size is without from the start; 0 leaves it out. lr: None takes the width's.
    windows: held-out, of 128 bytes. Losses are in nats a byte.
    """
    train = partial(trained, seed=seed, lr=lr, windows=windows)
    rows = [train(*size, n_experts=n, tokens=tokens) for size in sizes for n in experts]
    few = [(size, n) for size in sizes[:-1] for n in (1, 4)] if less else []
    rows += [train(*size, n_experts=n, tokens=less) for size, n in few]
    made = {"rows": [[row[name] for name in COLUMNS] for row in rows]}
    ends = {"dense": min(experts), "experts": max(experts)}
    made |= {f"loss_{name}": mean_loss(rows, n, tokens) for name, n in ends.items()}
    if masked:
        made |= {"masked": train(*sizes[-1], masked=masked, tokens=tokens)["loss"]}
        made |= {"unmasked": rows[0]["loss"]}
    whole = len(sizes) > 2 and len(experts) > 3 and less
    return made | (laws(rows) if whole else {})


def trained(
    n_layers: int,
    dim: int,
    tokens: int,
    seed: int,
    lr: float | None = None,
    n_experts: int = 1,
    masked: float = 0.0,
    windows: int = 512,
) -> dict:
    """Train one dense, expert or masked model; its sizes and its held-out loss."""
    text = byte_text()
    model = build(seed, n_layers, dim, None)
    if n_experts > 1:
        gs.hash_experts_(model, n_experts, frequencies())
    if masked:
        gs.mask_(model, masked)
    rows = Batches(text.first(tokens, LENGTH), BATCH // LENGTH, LENGTH, seed)
    options = {"optimizer": adamw(lr or RATES[dim]), "seed": seed, "progress": False}
    fit(model, rows, steps=tokens // BATCH, **options)
    size = gs.sizes(model)
    loss = round(evaluate(model, text.windows(LENGTH, windows)), 5)
    return dict(zip(COLUMNS, (n_layers, dim, n_experts, tokens, size.active, size.total, loss)))


def frequencies() -> torch.Tensor:
    """How often each byte is among the first MiB of the text: (256,)."""
    return torch.as_tensor(byte_text().train[: 2**20].astype(int)).bincount(minlength=256)


def mean_loss(rows: list[dict], n_experts: int, tokens: int) -> float:
    """Over all sizes, after the longer training."""
    kept = [r["loss"] for r in rows if (r["n_experts"], r["tokens"]) == (n_experts, tokens)]
    return float(np.mean(kept))


READINGS = {"told": ("N", True), "active": ("N", False), "total": ("N_total", False)}


def laws(rows: list[dict]) -> dict:
    """Errors of the three readings on the rows that are left out of their fits, and c of all rows.

    "told" is the generalized law; "active" and "total" are the dense law, told that size. An error
    is the mean difference of logarithms.
    """
    made = {}
    for name, reading in READINGS.items():
        law = fitted([row for row in rows if not left_out(row)], *reading)
        far = [row for row in rows if left_out(row)]
        made[f"error_{name}"] = off(predicted(law, far, *reading), far)
    made["error_untold"] = min(made["error_active"], made["error_total"])
    return made | {"c": fitted(rows)["c"], "no_c": 0.0}


def off(said: np.ndarray, rows: list[dict]) -> float:
    """Mean difference of the logarithms of predicted losses and the rows'."""
    return float(np.abs(np.log(said) - np.log([row["loss"] for row in rows])).mean())


def left_out(row: dict, largest: tuple[int, int] = SIZES[-1]) -> bool:
    """Whether laws have to predict the row: a sparse model of the largest size or of 8 experts."""
    large = (row["n_layers"], row["dim"]) == largest
    return row["n_experts"] > 1 and (large or row["n_experts"] == COUNTS[-1])


def fitted(rows: list[dict], size: str = "N", told: bool = True) -> dict[str, float]:
    """The law's values: with N as one of the two sizes, and the sparsity told or taken to be 0."""
    return gs.fit_generalized(columns(rows, size, told))


def predicted(law: dict, rows: list[dict], size: str = "N", told: bool = True) -> np.ndarray:
    """What a law says of rows, read as it was fitted: (rows,)."""
    table = columns(rows, size, told)
    return gs.generalized_loss(table["N"], table["D"], table["S"], **law)


def columns(rows: list[dict], size: str = "N", told: bool = True) -> dict[str, np.ndarray]:
    """What a law reads: N, D, S and loss, (rows,) each."""
    names = {"N": size, "D": "tokens", "loss": "loss"}
    table = {name: np.array([row[key] for row in rows], float) for name, key in names.items()}
    sparsity = [1 - row["N"] / row["N_total"] for row in rows]
    return table | {"S": np.array(sparsity) * told}


def rows_of(made: dict) -> list[dict]:
    """A run's rows with names."""
    return [dict(zip(COLUMNS, row)) for row in made["rows"]]


SEEDS = range(5)
SMALL = {"sizes": (SIZES[0],), "experts": (1, 8), "less": 0, "masked": 0}  # to be repeated in a lab
LARGEST = {"sizes": (SIZES[2],), "experts": (1,), "less": 0}
MASKED_RATE, DENSE_RATE = 0.0875, 0.0437  # the best of the largest size, as tuned at MOST
TRIED = (0.011, 0.0219, 0.0437, 0.0875, 0.175)
GROWN = [  # more of the grid: larger models, more text
    {"sizes": (size,), "tokens": tokens * KB, "less": 0, "masked": 0, "lr": lr}
    for size, lr, amounts in (
        ((2, 32), 0.0219, (1024, 2048)),
        ((2, 48), 0.0146, (512, 1024, 2048)),
        ((3, 64), 0.0109, (512, 1024)),
    )
    for tokens in amounts
]
MASKS = {0.5: 0.0292, 0.75: 0.0292, 0.875: 0.0583}  # share of weights gone -> rate, as tuned
MASKED = [
    {"sizes": ((2, 48),), "experts": (1,), "less": 0, "masked": share, "lr": lr}
    for share, lr in MASKS.items()
]
POINTS = [
    *[{"seed": seed} for seed in SEEDS],
    *[LARGEST | {"lr": MASKED_RATE, "seed": seed} for seed in SEEDS],
    *[LARGEST | {"masked": 0, "lr": DENSE_RATE, "seed": seed} for seed in SEEDS],
    *[SMALL | {"experts": (1,), "seed": seed} for seed in SEEDS],
    *grid(seed=range(2), **{k: [v] for k, v in SMALL.items()}),
    *[point | {"seed": seed} for seed in SEEDS for point in GROWN + MASKED],
]
TUNING = [
    *[
        {"sizes": (size,), "experts": (n,), "less": 0, "masked": 0, "lr": lr, "seed": 100}
        for size, rates in (
            ((2, 48), (0.0073, 0.0146, 0.0292, 0.0583)),
            ((3, 64), (0.0055, 0.0109, 0.0219, 0.0437)),
        )
        for n in (1, 8)
        for lr in rates
    ],
    *[
        {"sizes": ((2, 48),), "experts": (1,), "less": 0, "masked": share, "lr": lr, "seed": 100}
        for share in (0.5, 0.75, 0.875)
        for lr in (0.0146, 0.0292, 0.0583, *[0.1167] * (share == 0.875))
    ],
    *[
        SMALL | {"sizes": (size,), "tokens": LESS, "lr": lr, "seed": 100}
        for size, rates in ((SIZES[0], (0.02, 0.04, 0.08)), (SIZES[2], (0.01, 0.02, 0.04)))
        for lr in rates
    ],
    *[SMALL | {"experts": (1,), "lr": lr, "seed": 100} for lr in TRIED],
    *[LARGEST | {"lr": lr, "seed": 100} for lr in TRIED],
]
CANARY = {"seed": 200, "sizes": ((1, 16),), "experts": (1, 2), "tokens": 8 * KB, "less": 0}
CANARY |= {"masked": 0.5, "lr": 0.01, "windows": 16}
READS = {"generalized-laws": {"kind": ("grid", "pooled")}}


# No control is stored: the baselines lack what is credited.
ROLES = {
    "held-out": against("told", "untold"),
    "experts": against("experts", "dense"),
    "idle": against("c", "no_c"),
    "held-out-small": against("error_told", "error_untold"),
    "idle-small": against("c", "no_c"),
    "masks": {
        "method": {"sizes": [[2, 32]], "experts": [1]},
        "baseline": {"sizes": [[1, 16]], "experts": [1]},
        "control": None,
    },
}
SMALL_GRID = ("held-out-small", "idle-small")  # judged on what runs of the smaller grid hold


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed.

    Raises ValueError where the laws were fitted to other rows than these.
    """
    rows = by_seed(runs)
    laws = [run for run in runs if run.get("kind") == "grid"]
    if any(abs(sum(r["loss"] for r in rows[run["seed"]]) - run["sum"]) > 1e-6 for run in laws):
        raise ValueError("other rows than the laws': `python -m lablib study generalized-laws`")
    grids = [run for run in runs if "error_told" in run]
    made = {}
    for id, role in ROLES.items():
        if id != "masks":
            kept = grids if id in SMALL_GRID else laws
            made[id] = [Pair(r["seed"], r[role["method"]], r[role["baseline"]]) for r in kept]
    masks = ROLES["masks"]
    trained = [run for run in runs if run.get("lr") != DENSE_RATE]  # those are not masked
    return made | {"masks": paired(trained, masks["method"], masks["baseline"], last_loss)}


def by_seed(runs: list) -> dict[int, list[dict]]:
    """Each seed's rows of all sizes, texts and numbers of experts."""
    rows: dict[int, list[dict]] = {}
    for made in runs:
        if "rows" in made and "experts" not in made:
            rows.setdefault(made["seed"], []).extend(rows_of(made))
    return rows


def last_loss(run: dict) -> float:
    """The masked model's, where there is one, else the dense model's."""
    return run["masked"] or run["loss_dense"]


def masked_losses(rows: list[dict]) -> dict[float, list[float]]:
    """Share of weights taken away -> the losses of two blocks of 48 without them, one a seed.

    rows: as they are stored, {"point", "result"}: a run's own "masked" is its loss.
    """
    losses: dict[float, list[float]] = {share: [] for share in MASKS}
    for row in rows:
        if row["point"].get("sizes") == [[2, 48]] and row["point"]["masked"]:
            losses[row["point"]["masked"]].append(row["result"]["masked"])
    return losses
