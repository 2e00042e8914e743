"""The study of scaling laws for upcycling (2025): a grid of dense steps by upcycled steps.

The theme's base configuration with half of its batch, 16 x 64 tokens a step. A dense model is
copied on its way (rows); each copy is upcycled to 8 experts, top-2, softmax after the choice, and
trained on (columns); beside them a mixture starts from scratch. The rate falls with one over the
root of the step everywhere, so that any step of a curve could have been the end: a row costs one
dense snapshot and one training. A run is one or two rows of one seed's grid.

Five dense lengths by five further ones, each twice the one before, at two widths. None is shorter
than twice the warm-up. The law's part in sizes, three numbers, is not fitted: two widths do not
determine them. Each width has its own floor instead.

Tuned on another seed, with as many tries each, before anything was judged: the rates of the dense
training, of the upcycled one, and of the mixture from scratch, for each width. At width 32 the
longest column came later than the rest, on the same seeds, with nothing else changed.

Runs store losses alone; the laws are fitted when claims are judged. Huber's delta is one percent:
about the spread of a cell's loss over other seeds. With a tenth of it, Chinchilla's, most cells
count linearly, and a law of five numbers through so few of them has no single best fit.

No worked example of the paper with its figures is known to us, so none is recomputed.
"""

from functools import lru_cache, partial

import numpy as np
import torch

from lablib.data import Batches
from lablib.data.mixtures import mixture
from lablib.evidence import Pair, matching
from lablib.experts.switch_transformers import reduced_init_
from lablib.experts.upcycling import upcycle_
from lablib.experts.upcycling_scaling import snapshots
from lablib.models import GPT, GPTConfig
from lablib.scaling.fits import fit_joint_law, fit_sum_law
from lablib.training import fit

FURTHER = (100, 200, 400, 800, 1600)
SCRATCH = (*FURTHER, 3200)
AT = 100  # further steps at which head starts are compared
BATCH, LENGTH, WARMUP = 16, 64, 50


def run(
    seed: int,
    dense: tuple = (),
    further: tuple = (),
    scratch: tuple = (),
    dim: int = 32,
    lr: float = 1e-2,
    upcycled_lr: float = 1e-2,
    scratch_lr: float = 1e-2,
    rows: int = 256,
) -> dict:
    """Some rows of one seed's grid, and its mixture from scratch: held-out losses in nats a token.

    dense, further, scratch: steps of the dense training, of the upcycled one, and of the mixture
    from scratch, each rising; an empty one leaves its part out. lr: of the dense training.
    rows: how many held-out windows of 64 tokens a loss is taken on.
    Returns for each dense step "tokens" read until then, "dense_losses" and a row of "losses"; also
    "scratch_losses", and "loss", the sum of each part's last.
    """
    text = mixture()
    held_out = text.windows(limit=rows)
    made, ends = {}, []
    if dense:
        made |= trained_rows(seed, dense, further, dim, lr, upcycled_lr, text, held_out)
        ends += [made["dense_losses"][-1], *(row[-1] for row in made["losses"][-1:])]
    if scratch:
        torch.manual_seed(20_000 + seed)
        mixed = reduced_init_(upcycle_(GPT(config(dim)), 8, 1, 2, "after"), 0.1)
        made["scratch_losses"] = train(mixed, text, scratch, scratch_lr, 10_000 + seed, held_out)
        ends.append(made["scratch_losses"][-1])
    return made | {"loss": sum(ends)}


def trained_rows(seed, dense, further, dim, lr, upcycled_lr, text, held_out) -> dict:
    """Train a dense model; upcycle it after each of dense steps, and train each copy on."""
    kept = dict.fromkeys(dense)
    torch.manual_seed(seed)
    model = reduced_init_(GPT(config(dim)), 0.1)
    made = {"tokens": [steps * BATCH * LENGTH for steps in dense], "losses": []}
    made["dense_losses"] = train(model, text, dense, lr, seed, held_out, kept)
    kept[dense[-1]] = model
    for steps in dense if further else ():
        torch.manual_seed(10_000 + seed)
        newborn = upcycle_(kept[steps], 8, 1, 2, "after")
        row = train(newborn, text, further, upcycled_lr, 10_000 + seed, held_out)
        made["losses"].append(row)
    return made


def config(dim: int) -> GPTConfig:
    """The theme's base model of two layers, with heads of 16 dimensions, at any width."""
    return GPTConfig(1024, dim, n_layers=2, n_heads=dim // 16, qk_norm=True, max_length=LENGTH)


def train(model, text, places, lr, seed, held_out, kept=None) -> list[float]:
    """Train to the last of places; the held-out loss at each. kept: filled as in `snapshots`."""
    history = fit(
        model,
        Batches(text.train, BATCH, LENGTH, seed),
        steps=places[-1],
        lr=lr,
        schedule="inverse-sqrt",
        warmup=min(WARMUP, places[-1] // 2),
        seed=seed,
        loss=None if kept is None else snapshots(set(kept), kept),
        held_out=held_out,
        held_out_every=int(np.gcd.reduce(places)),
        progress=False,
    )
    losses = dict(history.held_out)
    return [round(losses[place], 4) for place in places]


def grids(runs: list, dim: int = 32) -> list[dict]:
    """The runs of one width put together, a grid a seed: see `joined`. Short rows are left out."""
    alike = [run for run in matching(runs, dim=dim) if len(run["further"]) > 2]
    seeds = sorted({run["seed"] for run in alike})
    return [joined(matching(alike, seed=seed)) for seed in seeds]


def joined(runs: list) -> dict:
    """The grid of one seed: its rows in the order of their dense steps, and the mixture's curve.

    runs: they hold all rows, and one of them the mixture from scratch. Returns "dense", "further"
    and "scratch", tuples of steps; "losses", a tuple of rows; "scratch_losses"; "seed"; and "law",
    the one of `LAWS` that the runs name: "with" where they name none.
    """
    rows = sorted(runs, key=lambda run: run["dense"])
    (anew,) = [run for run in runs if run["scratch"]]
    return {
        "seed": anew["seed"],
        "law": anew.get("law", "with"),
        "dense": tuple(tokens // (BATCH * LENGTH) for run in rows for tokens in run["tokens"]),
        "further": tuple(rows[0]["further"]),
        "losses": tuple(tuple(row) for run in rows for row in run["losses"]),
        "scratch": tuple(anew["scratch"]),
        "scratch_losses": tuple(anew["scratch_losses"]),
    }


def fits(grid: dict) -> dict:
    """What the laws say about one grid, as `joined` makes it.

    "interaction" and "floor" are of the law with its term. "error_..." is of each of `LAWS`, fitted
    without the largest dense and further steps, there: the mean difference of logarithms.
    "..._long" and "..._short" are of the last and the first row: "exponent", what the loss above
    its floor falls with in further steps; "head_start", how many steps more the mixture from
    scratch needs to the loss of an upcycled model after AT further steps; "per_step", that over the
    dense steps; "break_even", see `caught_up`.
    """
    return dict(_fits(*(grid[key] for key in KEYS)))


@lru_cache(maxsize=64)
def _fits(dense: tuple, further: tuple, losses: tuple, scratch: tuple, scratch_losses: tuple):
    d1, d2 = np.meshgrid(dense, further, indexing="ij")
    cells = np.asarray(losses)
    law = LAWS["with"](d1.ravel(), d2.ravel(), cells.ravel())
    made = {"interaction": law.interaction, "floor": law.floor}
    inner = (d1 < max(dense)) & (d2 < max(further))
    for name, fitted in LAWS.items():
        short = fitted(d1[inner], d2[inner], cells[inner])
        off = np.log(short(d1[~inner], d2[~inner]) / cells[~inner])
        made[f"error_{name}"] = float(np.abs(off).mean())
    for name, at in {"short": 0, "long": -1}.items():
        made[f"exponent_{name}"] = float(law.exponent(dense[at]))
        upcycled = cells[at, further.index(AT)]
        made[f"head_start_{name}"] = steps = steps_to(scratch, scratch_losses, upcycled) - AT
        made[f"per_step_{name}"] = steps / dense[at]
        anew = scratch_losses[: len(further)]  # at the same steps
        made[f"break_even_{name}"] = caught_up(further, cells[at], anew)
    return made


def caught_up(steps: tuple, upcycled: np.ndarray, scratch: tuple) -> float:
    """Steps at which scratch is first no worse than upcycled; the last ones where it never is.

    steps: rising; upcycled, scratch: losses there, on lines in log steps.
    """
    gap = np.asarray(scratch) - upcycled
    if not (gap <= 0).any():
        return float(steps[-1])
    at = int((gap <= 0).argmax())
    places = slice(max(0, at - 1), at + 1)
    return float(np.exp(np.interp(0.0, -gap[places], np.log(steps[places]))))


def steps_to(steps, losses, target: float) -> float:
    """Steps at which falling losses are at target, on lines in log steps; the ends where beyond."""
    falling = np.minimum.accumulate(losses)[::-1]
    return float(np.exp(np.interp(target, falling, np.log(steps)[::-1])))


KEYS = ("dense", "further", "losses", "scratch", "scratch_losses")
DELTA = 1e-2  # of Huber's loss; see above
LAWS = {
    "with": partial(fit_joint_law, delta=DELTA),
    "without": partial(fit_joint_law, interaction=False, delta=DELTA),
    "sum": partial(fit_sum_law, delta=DELTA),
}

SEEDS = range(10, 15)
RATES = {32: (5e-3, 1e-2, 2e-2, 4e-2), 64: (2.5e-3, 5e-3, 1e-2, 2e-2)}  # by width
TUNED = {
    32: {"lr": 1e-2, "upcycled_lr": 1e-2, "scratch_lr": 2e-2},
    64: {"lr": 1e-2, "upcycled_lr": 1e-2, "scratch_lr": 1e-2},
}
TUNING = [
    {"dim": dim, "seed": 100} | tried
    for dim, rates in RATES.items()
    for tried in (
        *[{"dense": (800,), "scratch": (800,), "lr": r, "scratch_lr": r} for r in rates],
        *[
            {"dense": (400,), "further": (400,), "lr": TUNED[dim]["lr"], "upcycled_lr": r}
            for r in rates
        ],
    )
]
PARTS = [  # of a seed: three runs of about equal length
    {"dense": (100, 200), "further": FURTHER, "scratch": ()},
    {"dense": (400,), "further": FURTHER, "scratch": SCRATCH},
    {"dense": (800, 1600), "further": FURTHER, "scratch": ()},
]
SMALL = {"dense": (100,), "further": (100,), "scratch": ()}  # short enough to be repeated
POINTS = [
    TUNED[dim] | part | {"dim": dim, "seed": seed}
    for dim in TUNED
    for seed in SEEDS
    for part in PARTS
]
POINTS += [TUNED[32] | SMALL | {"dim": 32, "seed": seed} for seed in SEEDS[:3]]
CANARY = {"dense": (2,), "further": (2, 4), "scratch": (2,), "rows": 16, "seed": 200}
LONG, SHORT = ({"dense": [*PARTS[at]["dense"]]} for at in (-1, 0))


def _roles(dim: int) -> dict:
    # No control is stored: a claim reads a whole grid, and with another row in the place of one of
    # its rows it is a grid no more; the laws without the term are baselines themselves.
    width = {"dim": dim}
    rows = {"method": width | LONG, "baseline": width | SHORT, "control": None}
    laws = {"method": width | {"law": None}, "control": None}
    return {
        "interaction": rows,
        "held-out-error": laws | {"baseline": width | {"law": "without"}},
        "sum": laws | {"baseline": width | {"law": "sum"}},
        "head-start": rows,
        "sunk-cost": rows,
        "break-even": rows,
    }


WIDE = "-wide"  # what the claims of the wider model end with
ROLES = _roles(32) | {id + WIDE: role for id, role in _roles(64).items()}
READ = {"interaction": "exponent", "head-start": "head_start", "sunk-cost": "per_step"}
READ |= {"break-even": "break_even"}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed, from the grids of both widths."""
    made = {id: [] for id in ROLES}
    for dim, end in {32: "", 64: WIDE}.items():
        for one in grids(runs, dim):
            seed, law = one["seed"], one["law"]
            row = fits(one)
            for id, name in READ.items():
                made[id + end].append(Pair(seed, row[f"{name}_long"], row[f"{name}_short"]))
            for id in ("held-out-error", "sum"):
                other = ROLES[id]["baseline"]["law"]  # runs may be told that they are the other's
                names = (law, "with" if law == other else other)
                made[id + end].append(Pair(seed, *(row[f"error_{name}"] for name in names)))
    return made
