"""The study of Learning to Skip (2023): skipping against a shallower model of equal FLOPs a token.

Four layers of dim 32 whose tokens skip, at the density that makes them cost what two dense layers
cost, over the mixture of four domains: 1,024 BPE pieces, batches of 32 x 64 tokens. The rate falls
with one over the root of the step.

Tuned, on another seed and with as many tries for each kind of model: the rate and the scale of the
initialization (0: the house's normal 0.02), for skipping also the temperature, the weight of the
density term and a warm start. Routers that are there from the first step keep the model at the
frequencies of single tokens for hundreds of steps, whatever the initialization, rate and
temperature. So routed models train their first steps without
routers, on the same number of tokens in all. Coins need no warm start, and are better without.

So does the weight of the density term: under the paper's 0.1 trained routers run more than their
target, and a threshold that holds them to it ruins them (tried first, on seeds 0 to 4, where they
lost to everything); a weight of 3 brings them there by themselves. Routers with it are judged on
seeds 10 to 17. What no router changes, early exit on equal text, four dense layers and decoding, is
shown on the seeds before. Early exit is shown and not judged: at equal training FLOPs it has a
third of the steps and loses to coins as well, so a router's lead would not be what it has learned.

Two things are not counted: routed models compute all rows in training, which straight-through
needs, and early exit at inference makes a prediction after each layer to see how sure it is.
"""

import time

import numpy as np
import torch
from torch.nn import functional as F

from lablib.data import Batches
from lablib.data.mixtures import mixture
from lablib.evidence import Pair, grid, matching, paired
from lablib.experts import learning_to_skip as lts
from lablib.experts.early_exit import add_confidence_exits, early_exit_loss
from lablib.experts.switch_transformers import reduced_init_
from lablib.models import GPT, GPTConfig, clocks
from lablib.models.flops import flops_per_token, head_flops
from lablib.training import evaluate, fit

LENGTH = 64
SIZES = {"vocab_size": 1024, "dim": 32, "n_heads": 2, "qk_norm": True, "max_length": LENGTH}
SHALLOW, DEEP = GPTConfig(n_layers=2, **SIZES), GPTConfig(n_layers=4, **SIZES)
BUDGET = flops_per_token(SHALLOW, LENGTH)
DENSITY = lts.matching_density(DEEP, LENGTH, BUDGET)
SHARES = (0.3, 0.6, 0.8, 0.95)  # densities at which one trained model is tried
KINDS = ("dense", "router", "random", "exit")
# Early exit computes all layers and predicts after each: at equal training FLOPs, fewer steps.
EXIT_FLOPS = flops_per_token(DEEP, LENGTH) + (DEEP.n_layers - 1) * head_flops(DEEP)
FEWER = round(1000 * BUDGET / EXIT_FLOPS)
PASSAGE = "And the king said unto the people, Return the name of the class: 42 objects."
PIECES = ("starts a word", "goes on in one", "number or sign", "space or line end")
# SmolLM2-135M's sizes: time does not depend on what the weights are.
LARGE = {"vocab_size": 49152, "dim": 576, "n_heads": 9, "n_kv_heads": 3, "ffn_dim": 1536}


def run(
    seed: int,
    kind: str = "router",
    n_layers: int = 4,
    steps: int = 1000,
    lr: float = 1e-2,
    init: float = 0.3,
    weight: float = 0.1,
    temperature: float = 1.0,
    std: float = 0.5,
    warm: int = 0,
    rows: int = 256,
) -> dict:
    """Train one of KINDS and take its held-out loss, nats a token, at DENSITY.

    init: scale of `reduced_init_`, 0 for the house's normal 0.02. weight, temperature, std: of the
    routers. warm: so many of the steps come first, without routers.
    rows: how many held-out windows of 64 tokens a loss is taken on.
    kind "decoding" times a large model instead; "every" (the canary's) trains each of KINDS.
    """
    if kind == "decoding":
        return decoding(seed, steps)
    if kind == "every":
        options = {"steps": steps, "rows": rows, "warm": warm}
        losses = {each: run(seed, each, **options)["loss"] for each in KINDS[2:]}
        made = run(seed, "router", **options) | {f"{k}_loss": v for k, v in losses.items()}
        return {key: value for key, value in made.items() if key not in ("density", "correlation")}
    text, start = mixture(), time.process_time()
    model = build(seed, n_layers, init)
    if warm:
        train(model, text.train, warm, lr, seed)
    if kind == "router":
        lts.add_routers(model, DENSITY, weight=weight, temperature=temperature, std=std)
    if kind == "random":  # coins learn nothing, so rows that skip need not be computed
        lts.add_random_routers(model, DENSITY, compact="always")
    loss = early_exit_loss if kind == "exit" else None
    train(model, text.train, steps - warm, lr, seed, loss, other_batches=warm > 0)
    made = {"train_cpu_seconds": time.process_time() - start}
    if kind == "exit":
        add_confidence_exits(model)
    model.eval()
    if kind == "router":
        made["uncalibrated"] = uncalibrated(model, text.windows(limit=rows))
    if kind in ("router", "exit"):
        lts.calibrate(model, calibration_text(text.train, rows // 8), DENSITY)
    return made | evaluated(model, kind, text, rows, seed)


def build(seed: int, n_layers: int, init: float) -> GPT:
    """A model of the study, without routers."""
    torch.manual_seed(seed)
    model = GPT(SHALLOW if n_layers == 2 else DEEP)
    return reduced_init_(model, init) if init else model


def train(model: GPT, tokens, steps: int, lr: float, seed: int, loss=None, other_batches=False):
    """The study's training: batches of 32 x 64, 100 steps of warmup, inverse square root."""
    data = Batches(tokens, 32, LENGTH, seed + 1000 * other_batches)
    options = {"schedule": "inverse-sqrt", "warmup": 100, "progress": False}
    fit(model, data, steps=steps, loss=loss, lr=lr, seed=seed, **options)


@torch.no_grad()
def uncalibrated(model: GPT, held_out: list) -> list[float]:
    """Density and loss where routers take the larger logit, which is the paper's rule."""
    shares = []
    for batch in held_out:
        model.hidden_states(batch[:, :-1])
        shares.append(lts.measured_density(model))
    return [round(sum(shares) / len(shares), 4), round(evaluate(model, held_out), 4)]


def calibration_text(tokens, n: int) -> torch.Tensor:
    """Rows of training text, spread evenly: (n, 64) int64."""
    starts = np.linspace(0, len(tokens) - LENGTH, n).astype(int)
    return torch.from_numpy(np.stack([tokens[s : s + LENGTH] for s in starts])).long()


def evaluated(model: GPT, kind: str, text, rows: int, seed: int) -> dict:
    """The losses of a trained model, and what its tokens run."""
    held_out = text.windows(limit=rows)
    torch.manual_seed(seed)  # of the coins
    made = {"loss": evaluate(model, held_out)}
    if kind == "dense":
        return made
    if kind == "router":
        made |= habits(model, held_out, text.tokenizer)
        made["example"] = example(model, text.tokenizer)
    made["by_share"] = by_share(model, kind, text, held_out, rows // 8)
    return made


@torch.no_grad()
def habits(model: GPT, held_out: list, tokenizer) -> dict:
    """Which layers tokens run, and whether hard ones run more."""
    kinds, depths, losses, layers = [], [], [], []
    names = pieces_of(tokenizer)
    for batch in held_out:
        logits = model(batch[:, :-1]).flatten(0, 1)  # (batch * length, vocab)
        losses.append(F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none"))
        depths.append(lts.layers_run(model).flatten())
        layers.append(torch.stack([b.ran.float().mean() for b in model.blocks]))
        kinds.append(names[batch[:, :-1].flatten()])
    kind, depth, loss = (torch.cat(part) for part in (kinds, depths, losses))
    mean = [depth[kind == place].mean().item() for place in range(len(PIECES))]
    return {
        "density": depth.mean().item() / len(model.blocks),
        "correlation": torch.corrcoef(torch.stack([depth, loss]))[0, 1].item(),
        "by_layer": [round(share, 4) for share in torch.stack(layers).mean(0).tolist()],
        "by_piece": [round(value, 4) for value in mean],
    }


def example(model: GPT, tokenizer) -> list[int]:
    """Which layers each token of PASSAGE runs, in binary: 5 is the first and the third."""
    with torch.no_grad():
        model(torch.tensor([tokenizer.encode(PASSAGE)]))
    return sum(block.ran[0].long() << place for place, block in enumerate(model.blocks)).tolist()


def pieces_of(tokenizer) -> torch.Tensor:
    """What each token of the vocabulary is, a place in PIECES: (vocab,) int64."""
    return torch.tensor([piece_of(tokenizer.decode([n])) for n in range(1024)])


def piece_of(text: str) -> int:
    """The place in PIECES of a token that reads `text`."""
    if not text.strip():
        return 3
    if not any(letter.isalpha() for letter in text):
        return 2
    return 0 if text[0].isspace() else 1


def by_share(model: GPT, kind: str, text, held_out: list, n: int) -> list[float]:
    """The held-out loss of one trained model at each of SHARES; n: rows to calibrate on."""
    losses, some = [], calibration_text(text.train, n)
    for share in SHARES:
        if kind == "random":
            lts.set_density(model, share)
        else:
            lts.calibrate(model, some, share, tolerance=0.01)
        losses.append(round(evaluate(model, held_out), 4))
    return losses


def decoding(seed: int, steps: int) -> dict:
    """Seconds of a decoding step: all layers, half of them, and all routed at the half's FLOPs.

    The large model is not trained: each of its routers computes its logits, and a coin decides, so
    that the density is exact. One text at a time; the three take turns, step by step.
    """
    torch.manual_seed(seed)
    half, whole = (GPTConfig(n_layers=n, **LARGE) for n in (15, 30))
    model = GPT(whole).eval()
    share = lts.matching_density(whole, LENGTH, flops_per_token(half, LENGTH))
    plain = list(model.blocks)
    routed = [lts.SkipBlock(block, lts.RandomRouter(share)).eval() for block in plain]
    for block in routed:
        block.router.register_forward_hook(costing(lts.SkipRouter(whole.dim).eval()))
    prompt = torch.randint(1000, (1, 1)).expand(-1, LENGTH)
    ways = [plain, plain[:15], routed]
    spent = clocks.decoding_seconds(model, ways, prompt, steps)
    names = ("all_seconds", "dense_seconds", "routed_seconds")
    return dict(zip(names, spent)) | {"share": share}


def costing(learned: lts.SkipRouter):
    """A hook for a coin, which computes what the learned router computes and leaves the gate."""

    def hook(coin, args, gate):
        learned(*args)

    return hook


TUNED = {
    "dense": {"init": 0.1, "lr": 1e-2},
    "router": {"init": 0.0, "lr": 1e-2, "warm": 150, "weight": 3.0},
    "random": {"init": 0.0, "lr": 2e-2},
    "exit": {"init": 0.0, "lr": 2e-2},
}
EXIT = {"kind": "exit", **TUNED["exit"]}


SEEDS, BEFORE = range(10, 18), range(5)
POINTS = [
    *grid(kind="dense", n_layers=2, **TUNED["dense"], seed=SEEDS),
    *grid(kind="router", **TUNED["router"], seed=SEEDS),
    *grid(kind="random", **TUNED["random"], seed=SEEDS),
    *grid(**EXIT, steps=FEWER, seed=SEEDS),
    *grid(kind="dense", n_layers=2, init=0.0, lr=1e-2, seed=BEFORE),
    *grid(**EXIT, steps=1000, seed=BEFORE),
    *grid(kind="dense", n_layers=4, init=0.0, lr=1e-2, seed=range(3)),
    *grid(kind="decoding", steps=24, seed=range(8)),
]
_RATES = [
    *grid(init=(0.0, 0.3, 1.0), lr=(1e-2, 2e-2), seed=100),
    *grid(init=0.0, lr=(5e-3, 4e-2), seed=100),
]
_CHANGES = (
    {},
    {"init": 1.0},
    {"lr": 2e-2},
    {"temperature": 0.5},
    {"weight": 1.0},
    {"warm": 150},
    {"init": 0.0, "warm": 150},
    {"init": 0.0, "warm": 250},
)
TUNING = [
    {"kind": "router", "init": 0.3, "lr": 1e-2, "steps": 400, "seed": 100} | change
    for change in _CHANGES
]
TUNING += [{"kind": "dense", "n_layers": 2, "steps": 400} | point for point in _RATES]
TUNING += [
    *grid(kind="random", init=(0.0, 0.3), lr=(1e-2, 2e-2), warm=(0, 150), steps=400, seed=100),
    *({"kind": "exit", "steps": 200} | point for point in _RATES),
]
_LONG = {"init": 0.0, "lr": 1e-2, "seed": 100}
_LONG_RATES = [
    _LONG | change
    for change in ({}, {"lr": 2e-2}, {"lr": 5e-3}, {"init": 0.1}, {"init": 0.1, "lr": 2e-2})
]
_DENSITY_TERMS = ({"weight": 1.0}, {}, {"weight": 10.0}, {"temperature": 0.5}, {"std": 0.1})
TUNING += [
    {"kind": "router", "warm": 150, "weight": 3.0, "steps": 1000, **_LONG} | change
    for change in _DENSITY_TERMS
]
TUNING += [{"kind": "dense", "n_layers": 2, "steps": 1000} | point for point in _LONG_RATES]
TUNING += [{"kind": k, "steps": FEWER} | point for k in ("random", "exit") for point in _LONG_RATES]
CANARY = {"seed": 200, "kind": "every", "steps": 4, "warm": 1, "rows": 16}

_ROUTER = {"kind": "router"}
_RANDOM = {"kind": "random"}
ROLES = {
    "dense": {
        "method": _ROUTER,
        "baseline": {"kind": "dense", "n_layers": 2},
        "control": _RANDOM,
    },
    # No other router that learned nothing is stored: the coins are the baseline themselves.
    "random": {"method": _ROUTER, "baseline": _RANDOM, "control": None},
    "decode-time": {
        "method": "routed_seconds",
        "baseline": "dense_seconds",
        "control": "all_seconds",
    },
}
MILD = 1.1  # what we read "mild extra cost" as: a tenth more time


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed."""
    made = {id: paired(runs, *_sides(id), "loss") for id in ("dense", "random")}
    made["decode-time"] = [
        Pair(run["seed"], run["routed_seconds"], MILD * run["dense_seconds"])
        for run in matching(runs, kind="decoding")
    ]
    return made


def _sides(id: str) -> tuple:
    return ROLES[id]["method"], ROLES[id]["baseline"]
