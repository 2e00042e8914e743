"""The study of trainable parameters (2021): doped and structured models beside a dense ladder.

A run is one seed's ladder and its variants, and the law that is fitted to the ladder. Models and
text are those of the shared grid of small trainings, initialized with dim^-0.5; frozen weights and
structured layers begin as large as the dense ones that they join or replace. All see 1 MiB. The
doped model's training FLOPs are matched by a dense model of its trained size that reads on. With
the head's weights left out of the count it was given 1.66 times the text, and judged; with them it
is 1.51 times. These runs came later, on the same seeds, and are what is judged now.

The ladder has six sizes, 1x16 to 3x64; six models are doped and four structured, at 2x32 and 2x48.
Half of that text, a ladder up to 4x32 and three variants of each kind were judged first, on the
same seeds; this design has replaced those runs, and was fixed before its own were made.

Rates were tried on seeds 100 and 101 and half a MiB, three for each doped and structured kind and
for the dense models of both widths. The middle one, the shared grid's for the width, was the best
on both seeds or on one, except for the dense 2x48, which was better by at most 0.006 nats at half
of it, less than a seed moves it; the middle one was kept for all. The ladder's other sizes have the
shared grid's rates, as tuned there.
"""

from functools import partial

import numpy as np

from lablib.data import Batches, byte_text
from lablib.evidence import Pair, matching
from lablib.evidence.studies import against
from lablib.scaling import trainable_parameters as tp
from lablib.scaling.inference import Fit
from lablib.scaling.inference import fit as fit_law
from lablib.scaling.laws import power_plus
from lablib.studies.scaling_grid import build
from lablib.training import evaluate, fit
from lablib.training.optimizers import adamw

KB = 2**10
BATCH, LENGTH = 2048, 128
TOKENS = 2**20
LONGER = 852 * BATCH  # the FLOPs of a model of which half is frozen, spent on the trained half
EQUAL = 773 * BATCH  # the same where the head's weights, which both train, are counted, too
RATES = {16: 0.0437, 32: 0.0219, 48: 0.0146, 64: 0.0109}  # by dim
# kind, layers, dim, share of frozen blocks or units
LADDER = [("dense", *size, 0.0) for size in ((1, 16), (1, 32), (2, 32), (2, 48), (4, 32), (3, 64))]
DOPED = [("blocks", 2, 32, 0.5), ("units", 2, 32, 0.5), ("half", 2, 48, 0.5)]
DOPED += [("units", 2, 32, 0.75), ("blocks", 2, 48, 0.5), ("units", 2, 48, 0.5)]
STRUCTURED = [(kind, 2, 32, 0.0) for kind in ("monarch", "circulant", "hadamard")]
STRUCTURED += [("monarch", 2, 48, 0.0)]
KINDS = (*LADDER, *DOPED, *STRUCTURED)
BASE, LARGER, DOUBLED = LADDER[2], LADDER[4], DOPED[0]
COLUMNS = ("kind", "n_layers", "dim", "share", "trainable", "total", "loss")


def run(
    seed: int,
    kinds: tuple = KINDS,
    tokens: int = TOKENS,
    longer: int = LONGER,
    lr: float | None = None,
    windows: int = 512,
) -> dict:
    """Train one seed's models on bytes; "rows" has the columns of COLUMNS, losses in nats a byte.

    kinds: (kind, layers, dim, share) each; a kind is "dense"; "blocks" or "units", to which frozen
    ones are added until they are `share` of all; "half", whose every second block is frozen; or one
    of structured feed-forward layers. longer: bytes that one more dense model sees; 0 leaves it
    out. lr: None takes the width's. windows: held-out, of 128 bytes.
    """
    train = partial(trained, seed=seed, lr=lr, windows=windows)
    rows = [train(*kind, tokens=tokens) for kind in kinds]
    made = {"rows": [[row[name] for name in COLUMNS] for row in rows], "loss": rows[-1]["loss"]}
    if longer:
        made["loss_longer"] = train(*BASE, tokens=longer)["loss"]
    whole = tuple(map(tuple, kinds)) == KINDS
    return made | (compared(rows) if whole else {})


def trained(
    kind: str,
    n_layers: int,
    dim: int,
    share: float,
    tokens: int,
    seed: int,
    lr: float | None,
    windows: int,
) -> dict:
    """Train one model; its two sizes and its held-out loss."""
    text = byte_text()
    model = build(seed, n_layers, dim, None)
    if kind in tp.KINDS:
        tp.structured_(model, kind)
    elif kind == "half":
        tp.freeze_(model, range(1, n_layers, 2))
    elif kind != "dense":
        tp.dope_(model, share, kind)
    rows = Batches(text.first(tokens, LENGTH), BATCH // LENGTH, LENGTH, seed)
    optimizer = adamw(lr or RATES[dim])
    fit(model, rows, steps=tokens // BATCH, optimizer=optimizer, seed=seed, progress=False)
    loss = round(evaluate(model, text.windows(LENGTH, windows)), 5)
    return dict(zip(COLUMNS, (kind, n_layers, dim, share, *tp.counts(model), loss)))


def compared(rows: list[dict]) -> dict:
    """What claims compare: the dense law's errors by both sizes, gains, and losses."""
    law = ladder_law(rows)
    asked = {"": [*DOPED, *STRUCTURED], "doped_": DOPED, "structured_": STRUCTURED}
    made = {
        f"{which}error_{size}": error(law, rows, kinds, size)
        for which, kinds in asked.items()
        for size in ("trainable", "total")
    }
    loss = {kind_of(row): row["loss"] for row in rows}
    made["gain_frozen"] = loss[BASE] - loss[DOUBLED]
    made["half_gain_trained"] = (loss[BASE] - loss[LARGER]) / 2
    return made | {"loss_doped": loss[DOUBLED]}


def kind_of(row: dict) -> tuple:
    """What names a row's kind of model."""
    return tuple(row[name] for name in COLUMNS[:4])


def ladder_law(rows: list[dict]) -> Fit:
    """c + a N^-b through the dense models of all sizes."""
    dense = [row for row in rows if kind_of(row) in LADDER]
    x, loss = (np.array([row[key] for row in dense], float) for key in ("trainable", "loss"))
    return fit_law(power_plus, {"x": x, "loss": loss}, "loss")


def error(law: Fit, rows: list[dict], kinds: list, size: str) -> float:
    """Mean absolute error of log loss over kinds, by a law that is told one of their sizes."""
    kept = [row for row in rows if kind_of(row) in kinds]
    x, loss = (np.array([row[key] for row in kept], float) for key in (size, "loss"))
    return float(np.abs(np.log(law.predict(x=x) / loss)).mean())


def rows_of(run: dict) -> list[dict]:
    """A run's rows with names."""
    return [dict(zip(COLUMNS, row)) for row in run["rows"]]


SEEDS = range(5)
SMALL = {"kinds": (LADDER[0],), "longer": 0}  # short enough to be repeated in a lab
POINTS = [*[{"seed": seed} for seed in SEEDS], *[SMALL | {"seed": seed} for seed in range(2)]]
POINTS += [{"kinds": (DOUBLED,), "longer": EQUAL, "seed": seed} for seed in SEEDS]
TRIED = {32: (0.011, 0.0219, 0.0437), 48: (0.0073, 0.0146, 0.0292)}  # by dim
TUNING = [
    {"kinds": kinds, "tokens": 512 * KB, "longer": 0, "lr": lr, "seed": seed}
    for seed in (100, 101)
    for dim, kinds in (
        (32, (BASE, *DOPED[:2], DOPED[3], *STRUCTURED[:3])),
        (48, (LADDER[3], DOPED[2], *DOPED[4:], STRUCTURED[3])),
    )
    for lr in TRIED[dim]
]
CANARY = {"seed": 200, "tokens": 4 * BATCH, "longer": 0, "lr": 0.01, "windows": 16}
CANARY |= {"kinds": (("units", 1, 16, 0.5), ("monarch", 1, 16, 0.0))}


# No control is stored: no third number of one run lacks what is credited.
ROLES = {
    "trainable": against("error_trainable", "error_total"),
    "doping": against("gain_frozen", "half_gain_trained"),
    "flops": against("loss_longer", "loss"),  # where `longer` is EQUAL
    "doped": against("doped_error_trainable", "doped_error_total"),
    "structured": against("structured_error_trainable", "structured_error_total"),
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed, from the whole ladders."""
    whole = [run for run in runs if "gain_frozen" in run]
    of = dict.fromkeys(ROLES, whole) | {"flops": matching(runs, longer=EQUAL)}
    return {
        id: [Pair(run["seed"], run[role["method"]], run[role["baseline"]]) for run in of[id]]
        for id, role in ROLES.items()
    }
