"""The study of muScaling (2023): models of growing width, standard or muP, at several rates.

A run is one training, or the first four steps of one. All models have two layers, heads of 16 and
tied embeddings, and are drawn with deviation dim^-0.5, the standard ones too: with 0.02 for all
widths they would be straw men. Adam has no decay of weights, gradients are not clipped (a limit on
their norm would not reparametrize), and the rate is constant, as the loss is compared at one step.

Claims are judged on the plan's design: widths of 32, 64, 128, 192 and 256, a quarter of a MiB,
three rates a factor 2 apart, on seeds 15 to 19 (the four steps on seeds 0 to 4). Six rates a factor
2 apart were tried on seed 100 at each width, for both parametrizations alike; the best is the
middle one of each width's three. Where the base's rate is none of them, the standard model is
trained at it, too: with no search one would take it. Of batches of 512, 1,024 and 2,048 bytes the
smallest reached the least loss on seed 100. The four steps were tried at twice the rate that they
are judged at, with the same outcome.

Before, each model saw 64 KiB, and width 16 stood in for 192. The drift was then judged three times,
each time on new seeds. Three rates on widths 16 to 64 turned out to be too few to place one seed's
optimum, which often lay at their end: `judged_first` keeps what seeds 0 to 4 gave; their list was
made shorter three times while the first runs were under way and none had been read. Then came five
rates around the same middles, on seeds 5 to 9, `judged_second`, and five widths up to 256 with five
rates each, on seeds 10 to 14, `judged_third`.
"""

from functools import partial

import numpy as np
import torch

from lablib.data import Batches, byte_text
from lablib.evidence import Pair, grid, matching
from lablib.models import GPT, GPTConfig
from lablib.scaling import mu_scaling as ms
from lablib.scaling.curves import valley
from lablib.training import evaluate, fit
from lablib.training.optimizers import adamw

BASE = 32  # the width that the rate is tuned on
BATCH, LENGTH = 512, 128
STEPS = 128
FEW = 4  # steps of the coordinate check


def run(
    seed: int, parametrization: str, dim: int, lr: float, steps: int = STEPS, windows: int = 128
) -> dict:
    """Train a model of two layers at a constant rate; its held-out loss in nats a byte.

    parametrization: "standard" or "mup", whose base has BASE dimensions. windows: held-out ones, of
    128 bytes. moved_block, moved_logits: how far the last block's output and the logits are from
    where they began, root mean square over 8 held-out windows.
    """
    text = byte_text()
    held_out = text.windows(LENGTH, windows)
    model = build(seed, parametrization, dim)
    before = ms.coordinates(model, held_out[0][:8, :-1])
    rows = Batches(text.first(steps * BATCH, LENGTH), BATCH // LENGTH, LENGTH, seed)
    optimizer = adamw(lr, weight_decay=0.0)
    constant = {"schedule": "constant", "clip": None, "progress": False}
    fit(model, rows, steps=steps, optimizer=optimizer, seed=seed, **constant)
    moves = ms.moved(before, ms.coordinates(model, held_out[0][:8, :-1]))
    return {
        "N": model.n_parameters(embeddings=False),
        "loss": round(evaluate(model, held_out), 5),
        "moved_block": round(moves["block 2"], 5),
        "moved_logits": round(moves["logits"], 5),
    }


def build(seed: int, parametrization: str, dim: int) -> GPT:
    """Two layers, heads of 16, weights drawn with deviation dim^-0.5 in either parametrization."""
    sizes = {"dim": dim, "n_heads": dim // 16, "ffn_dim": 3 * dim, "n_layers": 2}
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=256, max_length=LENGTH, init_std=dim**-0.5, **sizes))
    return ms.mup_(model, BASE) if parametrization == "mup" else model


BOTH = ("standard", "mup")
RATE = 0.008  # the best of the base's rates, as tuned
WIDTHS = (32, 64, 128, 192)  # what the law is fitted to
WIDEST = 256  # what it foretells
LONG = 512  # steps: a quarter of a MiB
TRIED = {  # rates a factor 2 apart around each width's optimum, as tuned
    "standard": {
        16: (0.008, 0.016, 0.032),
        32: (0.004, 0.008, 0.016),
        64: (0.002, 0.004, 0.008),
    },
    "mup": {
        16: (0.004, 0.008, 0.016),
        32: (0.004, 0.008, 0.016),
        64: (0.004, 0.008, 0.016),
    },
}
SEARCHED = tuple(TRIED["mup"])
WIDER = {  # the same middles, with one more rate on each side
    kind: {dim: (lr[0] / 2, *lr, lr[-1] * 2) for dim, lr in of.items()}
    for kind, of in TRIED.items()
}
SAME = WIDER["mup"][BASE]
FIVE = {  # of more widths
    "standard": {
        **WIDER["standard"],
        128: (0.0005, 0.001, 0.002, 0.004, 0.008),
        256: (0.0004, 0.0008, 0.0015, 0.003, 0.006),
    },
    "mup": {**WIDER["mup"], 128: SAME, 256: SAME},
}
LADDER = tuple(FIVE["mup"])  # the widths that had a quarter of the text
CHECKED = (16, 32, 64, 128)
PLAN = {  # rates around each width's optimum in LONG steps, as tuned
    "standard": {
        32: (0.004, 0.008, 0.016),
        64: (0.002, 0.004, 0.008),
        128: (0.001, 0.002, 0.004),
        192: (0.0007, 0.0014, 0.0028),
        256: (0.0005, 0.001, 0.002),
    },
    "mup": dict.fromkeys((*WIDTHS, WIDEST), (0.004, 0.008, 0.016)),
}
SIX = {  # rates a factor 2 apart that each width was tried at on seed 100, the plan's six
    kind: {dim: (lr[0] / 4, lr[0] / 2, *lr, lr[-1] * 2) for dim, lr in of.items()}
    for kind, of in PLAN.items()
}
PLANNED = tuple(PLAN["mup"])  # the widths that the claims are judged on


def of_a_seed(seed: int) -> list[dict]:
    """Valleys at three widths, one rate at two more, and four steps at four widths.

    At the base's width the two parametrizations are one model, which is trained once.
    """
    points = []
    for kind in BOTH:
        each = {"seed": seed, "parametrization": kind}
        for dim in (*CHECKED, WIDEST):
            points += grid(**each, dim=dim, lr=TRIED[kind].get(dim, (RATE,)))
        points += grid(**each, dim=CHECKED, lr=RATE, steps=FEW)
    return once(points)


def once(points: list[dict]) -> list[dict]:
    """Points without those of muP at the base's width, where it is the standard model."""
    return [p for p in points if p["dim"] != BASE or p["parametrization"] == "standard"]


def valleys(seed: int, rates: dict = WIDER) -> list[dict]:
    """Several rates at each width, for both parametrizations."""
    return once(
        [
            point
            for kind, of in rates.items()
            for dim, lr in of.items()
            for point in grid(seed=seed, parametrization=kind, dim=dim, lr=lr)
        ]
    )


def planned(seed: int) -> list[dict]:
    """Three rates at each width, and the base's rate where it is none of them; LONG steps each."""
    points = valleys(seed, PLAN)
    for dim, lr in PLAN["standard"].items():
        if RATE not in lr:
            points += grid(seed=seed, parametrization="standard", dim=dim, lr=RATE)
    return [point | {"steps": LONG} for point in points]


SEEDS = range(5)
FRESH = range(5, 10)  # of five rates, for the drift alone
POINTS = [point for seed in SEEDS for point in of_a_seed(seed)]
LATER = range(10, 15)  # of five widths
POINTS += [point for seed in FRESH for point in valleys(seed)]
POINTS += [point for seed in LATER for point in valleys(seed, FIVE)]
LAST = range(15, 20)  # of the planned text, for all claims but the four steps'
POINTS += [point for seed in LAST for point in planned(seed)]
AT_FIRST = (0.004, 0.008, 0.016, 0.032)
TUNING = grid(seed=100, parametrization=BOTH, dim=(16, 32, 64, 128), lr=AT_FIRST)
TUNING += grid(seed=100, parametrization=BOTH, dim=(32, 64, 128, 256), lr=0.016, steps=FEW)
TUNING += grid(seed=100, parametrization=BOTH, dim=(64, 128), lr=(0.001, 0.002))
TUNING += grid(seed=100, parametrization=BOTH, dim=(48, 96, 256), lr=RATE)
TUNING += grid(seed=100, parametrization=BOTH, dim=256, lr=(0.0005, 0.001, 0.002, 0.004, 0.016))
TUNING += [
    point
    for kind, of in SIX.items()
    for dim, lr in of.items()
    for point in grid(seed=100, parametrization=kind, dim=dim, lr=lr, steps=LONG)
]
CANARY = {"seed": 200, "parametrization": "mup", "dim": 64, "lr": 0.01, "steps": 3, "windows": 8}
METHOD, BASELINE = {"parametrization": "mup"}, {"parametrization": "standard"}
CLAIMS = ("predicted", "drift", "coordinates", "search", "wider")
# No control is stored: there are two parametrizations, and the standard one is the baseline.
ROLES = {id: {"method": METHOD, "baseline": BASELINE, "control": None} for id in CLAIMS}


def values(runs: list) -> dict:
    """One pair a seed: muP's number and the standard parametrization's."""
    first, seeds = (
        sorted({run["seed"] for run in runs if run["seed"] in some}) for some in (SEEDS, LAST)
    )
    return {
        "predicted": [pair(runs, seed, error, error) for seed in seeds],
        "drift": drifts(runs, LAST, PLANNED),
        "coordinates": [pair(runs, seed, spread, spread) for seed in first],
        "search": [pair(runs, seed, untuned, tuned) for seed in seeds],
        "wider": [pair(runs, seed, widest, widest) for seed in seeds],
    }


def drifts(runs: list, seeds, widths: tuple = SEARCHED) -> list[Pair]:
    """The drift of both parametrizations over these widths, one pair a seed."""
    there = sorted({run["seed"] for run in runs if run["seed"] in seeds})
    over = partial(drift, widths=widths)
    return [pair(runs, seed, over, over) for seed in there]


def judged_first(runs: list) -> list[Pair]:
    """The drift on the first five seeds, which had three rates at each of three widths."""
    return drifts(runs, SEEDS)


def judged_second(runs: list) -> list[Pair]:
    """The drift on the next five seeds, which had five rates at the same widths."""
    return drifts(runs, FRESH)


def judged_third(runs: list) -> list[Pair]:
    """The drift on the seeds that had five rates at five widths, and a quarter of the text."""
    return drifts(runs, LATER, LADDER)


def pair(runs: list, seed: int, method, baseline) -> Pair:
    """A number of a seed's muP runs, and one of its standard runs."""
    ours, theirs = (of_kind(runs, seed, **kind) for kind in (METHOD, BASELINE))
    return Pair(seed, method(ours), baseline(theirs))


def of_kind(runs: list, seed: int, parametrization: str) -> list[dict]:
    """A seed's runs of one parametrization, and those at the base's width, which are of both."""
    either = matching(runs, seed=seed)
    return [
        run for run in either if run["dim"] == BASE or run["parametrization"] == parametrization
    ]


def losses(runs: list, dim: int) -> dict[float, float]:
    """rate -> loss of the whole trainings at a width."""
    of = [run for run in matching(runs, dim=dim) if run.get("steps", STEPS) != FEW]
    return {run["lr"]: run["loss"] for run in sorted(of, key=lambda run: run["lr"])}


def sizes(runs: list) -> dict[int, int]:
    """width -> parameters without embedding."""
    return {run["dim"]: run["N"] for run in runs}


def foretold(runs: list) -> float:
    """The widest model's loss by the law through the narrower ones, all at the base's rate."""
    n = sizes(runs)
    small = {n[dim]: losses(runs, dim)[RATE] for dim in WIDTHS}
    return ms.predict_loss(small, n[WIDEST])


def widest(runs: list) -> float:
    """The widest model's loss at the base's rate."""
    return losses(runs, WIDEST)[RATE]


def error(runs: list) -> float:
    """How far the widest model's loss is from what was foretold, in percent of it."""
    return 100 * abs(foretold(runs) / widest(runs) - 1)


def error_searched(runs: list) -> float:
    """As `error`, when each width has the best of its own rates: a search at every width."""
    n, best = sizes(runs), {dim: tuned(runs, dim) for dim in PLANNED}
    told = ms.predict_loss({n[dim]: best[dim] for dim in WIDTHS}, n[WIDEST])
    return 100 * abs(told / best[WIDEST] - 1)


def best_rate(runs: list, dim: int) -> float:
    """The best rate at a width, as `bottom` has it."""
    return bottom(losses(runs, dim))


def bottom(by_rate: dict[float, float]) -> float:
    """The vertex of the valley; the best rate itself where it stands at the end of those tried."""
    vertex = valley(list(by_rate), list(by_rate.values()))
    return vertex.x if vertex.bracketed else min(by_rate, key=by_rate.get)


def drift(runs: list, widths: tuple = SEARCHED) -> float:
    """How steeply the best rate moves with the width: |slope| of their logarithms."""
    best = [best_rate(runs, dim) for dim in widths]
    return float(abs(np.polyfit(np.log(widths), np.log(best), 1)[0]))


def spread(runs: list) -> float:
    """The exponent with which the last block's move in four steps grows with the width."""
    few = {run["dim"]: run for run in matching(runs, steps=FEW)}
    return ms.growth(few, "moved_block")


def untuned(runs: list, dim: int = SEARCHED[-1]) -> float:
    """The loss of a searched width at the base's rate."""
    return losses(runs, dim)[RATE]


def tuned(runs: list, dim: int = SEARCHED[-1]) -> float:
    """Its loss at the best of all rates tried."""
    return min(losses(runs, dim).values())


def fixed_model(dim: int) -> GPT:
    """A tiny model in float64 whose weights come from no random generator: as large as if drawn."""
    sizes = {"dim": dim, "n_heads": dim // 8, "ffn_dim": 3 * dim, "n_layers": 2}
    model = GPT(GPTConfig(vocab_size=40, max_length=32, **sizes)).double()
    for place, weight in enumerate(p for p in model.parameters() if p.ndim == 2):
        k = torch.arange(weight.numel(), dtype=torch.float64)
        weight.data = (2 / dim) ** 0.5 * torch.sin((0.7 + place) * k**2).view_as(weight)
    return model


def after_five_steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[float]:
    """Some logits of a fixed text after five steps on it, then some weights, as they act."""
    tokens = (torch.arange(4 * 17) ** 2 % 39).view(4, 17)
    for _ in range(5):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1]).flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
        optimizer.step()
    block = model.blocks[1]
    layers = [block.attention.query, block.attention.output, block.mlp.down]
    with torch.no_grad():
        acting = [getattr(layer, "times", 1.0) * layer.weight[0, :16] for layer in layers]
        parts = [model(tokens)[0, :2].flatten(), *acting, model.embedding.weight[3, :16]]
    return torch.cat(parts).tolist()
