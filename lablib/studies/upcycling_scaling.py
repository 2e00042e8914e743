"""The study of scaling laws for upcycling (2025): a grid of dense steps by upcycled steps.

The theme's base configuration with half of its batch, 16 x 64 tokens a step. A run is one seed's
whole grid: one dense training, copied on its way (rows), each copy upcycled to 8 experts, top-2,
softmax after the choice, and trained on (columns); beside them a mixture trained from scratch. The
rate falls with one over the root of the step everywhere, so that any step of a curve could have
been the end: a row costs one dense snapshot and one training.
"""

from functools import partial

import numpy as np
import torch

from lablib.data import Batches
from lablib.data.mixtures import mixture
from lablib.evidence import Pair, grid
from lablib.experts.switch_transformers import reduced_init_
from lablib.experts.upcycling import upcycle_
from lablib.experts.upcycling_scaling import snapshots
from lablib.models import GPT, GPTConfig
from lablib.scaling.fits import fit_joint_law, fit_sum_law
from lablib.training import fit

CONFIG = GPTConfig(vocab_size=1024, dim=32, n_layers=2, n_heads=2, qk_norm=True, max_length=64)
DENSE = FURTHER = (50, 100, 200, 400)
SCRATCH = (50, 100, 200, 400, 800)
AT = 100  # further steps at which head starts are compared
BATCH, LENGTH, WARMUP = 16, 64, 50


def run(
    seed: int,
    dense: tuple = DENSE,
    further: tuple = FURTHER,
    scratch: tuple = SCRATCH,
    lr: float = 1e-2,
    upcycled_lr: float = 1e-2,
    scratch_lr: float = 1e-2,
    rows: int = 256,
) -> dict:
    """One seed's grid of held-out losses, in nats a token.

    dense, further, scratch: steps of the dense training, of the upcycled one, and of the mixture
    trained from scratch, each rising; an empty scratch leaves the last out. lr: of dense and
    scratch. rows: how many held-out windows of 64 tokens a loss is taken on.
    """
    text = mixture()
    held_out = text.windows(limit=rows)
    kept = dict.fromkeys(dense)
    torch.manual_seed(seed)
    model = reduced_init_(GPT(CONFIG), 0.1)
    made = {"dense_losses": train(model, text, dense, lr, seed, held_out, kept)}
    kept[dense[-1]] = model
    grid = []
    for steps in dense:
        torch.manual_seed(10_000 + seed)
        newborn = upcycle_(kept[steps], 8, 1, 2, "after")
        grid.append(train(newborn, text, further, upcycled_lr, 10_000 + seed, held_out))
    made["losses"] = grid
    if scratch:
        torch.manual_seed(20_000 + seed)
        mixed = reduced_init_(upcycle_(GPT(CONFIG), 8, 1, 2, "after"), 0.1)
        made["scratch_losses"] = train(mixed, text, scratch, scratch_lr, 10_000 + seed, held_out)
    if len(dense) > 3 and len(further) > 3 and len(scratch) > 3:
        made |= fits(dense, further, grid, scratch, made["scratch_losses"])
    else:
        made["loss"] = grid[-1][-1]
    return made


def train(model, text, places, lr, seed, held_out, kept=None) -> list[float]:
    """Train to the last of places; the held-out loss at each. kept: filled as in `snapshots`."""
    every = int(np.gcd.reduce(places))
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
        held_out_every=every,
        progress=False,
    )
    losses = dict(history.held_out)
    return [round(losses[place], 4) for place in places]


def fits(dense, further, losses, scratch, scratch_losses) -> dict:
    """What the laws say about one grid.

    losses: (len(dense), len(further)). Errors are of laws fitted without the last row and column,
    on that row and column: the mean difference of logarithms. A head start is how many steps more
    the mixture from scratch needs to an upcycled model's loss after AT further steps.
    """
    d1, d2 = np.meshgrid(dense, further, indexing="ij")
    losses = np.asarray(losses)
    law = fit_joint_law(d1.ravel(), d2.ravel(), losses.ravel())
    made = {"interaction": law.interaction, "floor": law.floor}
    made |= {f"exponent_{k}": float(law.exponent(dense[at])) for k, at in ENDS.items()}
    inner = (d1 < dense[-1]) & (d2 < further[-1])
    for name, fitted in LAWS.items():
        short = fitted(d1[inner], d2[inner], losses[inner])
        off = np.log(short(d1[~inner], d2[~inner]) / losses[~inner])
        made[f"error_{name}"] = float(np.abs(off).mean())
    for name, at in ENDS.items():
        upcycled = losses[at, list(further).index(AT)] if AT in further else losses[at, -1]
        made[f"head_start_{name}"] = steps = steps_to(scratch, scratch_losses, upcycled) - AT
        made[f"per_step_{name}"] = steps / dense[at]
    return made


def steps_to(steps, losses, target: float) -> float:
    """Steps at which falling losses are at target, on lines in log steps; the ends where beyond."""
    falling = np.minimum.accumulate(losses)[::-1]
    return float(np.exp(np.interp(target, falling, np.log(steps)[::-1])))


ENDS = {"short": 0, "long": -1}
LAWS = {
    "with": fit_joint_law,
    "without": partial(fit_joint_law, interaction=False),
    "sum": fit_sum_law,
}

SEEDS = range(5)
TUNED = {"lr": 1e-2, "upcycled_lr": 1e-2, "scratch_lr": 2e-2}
SMALL = {"dense": (50,), "further": (50, 100), "scratch": ()}  # short enough to be repeated
POINTS = [
    *grid(**TUNED, dense=[DENSE], further=[FURTHER], scratch=[SCRATCH], seed=SEEDS),
    *[TUNED | SMALL | {"seed": seed} for seed in SEEDS],
]
TUNING = [
    {"dense": (400,), "further": (400,), "scratch": (400,), "seed": 100}
    | dict.fromkeys(("lr", "upcycled_lr", "scratch_lr"), lr)
    for lr in (5e-3, 1e-2, 2e-2)
]
# Losses alone: fits of so few steps turn on a last digit. A test fits the stored losses again.
CANARY = {"dense": (2,), "further": (2, 4), "scratch": (2,), "rows": 16, "seed": 200}
ROLES = {
    "interaction": {"method": "exponent_long", "baseline": "exponent_short"},
    "held-out-error": {"method": "error_with", "baseline": "error_without"},
    "sum": {"method": "error_with", "baseline": "error_sum"},
    "head-start": {"method": "head_start_long", "baseline": "head_start_short"},
    "sunk-cost": {"method": "per_step_long", "baseline": "per_step_short"},
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed, from the whole grids."""
    whole = [run for run in runs if "interaction" in run]
    return {
        id: [Pair(run["seed"], run[role["method"]], run[role["baseline"]]) for run in whole]
        for id, role in ROLES.items()
    }
