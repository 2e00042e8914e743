"""The study of Switch Transformers (2021): experts against a dense model of equal work a token.

Two layers of dim 32 over the mixture of four domains, 1,024 BPE pieces, batches of 32 x 64 tokens:
several domains give experts something to divide, and every layer is a Switch layer. No token is
dropped, since a capacity factor of 1.25 costs a model of this size about what its experts gain.
The rate falls with one over the root of the step, as the paper's does, so that any step of a curve
could have been the end, and one run serves for losses, steps and time.

Tuned, on other seeds, for the dense model and for eight experts alike: the rate, and the scale of
the initialization (0: the house's normal 0.02; else the paper's truncated normal).
"""

import time

import torch

from lablib.data import Batches
from lablib.data.mixtures import mixture
from lablib.evidence import Pair, grid, paired
from lablib.experts import statistics
from lablib.experts.moe import moe_layers, recorded
from lablib.experts.switch_transformers import (
    add_dropout,
    copy_non_experts_,
    distilling,
    reduced_init_,
    steps_to,
    switch_,
)
from lablib.models import GPT, GPTConfig
from lablib.training import evaluate, fit

EVERY = 100  # steps between two points of a curve
FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # capacity factors at evaluation
SIZES = (1, 4, 8, 16)
TUNED = {1: {"init": 0.1, "lr": 1e-2}, 8: {"init": 0.1, "lr": 1e-2}}


def run(
    seed: int,
    n_experts: int = 1,
    steps: int = 1200,
    init: float = 0.1,
    lr: float = 1e-2,
    balance: float = 1e-2,
    random_input: bool = False,
    after: str = "",
    rows: int = 256,
) -> dict:
    """Train a dense model (n_experts 1) or one of Switch layers; its held-out curve, nats a token.

    random_input: the control, whose routers see noise in the place of tokens.
    after: "students" distills the trained model, "fine-tuning" trains it on a set that overfits;
        "nothing but time" trains none, and says what a step of each size costs.
    rows: how many held-out windows of 64 tokens a loss is taken on.
    """
    text = mixture()
    if after == "nothing but time":
        return step_costs(text.train, seed, steps)
    held_out = text.windows(limit=rows)
    model = build(seed, n_experts, init, balance)
    if random_input:
        for layer in moe_layers(model).values():
            layer.router.noisy = torch.randn_like
    start = time.process_time()
    history = train(model, text.train, steps, lr, seed, held_out)
    made = {
        "loss": history.held_out[-1][1],
        "curve": [round(loss, 4) for _, loss in history.held_out],
        "cpu_seconds": time.process_time() - start,
    }
    if n_experts > 1:
        made |= routing(model, held_out)
    if after == "students":
        made |= students(model, text.train, held_out, seed, lr)
    if after == "fine-tuning":
        made |= fine_tuning(model, text, seed)
    return made


def build(seed: int, n_experts: int, init: float, balance: float = 1e-2) -> GPT:
    """A model of the study: dense, or with a Switch layer in every block."""
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size=1024, dim=32, n_layers=2, n_heads=2, qk_norm=True, max_length=64)
    model = GPT(config)
    if n_experts > 1:
        switch_(model, n_experts, every=1, capacity_factor=None, balance=balance)
    return reduced_init_(model, init) if init else model


def train(model, tokens, steps, lr, seed, held_out, loss=None):
    """The study's training: batches of 32 x 64, 100 steps of warmup, inverse square root."""
    options = {"schedule": "inverse-sqrt", "warmup": 100, "progress": False, "loss": loss}
    data = Batches(tokens, 32, 64, seed)
    return fit(
        model,
        data,
        steps=steps,
        lr=lr,
        seed=seed,
        held_out=held_out,
        held_out_every=EVERY,
        **options,
    )


def routing(model: GPT, held_out: list) -> dict:
    """How evenly tokens spread, and the loss at capacity factors that drop some."""
    with recorded(model) as records:
        evaluate(model, held_out)
    entropies = []
    for layer in records.values():
        chosen = torch.cat([record.experts for record in layer])
        entropies.append(statistics.load_entropy(chosen, len(layer[0].counts)).item())
    return {"load_entropy": sum(entropies) / len(entropies), "dropping": dropping(model, held_out)}


def dropping(model: GPT, held_out: list) -> list[float]:
    """The held-out loss at each of FACTORS, capacity being shared by a batch."""
    losses = []
    for factor in FACTORS:
        for layer in moe_layers(model).values():
            layer.router.eval_capacity_factor = factor
        losses.append(round(evaluate(model, held_out), 4))
    for layer in moe_layers(model).values():
        layer.router.eval_capacity_factor = None
    return losses


def step_costs(tokens, seed: int, steps: int) -> dict:
    """Processor seconds of a step with 1, 4, 8 and 16 experts: the least of rounds in turn.

    In turn, since what else a machine does slows all of a round alike.
    """
    models = {n: build(seed, n, 0.1) for n in SIZES}
    spent: dict[int, list[float]] = {n: [] for n in SIZES}
    for _ in range(5):
        for n, model in models.items():
            start = time.process_time()
            fit(model, Batches(tokens, 32, 64, seed), steps=steps, lr=1e-4, progress=False)
            spent[n].append((time.process_time() - start) / steps)
    return {f"{n}_experts_seconds": min(spent[n][1:]) for n in SIZES}


def students(teacher: GPT, tokens, held_out: list, seed: int, lr: float) -> dict:
    """Dense students of 500 steps from the teacher's other weights, with its loss and without."""
    losses = {}
    for name, loss in (("distilled", distilling(teacher)), ("alone", None)):
        student = build(seed, 1, 0.0)
        copy_non_experts_(student, teacher)
        train(student, tokens, 500, lr, seed, held_out[:1], loss)
        losses[name] = evaluate(student, held_out)
    return losses


def fine_tuning(model: GPT, text, seed: int) -> dict:
    """The best held-out loss on one small domain: dropout 0.4 in the experts, and 0.1."""
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    few = text.train_of["shakespeare"][: 16 * 1024]
    held_out = list(
        torch.as_tensor(text.held_out_of["shakespeare"][: 65 * 128]).long().view(-1, 65).split(32)
    )
    losses = {}
    for name, rate in (("dropout_4", 0.4), ("dropout_1", 0.1)):
        model.load_state_dict(start)
        add_dropout(model, 0.1, rate)
        history = fit(
            model,
            Batches(few, 16, 64, seed),
            steps=300,
            lr=3e-3,
            seed=seed,
            held_out=held_out,
            held_out_every=20,
            progress=False,
        )
        curve = [loss for _, loss in history.held_out]
        losses |= {name: min(curve), f"{name}_end": curve[-1]}
    return losses


SEEDS = range(8)
DENSE, EIGHT = TUNED[1] | {"n_experts": 1}, TUNED[8] | {"n_experts": 8}
POINTS = [
    *grid(**DENSE, steps=1200, seed=SEEDS),
    *grid(**EIGHT, steps=1200, random_input=False, seed=SEEDS),
    *grid(**EIGHT, steps=1200, random_input=True, seed=SEEDS),
    *grid(after="nothing but time", steps=30, seed=SEEDS),
    *grid(**EIGHT, balance=(0.0, 1e-2), steps=400, seed=SEEDS),
    *grid(**EIGHT | {"n_experts": (4, 16)}, steps=800, seed=SEEDS),
    *grid(**EIGHT | {"init": 1.0}, steps=800, seed=SEEDS),
    *grid(**EIGHT, after="students", steps=600, seed=SEEDS),
    *grid(**EIGHT, after="fine-tuning", steps=400, seed=SEEDS),
]
TUNING = [
    *grid(n_experts=1, init=(0.0, 0.1), lr=(1e-2, 2e-2), steps=800, seed=100),
    *grid(n_experts=8, init=(0.1, 0.3), lr=(1e-2, 2e-2), steps=800, seed=100),
    *grid(n_experts=(1, 8), init=0.1, lr=5e-3, steps=800, seed=100),
]
CANARY = {"seed": 200, "n_experts": 4, "steps": 6, "rows": 16}

_DENSE = {"n_experts": 1, "steps": 1200}
_EIGHT = {"n_experts": 8, "steps": 1200, "random_input": False}
_BLIND = {"n_experts": 8, "steps": 1200, "random_input": True}
# None where the baseline is the control: a loss, a start, a teacher or a dropout left out.
ROLES = {
    "loss": {"method": _EIGHT, "baseline": _DENSE, "control": _BLIND},
    "steps": {"method": _EIGHT, "baseline": _DENSE, "control": _BLIND},
    "time": {"method": _EIGHT, "baseline": _DENSE, "control": _BLIND},
    "balance": {
        "method": {"balance": 1e-2, "steps": 400},
        "baseline": {"balance": 0.0, "steps": 400},
        "control": None,
    },
    "steps-4": {"method": {"n_experts": 4}, "baseline": _DENSE, "control": _BLIND},
    "steps-16": {"method": {"n_experts": 16}, "baseline": _DENSE, "control": _BLIND},
    "initialization": {
        "method": _EIGHT | {"init": 0.1},
        "baseline": {"init": 1.0, "steps": 800},
        "control": None,
    },
    "distillation": {"method": "distilled", "baseline": "alone", "control": None},
    "expert-dropout": {"method": "dropout_4", "baseline": "dropout_1", "control": None},
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed."""
    made = {
        "loss": paired(runs, *_sides("loss"), "loss"),
        "balance": paired(runs, *_sides("balance"), "load_entropy"),
        "initialization": paired(runs, *_sides("initialization"), _after_800_steps),
        "time": speeds(runs, *_sides("time"), step_cost(runs)),
    }
    for id in ("steps", "steps-4", "steps-16"):
        made[id] = speeds(runs, *_sides(id), lambda run: 1.0)
    for id in ("distillation", "expert-dropout"):
        method, baseline = _sides(id)
        made[id] = [Pair(r["seed"], r[method], r[baseline]) for r in runs if method in r]
    return made


def speeds(runs: list, method: dict, baseline: dict, cost) -> list:
    """What the baseline, and what the method, spends until both are at the higher final loss.

    The two curves are cut at the shorter one. cost: run -> what a step costs.
    """
    pairs = []
    for seed, ours, theirs in paired(runs, method, baseline, lambda run: run):
        points = min(len(ours["curve"]), len(theirs["curve"]))
        target = max(run["curve"][points - 1] for run in (ours, theirs))
        spent = [steps_until(run["curve"], target) * cost(run) for run in (theirs, ours)]
        pairs.append(Pair(seed, *spent))
    return pairs


def step_cost(runs: list):
    """run -> processor seconds of a step of its size, as measured for its seed."""
    costs = {run["seed"]: run for run in runs if run.get("after") == "nothing but time"}
    return lambda run: costs[run["seed"]][f"{run['n_experts']}_experts_seconds"]


def steps_until(curve: list[float], target: float) -> float:
    """Steps until a curve of the study is at or below target."""
    return steps_to([EVERY * (place + 1) for place in range(len(curve))], curve, target)


def _after_800_steps(run: dict) -> float:
    return run["curve"][800 // EVERY - 1]


def _sides(id: str) -> tuple:
    return ROLES[id]["method"], ROLES[id]["baseline"]
