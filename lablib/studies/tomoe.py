"""The study of ToMoE (2025): experts found by masks against static pruning, no weight changed.

The model is the house's `tiny-1m`, on the text that it was trained on and judged on the documents
held out of it. The paper's losses, their weights and its optimizer; what differs from seed to seed
is the hypernetwork, the routers, the noise and the order of the text. Not `tiny-4m`: a step on it
takes more than twice as long, and a lab that repeats a run has to wait for it.

Tuned on another seed: the rate, with three tries each for the experts, for one learned mask and for
random masks. Static pruning by activation norm ranks the units of all layers in one list: a list a
layer lost several times as much there, since the middle layer needs few units and the first one
nearly all. By weight norms it is the other way round, so each layer keeps its share. Seen on that
seed, too: with half of the units on, eight experts were no better than one learned mask; with 30 %
they were. Twice the rate did not help.
"""

from functools import lru_cache

import torch

from lablib.data import Batches, sequential
from lablib.evidence import Pair, grid, paired
from lablib.experts import tomoe
from lablib.models import pretrained
from lablib.training import adamw, evaluate, fit
from lablib.training.checkpoints import corpora

LENGTH = 128
TUNED = {"tomoe": 1e-2, "one": 3e-3, "random": 1e-2}  # the rate
SAMPLE = """To be, or not to be, that is the question: whether it is nobler in the mind to suffer.
def sort(values, reverse=False): return sorted(values, reverse=reverse)
In the beginning God created the heaven and the earth. The price of copper fell by 3 % on Monday,
and analysts expect that it will fall again before the end of the year."""


def run(
    seed: int,
    kind: str = "tomoe",
    share: float = 0.5,
    steps: int = 150,
    lr: float = 1e-2,
    model: str = "tiny-1m",
    rows: int = 96,
    batch: int = 8,
) -> dict:
    """Cut a trained model's feed-forward layers to a share; its held-out loss, nats a token.

    kind: "tomoe"; "values", which lets each token keep half of the dimensions of attention's values
        as well; "random", experts of random units with a trained router, the control; "one", a
        single learned mask for all tokens; "magnitude" and "activation", static pruning that
        needs no training.
    rows: held-out windows of 128 tokens.
    """
    train, held_out = texts(model)
    torch.manual_seed(seed)
    n_experts = 1 if kind in ("one", "magnitude", "activation") else 8
    dense = fresh(model)
    options = {"learn_masks": kind != "random"}
    options |= {"values": dense.config.head_dim // 2} if kind == "values" else {}
    moe = tomoe.ToMoE(dense, n_experts, share, **options)
    windows = some(held_out, rows)
    whole = loss_of(moe, windows, dense=True)
    if kind == "magnitude":
        tomoe.prune_(moe, [tomoe.by_magnitude(layer) for layer in moe.layers])
    elif kind == "activation":
        calibration = next(iter(batches(train, 32, seed)))
        tomoe.prune_(moe, tomoe.by_activation(moe, calibration), together=True)
    else:
        learn(moe, train, steps, lr, seed, batch)
    return {"loss": loss_of(moe.decide(), windows), "dense": whole} | described(moe, windows)


def learn(moe: tomoe.ToMoE, tokens, steps: int, lr: float, seed: int, batch: int = 8) -> None:
    """The paper's optimizer, AdamW with a weight decay of 0.05, at a rate of our own."""
    optimizer = adamw(lr=lr, weight_decay=0.05)
    options = {"loss": tomoe.tomoe_loss, "optimizer": optimizer, "seed": seed, "progress": False}
    fit(moe, batches(tokens, batch, seed), steps=steps, **options)


def batches(tokens, rows: int, seed: int) -> Batches:
    """Windows of the study's length."""
    return Batches(tokens, rows, LENGTH, seed)


def loss_of(moe: tomoe.ToMoE, windows: list, dense: bool = False) -> float:
    """Mean held-out loss, through the experts or through the dense model."""
    if not dense:
        return evaluate(moe, windows)
    moe.set_masks(None)
    return evaluate(moe.model, windows)


def described(moe: tomoe.ToMoE, windows: list) -> dict:
    """How many parameters are active and in use, and how evenly experts are asked."""
    with torch.no_grad():
        moe(windows[0][:, :-1])
    masks = [layer.masks for layer in moe.layers]
    load = torch.stack([layer.chosen.flatten(0, -2).mean(0) for layer in moe.layers])
    return {
        "active": float(tomoe.active_share(masks)),
        "union": float(torch.stack([tomoe.union(mask) for mask in masks]).mean()),
        "busiest": load.max(1).values.mean().item(),
        "widths": [int(mask[0].sum()) for mask in masks],
    }


@lru_cache(maxsize=2)
def texts(model: str) -> tuple:
    """Token ids of what the checkpoint was trained on, a part of it, and of what was held out."""
    _, tokenizer = pretrained(model)
    parts = []
    for documents in corpora():
        parts.append([document for group in documents.values() for document in group[:12]])
    return tuple(torch.as_tensor(ids(part, tokenizer)) for part in parts)


def ids(documents: list, tokenizer) -> list[int]:
    """Ids of documents, end to end, at most 80,000 characters of each."""
    found = tokenizer([document.text[:80_000] for document in documents])["input_ids"]
    return [token for row in found for token in row]


def fresh(model: str):
    """The checkpoint as it is stored."""
    return pretrained(model)[0]


def some(tokens, rows: int) -> list:
    """Held-out windows, spread evenly."""
    (table,) = sequential(tokens, len(tokens), LENGTH)
    places = torch.linspace(0, len(table) - 1, rows).round().long()
    return list(table[places].split(16))


SEEDS = range(5)
POINTS = [
    *grid(kind="tomoe", share=(0.5, 0.3), lr=TUNED["tomoe"], seed=SEEDS),
    *grid(kind="one", share=(0.5, 0.3), lr=TUNED["one"], seed=SEEDS),
    *grid(kind="random", share=(0.5, 0.3), lr=TUNED["random"], seed=SEEDS),
    *grid(kind=("activation", "magnitude"), share=(0.5, 0.3), seed=SEEDS),
]
TUNING = [*grid(kind=("tomoe", "one", "random"), share=0.5, lr=(1e-3, 3e-3, 1e-2, 2e-2), seed=100)]
CANARY = {"seed": 200, "kind": "tomoe", "steps": 3, "lr": 3e-3, "rows": 4, "batch": 2}

_HALF, _LESS = {"kind": "tomoe", "share": 0.5}, {"kind": "tomoe", "share": 0.3}
_STATIC = {"kind": "activation", "share": 0.5}
_RANDOM, _RANDOM_LESS = {"kind": "random", "share": 0.5}, {"kind": "random", "share": 0.3}
# No control is stored for the gaps, leads of all of a share's runs; the random masks are one.
_GAP = {"method": {"share": 0.3}, "baseline": {"share": 0.5}, "control": None}
ROLES = {
    "routing": {
        "method": _LESS,
        "baseline": {"kind": "one", "share": 0.3},
        "control": _RANDOM_LESS,
    },
    "static": {"method": _HALF, "baseline": _STATIC, "control": _RANDOM},
    "random": {"method": _HALF, "baseline": _RANDOM, "control": None},
    "gap": _GAP,
    "gap-random": _GAP,
    # Random masks, trained about, are ahead of this rival, too: the lab says so.
    "magnitude": {
        "method": _HALF,
        "baseline": {"kind": "magnitude", "share": 0.5},
        "control": None,
    },
    "routing-half": {
        "method": _HALF,
        "baseline": {"kind": "one", "share": 0.5},
        "control": _RANDOM,
    },
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed."""
    rivals = {"gap": "activation", "gap-random": "random"}
    ids = [id for id in ROLES if id not in rivals]
    made = {id: paired(runs, ROLES[id]["method"], ROLES[id]["baseline"], "loss") for id in ids}
    for id, rival in rivals.items():
        small, large = (leads(runs, ROLES[id][side], rival) for side in ("method", "baseline"))
        made[id] = [Pair(seed, small[seed], large[seed]) for seed in sorted(small)]
    return made


def leads(runs: list, share: dict, rival: str) -> dict[int, float]:
    """By how much a rival's loss is above the experts', seed by seed."""
    pairs = paired(runs, {"kind": "tomoe"} | share, {"kind": rival} | share, "loss")
    return {pair.seed: pair.baseline - pair.method for pair in pairs}
