"""The study of ToMoE (2025): experts found by masks against static pruning, no weight changed.

The model is the house's `tiny-4m`, on the text that it was trained on and judged on the documents
held out of it; `tiny-1m` beside it, which a lab can convert while one waits. The paper's losses,
their weights and its optimizer; what differs from seed to seed is the hypernetwork, the routers,
the noise and the order of the text.

Tuned on another seed, for each model: the rate, with as many tries each for the experts, for one
learned mask and for random masks. The rest was settled on `tiny-1m`. Static pruning by activation
norm ranks the units of all layers in one list: a list a layer lost several times as much there,
since the middle layer needs few units and the first one nearly all. By weight norms it is the other
way round, so each layer keeps its share. Seen there, too: with half of the units on, eight experts
were no better than one learned mask; with 30 % they were.

On `tiny-1m` experts were clearly below static pruning by activation norm at half of the units. On
`tiny-4m` they are below it in all five draws, by so different amounts that the interval holds zero:
one draw of 32 windows ranks the units much worse than the others.

Two more shares, 70 and 20 %, have one seed, and no claim is judged on them.

SmolLM2: six of its thirty layers, 100 steps of one window, 5 minutes a run, at the rates of
`tiny-4m`. One run a kind, shown, and judged by no claim.
"""

from functools import lru_cache

import torch

from lablib.data import Batches, sequential
from lablib.evidence import Pair, grid, paired
from lablib.experts import tomoe
from lablib.models import anatomy, pretrained
from lablib.training import adamw, evaluate, fit
from lablib.training.checkpoints import corpora

LENGTH = 128
TUNED = {"tomoe": 1e-2, "one": 3e-3, "random": 1e-2}  # the rate
TUNED_4M = {"tomoe": 1e-2, "one": 3e-3, "random": 1e-2}
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
    every: int = 1,
) -> dict:
    """Cut a trained model's feed-forward layers to a share; its held-out loss, nats a token.

    kind: "tomoe"; "values", which lets each token keep half of the dimensions of attention's values
        as well; "random", experts of random units with a trained router, the control; "one", a
        single learned mask for all tokens; "magnitude" and "activation", static pruning that
        needs no training.
    rows: held-out windows of 128 tokens.
    every: 1 cuts all layers, 2 the first, third, and so on.
    """
    train, held_out = texts(model)
    torch.manual_seed(seed)
    n_experts = 1 if kind in ("one", "magnitude", "activation") else 8
    dense = fresh(model)
    options = {"learn_masks": kind != "random"}
    options |= {"values": dense.config.head_dim // 2} if kind == "values" else {}
    if every > 1:
        options["blocks"] = range(0, len(anatomy.blocks(dense)), every)
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
SHARES = (0.5, 0.3)
SEEN = (0.7, 0.2)  # shares to look at, on one seed
STATIC = ("activation", "magnitude")
LARGE = {"model": "smollm2-135m-instruct", "every": 5, "share": 0.5, "steps": 100}
LARGE |= {"batch": 1, "rows": 16}
POINTS = [
    *[point for kind, lr in TUNED.items()
      for point in grid(kind=kind, share=SHARES, lr=lr, seed=SEEDS)],
    *grid(kind=STATIC, share=SHARES, seed=SEEDS),
    *[point for kind, lr in TUNED_4M.items()
      for point in grid(kind=kind, share=SHARES, lr=lr, model="tiny-4m", seed=SEEDS)],
    *grid(kind=STATIC, share=SHARES, model="tiny-4m", seed=SEEDS),
    *[point for kind, lr in TUNED_4M.items()
      for point in grid(kind=kind, share=SEEN, lr=lr, model="tiny-4m", seed=0)],
    *grid(kind=STATIC, share=SEEN, model="tiny-4m", seed=0),
    *[LARGE | {"kind": kind, "lr": TUNED_4M[kind], "seed": 0} for kind in ("tomoe", "random")],
    LARGE | {"kind": "activation", "seed": 0},
]  # fmt: skip
_TRIED = {"kind": ("tomoe", "one", "random"), "share": 0.5, "lr": (1e-3, 3e-3, 1e-2, 2e-2)}
TUNING = [*grid(**_TRIED, seed=100), *grid(**_TRIED, seed=100, model="tiny-4m")]
CANARY = {"seed": 200, "kind": "tomoe", "steps": 3, "lr": 3e-3, "rows": 4, "batch": 2}


def kind_of(kind: str, share: float = 0.5) -> dict:
    """What tells the runs of a kind from all others."""
    return {"kind": kind, "share": share, "model": "tiny-4m"}


_HALF = {"share": 0.5, "model": "tiny-4m"}
# No control is stored for the gaps, leads of all of a share's runs; the random masks are one.
_GAP = {"method": _HALF | {"share": 0.3}, "baseline": _HALF, "control": None}
ROLES = {
    "routing": {
        "method": kind_of("tomoe", 0.3),
        "baseline": kind_of("one", 0.3),
        "control": kind_of("random", 0.3),
    },
    "static": {
        "method": kind_of("tomoe"),
        "baseline": kind_of("activation"),
        "control": kind_of("random"),
    },
    "random": {"method": kind_of("tomoe"), "baseline": kind_of("random"), "control": None},
    "gap": _GAP,
    "gap-random": _GAP,
    # Random masks, trained about, may be ahead of this rival, too: the lab says so.
    "magnitude": {"method": kind_of("tomoe"), "baseline": kind_of("magnitude"), "control": None},
    "routing-half": {
        "method": kind_of("tomoe"),
        "baseline": kind_of("one"),
        "control": kind_of("random"),
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
