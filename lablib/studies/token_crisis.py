"""The study of To Repeat or Not To Repeat (Xue et al., 2023): 32 KiB of prose, read 32 times.

Every model sees 1 MiB: all new, 128 KiB in 8 passes, or 32 KiB in 32. The rate for new text is the
shared grid's, tuned there for this size. A lower rate is a remedy for repetition, too: "slow" is
the best of four, and what dropout and its rivals are judged against. Each of them has the best of
four strengths, on the same two tuning seeds, at the rate of new text. More dropout, 0.4 and 0.5 on
one of them, is for a picture; "slow" had as many rates more there, and they were no better. Models
of other shapes are trained at the dense model's rate. What size costs is judged between 13 and 56
thousand parameters, and shown for 151.

Experts are chosen by the byte (`HashChoice`), not by a learned router: at this size learned routers
gain nothing in so short a training, and experts that are not used can't be overfitted. Their
weights, too, have deviation dim^-0.5.

Twins: "experts" and "large", a dense model of three layers of dim 64, have nearly as many
parameters, 166 and 151 thousand outside the embedding. On one tuning seed four strengths of dropout
were tried on each. The best of the experts is carried to the dense one and judged there, against
the dense one without dropout at the best of five rates. The same at the plan's size, about a
million: eight experts in each of three layers of dim 64, 0.86 million, and four dense layers of dim
128, 0.80 million. There 0.4, the most dropout, and the lowest of the five rates had been the best,
so that more of either was tried before anything was judged: five strengths, seven rates.

The objectives of section 3.3 are in `lablib.scaling.denoising`. A decoder learns by each, text and
target in one row, and is measured on T5's held-out spans, which are one in seven of UL2's rows. All
have one rate, of three on one tuning seed: the best with new text for UL2, next to it for T5.

All was judged before on a quarter of the text, 8 KiB in 32 passes, with the best of three strengths
on one tuning seed, and without the objectives. The judging seeds are the same, all runs are new.
Drop path's verdict turned, the others stand. Not reproduced: label smoothing, which keeps
probability from the right byte on purpose, and we count nats, the paper right guesses; dropout
against its rivals, where AdamW's decay is steadier than what diverged in the paper; UL2 against
span corruption, whose costs are both small, in answers that are a small part of the text.
"""

from functools import partial

import numpy as np
import torch

from lablib.data import Batches, byte_text
from lablib.evidence import Pair, grid, matching, paired
from lablib.scaling import token_crisis as tc
from lablib.scaling.denoising import T5, UL2, Denoising
from lablib.scaling.generalized_scaling import hash_experts_
from lablib.studies import scaling_grid
from lablib.training import evaluate, fit, padded_next_token_loss
from lablib.training.optimizers import adamw

KB, MB = 2**10, 2**20
LENGTH, CURVE, FINAL = 128, 64, 512  # bytes a window; held-out windows of a curve, of the last loss
RATE = 0.0146  # at dim 48, the grid's; others in proportion to 1 / dim
N_EXPERTS = 4
MANY_EXPERTS = 8  # of the twin of a million
OBJECTIVES = {"spans": T5, "ul2": UL2}
TEXT, HIDDEN = 95, 1024  # bytes of a text, so that a row is at most as long; held-out ones
TWINS = ("experts", "large")  # of nearly as many parameters
MILLION = ("experts of a million", "dense of a million")  # twins of 0.86 and 0.80 million
STRENGTH = {"dropout": 0.2, "late": 0.2, "path": 0.2, "smoothing": 0.1, "decay": 3.0}


def run(
    kind: str,
    seed: int,
    unique: int | None = None,
    strength: float = 0.0,
    lr: float = RATE,
    tokens: int = MB,
    batch: int = 2048,
    points: int = 16,
) -> dict:
    """Train a small model on bytes, the first `unique` again and again, or all of them new.

    kind: "plain"; "slow", the same at a lower rate; "dropout", "late" (dropout in the second half),
        "path", "smoothing" or "decay", of this `strength`; "small", one layer of dim 32; "experts",
        four in each layer, chosen by the byte; "shared", one block in the place of both; "large",
        three layers of dim 64; "experts of a million", eight in each of three layers of dim 64;
        "dense of a million", four layers of dim 128. Twins may have dropout, of this `strength`.
        "spans" and "ul2": a plain model that learns to fill in what was taken away.
    lr: at dim 48. Returns the last held-out loss, nats a byte, with curves of held-out and training
    loss, and the parameters outside the embedding.
    """
    if kind in OBJECTIVES:
        return denoised(kind, seed, unique or tokens, lr, tokens, batch // LENGTH)
    text = byte_text()
    data = text.first(unique or tokens, LENGTH)
    model = build(kind, seed)
    steps = tokens // batch
    every = max(1, steps // points)
    history = fit(
        model,
        Batches(data, batch // LENGTH, LENGTH, seed),
        steps=steps,
        seed=seed,
        held_out=text.windows(LENGTH, CURVE),
        held_out_every=every,
        progress=False,
        **regularized(model, kind, strength, lr, steps),
    )
    losses = history.losses
    blocks = [losses[at : at + every] for at in range(0, every * points, every)]
    curve = [round(loss, 4) for _, loss in history.held_out]
    return {
        "N": model.n_parameters(embeddings=False),
        "loss": round(evaluate(model, text.windows(LENGTH, FINAL)), 5),
        "best_loss": min(curve),
        "curve": curve,
        "training": [round(sum(part) / len(part), 4) for part in blocks],
    }


def denoised(kind: str, seed: int, unique: int, lr: float, tokens: int, rows: int) -> dict:
    """Train on an objective, `rows` texts a batch; the loss on hidden spans, nats a target id."""
    text = byte_text()
    model = build(kind, seed)
    data = Batches(text.first(unique, TEXT), rows, TEXT, seed)
    fit(
        model,
        Denoising(data, OBJECTIVES[kind], seed),
        steps=tokens // (rows * TEXT),
        seed=seed,
        loss=padded_next_token_loss,
        progress=False,
        **regularized(model, kind, 0.0, lr, 0),
    )
    hidden = Denoising(data, OBJECTIVES["spans"])
    held_out = [hidden.rows(windows[:, :-1]) for windows in text.windows(TEXT, HIDDEN)]
    loss = evaluate(model, held_out, padded_next_token_loss)
    return {"N": model.n_parameters(embeddings=False), "loss": round(loss, 5)}


def build(kind: str, seed: int):
    """The grid's model of a kind, all weights of deviation dim^-0.5."""
    sizes = {"small": (1, 32), "large": (3, 64), MILLION[0]: (3, 64), MILLION[1]: (4, 128)}
    size = sizes.get(kind, (2, 48))
    model = scaling_grid.build(seed, *size, None)
    if kind == "shared":
        tc.share_blocks_(model)
    if kind in ("experts", MILLION[0]):
        some = torch.as_tensor(byte_text().train[: 256 * KB]).long()
        n_experts = N_EXPERTS if kind == "experts" else MANY_EXPERTS
        hash_experts_(model, n_experts, some.bincount(minlength=256))
    return model


def regularized(model, kind: str, strength: float, lr: float, steps: int) -> dict:
    """What `fit` is told of a kind: loss, optimizer and callbacks. Hooks go on the model."""
    decay = strength if kind == "decay" else 0.1
    lr = lr * 48 / model.config.dim
    options = {"optimizer": adamw(lr, weight_decay=decay)}
    if kind in ("dropout", *TWINS, *MILLION):
        tc.noisy_(model, strength)
    if kind == "path":
        tc.noisy_(model, strength, tc.drop_path)
    if kind == "late":
        noise = tc.noisy_(model, 0.0)
        options["callbacks"] = [tc.switched_on(noise, strength, steps // 2)]
    if kind == "smoothing":
        options["loss"] = partial(tc.smoothed_loss, smoothing=strength)
    return options


def valley(runs: list, unique: int | None, kind: str = "dropout", seed: int = 100) -> dict:
    """Runs of a seed at new text's rate, by dropout; at 0 the plain one, or the kind's own."""
    none = "plain" if kind == "dropout" else kind
    alike = [r for r in matching(runs, unique=unique, seed=seed) if r.get("lr", RATE) == RATE]
    runs = [r for r in alike if r["kind"] == kind or (r["kind"] == none and not r.get("strength"))]
    return {run.get("strength", 0.0): run for run in runs}


SEEDS = range(5)
LITTLE, MORE = 32 * KB, 128 * KB  # bytes of text that are read again and again
REMEDIES = ("dropout", "path", "smoothing", "decay")
SHAPES = ("experts", "small", "shared")
SLOW = RATE / 8
CARRIED, SLOW_LARGE = 0.2, RATE / 8  # best for experts; best for "large" without; as tuned
CARRIED_MILLION, SLOW_MILLION = 0.4, RATE / 16  # the same of the twins of a million
OBJECTIVE_RATE = RATE / 2  # best for "ul2" on new text, and within 0.01 of the best for "spans"
POINTS = [
    *grid(kind="plain", unique=(LITTLE, None), seed=SEEDS),
    *grid(kind="slow", unique=LITTLE, lr=SLOW, seed=SEEDS),
    *[
        point | {"strength": STRENGTH[point["kind"]]}
        for point in grid(kind=REMEDIES, unique=LITTLE, seed=SEEDS)
    ],
    *grid(kind=SHAPES, unique=(LITTLE, None), seed=SEEDS),
    *grid(kind="dropout", unique=None, strength=STRENGTH["dropout"], seed=SEEDS),
    *grid(kind="late", unique=LITTLE, strength=STRENGTH["late"], seed=SEEDS),
    *grid(kind="plain", unique=MORE, seed=SEEDS),
    *grid(kind="large", unique=LITTLE, strength=CARRIED, lr=RATE, seed=SEEDS),
    *grid(kind="large", unique=LITTLE, strength=0.0, lr=(SLOW_LARGE, RATE), seed=SEEDS),
    *grid(kind="large", unique=None, strength=0.0, lr=RATE, seed=SEEDS),
    *grid(kind=MILLION[1], unique=LITTLE, strength=CARRIED_MILLION, lr=RATE, seed=SEEDS),
    *grid(kind=MILLION[1], unique=LITTLE, strength=0.0, lr=(SLOW_MILLION, RATE), seed=SEEDS),
    *grid(kind=OBJECTIVES, unique=(LITTLE, None), lr=OBJECTIVE_RATE, seed=SEEDS),
]
TRIED = {
    "dropout": (0.05, 0.1, 0.2, 0.3),
    "path": (0.05, 0.1, 0.2, 0.4),
    "smoothing": (0.05, 0.1, 0.2, 0.4),
    "decay": (1.0, 3.0, 10.0, 30.0),
}
TRIED_RATES = [RATE / n for n in (16, 8, 4, 2)]
BOTH = (100, 101)  # the tuning seeds
TUNING = [
    *[
        point
        for kind, tried in TRIED.items()
        for point in grid(kind=kind, unique=LITTLE, strength=tried, seed=BOTH)
    ],
    *grid(kind="slow", unique=LITTLE, lr=TRIED_RATES, seed=BOTH),
    *grid(kind="plain", unique=(LITTLE, None), lr=RATE, seed=BOTH),
    *grid(kind="dropout", unique=None, strength=TRIED["dropout"], seed=100),
    *grid(kind="experts", unique=None, lr=(RATE / 2, RATE), seed=100),
    *grid(kind=OBJECTIVES, unique=(LITTLE, None), lr=(RATE / 4, RATE / 2, RATE), seed=100),
]
TRIED_ON_TWINS = (0.05, 0.1, 0.2, 0.4)
TUNING += [
    *grid(kind=TWINS, unique=LITTLE, strength=TRIED_ON_TWINS, seed=100),
    *grid(kind="large", unique=LITTLE, lr=[RATE / n for n in (16, 8, 4, 2, 1)], seed=100),
    *grid(kind="experts", unique=LITTLE, seed=100),
    *grid(kind="dropout", unique=(LITTLE, None), strength=(0.4, 0.5), seed=100),  # to be shown
    *grid(kind="slow", unique=LITTLE, lr=(RATE / 3, RATE / 1.5), seed=100),  # as many more
]
TRIED_ON_MILLION = (*TRIED_ON_TWINS, 0.6)  # 0.4 had been the best of four
TRIED_RATES_OF_MILLION = [RATE / n for n in (64, 32, 16, 8, 4, 2, 1)]  # the lowest of five was best
TUNING += [
    *grid(kind=MILLION, unique=LITTLE, strength=TRIED_ON_MILLION, seed=100),
    *grid(kind=MILLION[1], unique=LITTLE, lr=TRIED_RATES_OF_MILLION, seed=100),
    *grid(kind=MILLION[0], unique=LITTLE, seed=100),
]
CANARY = {
    "kind": "experts",
    "seed": 200,
    "unique": 4 * KB,
    "tokens": 8 * KB,
    "batch": 1024,
    "points": 2,
}
RIVAL = "decay"  # the best of the other remedies on the tuning seeds
PLAIN = {"kind": "plain", "unique": LITTLE}
FRESH = {"kind": "plain", "unique": None}
TUNED = {"kind": "slow", "unique": LITTLE}  # no remedy, at the best rate for repeated text
DROPOUT = {"kind": "dropout", "unique": LITTLE}
EXPERTS, DENSE, SHARED = {"kind": "experts"}, {"kind": "plain"}, {"kind": "shared"}


def remedy(method: dict, baseline: dict = TUNED) -> dict:
    """A remedy's roles. The control is no remedy, at the remedy's own rate."""
    return {"method": method, "baseline": baseline, "control": PLAIN}


def carried(kind: str, strength: float, slow: float) -> dict:
    """A dense twin's roles: dropout as carried to it, or none at its own best rate, `slow`."""
    twin = {"kind": kind, "unique": LITTLE}
    none = twin | {"strength": 0.0}
    return {
        "method": twin | {"strength": strength, "lr": RATE},
        "baseline": none | {"lr": slow},
        "control": none | {"lr": RATE},
    }


# None: new text without dropout, the smallest model and T5's spans are the baselines themselves.
ROLES = {
    "dropout": remedy(DROPOUT),
    "repeat": {"method": PLAIN, "baseline": FRESH, "control": None},
    "size": {"method": DENSE, "baseline": {"kind": "small"}, "control": None},
    "experts": {"method": EXPERTS, "baseline": DENSE, "control": SHARED},
    "shared": {"method": SHARED, "baseline": DENSE, "control": EXPERTS},
    "rivals": remedy(DROPOUT, {"kind": RIVAL, "unique": LITTLE}),
    "late": remedy({"kind": "late"}),
    "fresh": {
        "method": {"kind": "dropout", "unique": None},
        "baseline": FRESH,
        "control": None,
    },
    "path": remedy({"kind": "path"}),
    "smoothing": remedy({"kind": "smoothing"}),
    "decay": remedy({"kind": "decay"}),
    "carried": carried("large", CARRIED, SLOW_LARGE),
    "carried-million": carried(MILLION[1], CARRIED_MILLION, SLOW_MILLION),
    "ul2": {"method": {"kind": "ul2"}, "baseline": {"kind": "spans"}, "control": None},
}
DEGRADING = ("size", "experts", "shared", "ul2")  # claims about what repeating costs


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed."""
    made = {}
    for id, role in ROLES.items():
        if id in DEGRADING:
            ours, theirs = (cost(runs, role[side]["kind"]) for side in ("method", "baseline"))
            made[id] = [Pair(seed, ours[seed], theirs[seed]) for seed in sorted(ours)]
        else:
            made[id] = paired(runs, role["method"], role["baseline"], "loss")
    return made


def change(runs: list, method: dict, baseline: dict) -> list[float]:
    """Nats that the method's last held-out loss lies above the baseline's, one a seed."""
    return [pair.method - pair.baseline for pair in paired(runs, method, baseline, "loss")]


def cost(runs: list, kind: str) -> dict[int, float]:
    """Nats a byte that repeated text ends above unique text at one rate, by seed."""
    plain = {"strength": 0.0, "lr": RATE} if kind == "large" else {}
    repeated, fresh = ({"kind": kind, "unique": unique} | plain for unique in (LITTLE, None))
    pairs = paired(runs, repeated, fresh, "loss")
    return {pair.seed: pair.method - pair.baseline for pair in pairs}


def by_heart(model) -> tuple[float, float]:
    """Mean nats a byte on the text that is read again and again, and on as much that never is."""
    text, starts = byte_text(), range(0, 32_000, 516)
    means = [
        [tc.byte_losses(model, bytes(part[at : at + 129])).mean() for at in starts]
        for part in (text.train, text.held_out)
    ]
    return tuple(float(np.mean(part)) for part in means)
