"""The study of upcycling (2024): a trained dense model goes on, as it is or as experts made of it.

The theme's base configuration: two layers of dim 32 over the mixture of four domains. The dense
model is trained for 600 steps on a cosine that ends at a tenth of its peak, as the paper's are
decayed; then every condition trains on from the same weights, on the same batches, with a fresh
optimizer and its own cosine. A run makes its dense model first; the process keeps it for the next
run of that seed. The control's routers see noise in the place of tokens.

Each seed has a dense model of its own, so that intervals are over starts, too. The price is a start
that is far from the end of its training, which flatters the dense model that goes on. So the main
conditions are run again from the house's `tiny-1m`, trained to its end, on text that it does not
know: Django's documentation, and files of Python's source that its training left out. There is one
`tiny-1m`; seeds differ there in routers and the order of the text.

At equal FLOPs the dense model gets more steps, as many as its cheaper tokens pay for.

Tuned, on another seed, for the dense model and for each kind of experts alike: the peak rate of the
second training.
"""

import copy
import random
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from lablib.data import Batches, load, sequential
from lablib.data.mixtures import mixture
from lablib.evidence import grid, paired
from lablib.experts.moe import moe_layers
from lablib.experts.switch_transformers import reduced_init_
from lablib.experts.upcycling import ROLES as MATRICES
from lablib.experts.upcycling import active_flops, dense_weights, similarity, upcycle_
from lablib.models import GPT, GPTConfig, pretrained
from lablib.training import evaluate, fit
from lablib.training.checkpoints import RECIPES, corpora

EVERY = 50  # steps between two points of a curve
CONFIG = GPTConfig(vocab_size=1024, dim=32, n_layers=2, n_heads=2, qk_norm=True, max_length=64)


def run(
    seed: int,
    expansion: int = 8,
    granularity: int = 1,
    top_k: int = 2,
    softmax: str = "before",
    virtual: bool = True,
    scaled: bool = True,
    blind: bool = False,
    steps: int = 300,
    lr: float = 1e-2,
    dense_steps: int = 600,
    rows: int = 256,
    start: str = "",
) -> dict:
    """Train a dense model, upcycle it (expansion 1: leave it dense), and train it on.

    blind: the control, whose routers see noise in the place of tokens.
    lr: peak of the second training.
    rows: how many held-out windows of 64 tokens a loss is taken on.
    start: a checkpoint to begin with in the place of a model of this seed's own, on text that it
        has not read, with half of the batch.
    Returns losses in nats a token: of the dense model, of the newborn one, and its curve.
    """
    if start:
        model = pretrained(start)[0]
        tokens, held_out, batch = *unread(start, rows), 16
    else:
        text = mixture()
        tokens, held_out, batch = text.train, text.windows(limit=rows), 32
        model = copy.deepcopy(trained(seed, dense_steps))
    made = {"dense_loss": evaluate(model, held_out)}
    origin = [dense_weights(model, place) for place in range(model.config.n_layers)]
    torch.manual_seed(10_000 + seed)
    if expansion > 1:
        matrices = MATRICES if scaled else ()
        upcycle_(model, expansion, granularity, top_k, softmax, virtual=virtual, scaled=matrices)
    for layer in moe_layers(model).values() if blind else ():
        layer.router.noisy = torch.randn_like
    made["newborn_loss"] = evaluate(model, held_out)
    data = Batches(tokens, batch, 64, 10_000 + seed)
    history = fit(
        model,
        data,
        steps=steps,
        lr=lr,
        schedule="cosine",
        warmup=min(20, steps // 2),
        seed=seed,
        held_out=held_out,
        held_out_every=EVERY,
        progress=False,
    )
    made["loss"] = history.held_out[-1][1]
    made["curve"] = [round(loss, 4) for _, loss in history.held_out]
    if expansion > 1:
        layers = moe_layers(model).values()
        near = [similarity(layer, weights) for layer, weights in zip(layers, origin)]
        made["similarity"] = sum(near) / len(near)
    return made


@lru_cache(maxsize=1)
def trained(seed: int, steps: int) -> GPT:
    """The dense model that all conditions of a seed start from; copy it before training on."""
    torch.manual_seed(seed)
    model = reduced_init_(GPT(CONFIG), 0.1)
    data = Batches(mixture().train, 32, 64, seed)
    fit(
        model,
        data,
        steps=steps,
        lr=1e-2,
        schedule="cosine",
        warmup=min(100, steps // 2),
        seed=seed,
        progress=False,
    )
    return model


@lru_cache(maxsize=1)
def unread(start: str, rows: int) -> tuple[np.ndarray, list]:
    """Ids of text that a checkpoint's training left out, and held-out windows of 64 tokens of it.

    Half is Django's documentation, half Python source; every tenth document of each is held out.
    """
    read = {document.name for part in corpora() for document in part["python-source"]}
    left = [document for document in load("python-source") if document.name not in read]
    _, tokenizer = pretrained(start)
    train, other = [], []
    for documents in (load("django-docs"), left):
        shuffled = random.Random(0).sample(documents, len(documents))[:300]
        ids = tokenizer([document.text[:20_000] for document in shuffled])["input_ids"]
        train += [token for at, row in enumerate(ids) if at % 10 for token in row]
        other += [token for row in ids[::10] for token in row[:1000]]
    (table,) = sequential(np.array(other), len(other), 64)
    places = torch.linspace(0, len(table) - 1, rows).round().long()
    return np.array(train), list(table[places].split(32))


def equal_steps(
    steps: int, expansion: int, granularity: int, top_k: int, config: GPTConfig = CONFIG
) -> int:
    """Steps of the dense model that cost as many FLOPs as so many of the upcycled one."""
    cost = active_flops(config, 64, expansion, granularity, top_k)
    return round(steps * cost / active_flops(config, 64))


def learns_on(
    model: GPT,
    tokenizer: Callable,
    expansion: int = 4,
    steps: int = 200,
    lr: float = 1e-4,
    documents: int = 400,
    length: int = 256,
) -> list[tuple[int, float]]:
    """Train a copy of a pretrained model on, as it is (expansion 1) or upcycled; best on a GPU.

    Each token asks two experts, by a softmax after the choice, so that both begin with the model's
    own function. The text is Django's documentation, every tenth document held out.
    tokenizer: as `pretrained` gives it. steps: of 8 windows of `length` tokens.
    Returns the held-out losses, (steps done, nats a token), the one before the first step included.
    """
    torch.manual_seed(0)
    tokens, held_out = django(tokenizer, documents, length)
    model = copy.deepcopy(model).to("cuda" if torch.cuda.is_available() else "cpu")
    if expansion > 1:
        upcycle_(model, expansion, 1, 2, "after")
    before = evaluate(model, held_out)
    options = {"held_out": held_out, "held_out_every": max(1, steps // 4), "compile": False}
    data = Batches(tokens, 8, length, 0)
    history = fit(model, data, steps=steps, lr=lr, progress=False, **options)
    return [(0, before), *history.held_out]


def django(tokenizer: Callable, documents: int, length: int) -> tuple[np.ndarray, list]:
    """Ids of nine tenths of some documents, end to end, and 16 windows of the others."""
    texts = [document.text[:20_000] for document in load("django-docs")[:documents]]
    rows = tokenizer(texts)["input_ids"]
    train = np.concatenate([row for i, row in enumerate(rows) if i % 10])
    other = np.concatenate(rows[::10])
    (table,) = sequential(other, len(other), length)
    places = torch.linspace(0, len(table) - 1, 16).round().long()
    return train, list(table[places].split(4))


STEPS, SEEDS = 300, range(5)
DENSE = {"expansion": 1, "lr": 5e-3}
TOP2 = {"expansion": 8, "granularity": 1, "top_k": 2, "lr": 1e-2, "steps": STEPS}
TOP1 = {"expansion": 8, "granularity": 1, "top_k": 1, "steps": STEPS}
FINE = {"expansion": 8, "granularity": 4, "top_k": 4, "lr": 2e-2, "steps": STEPS}
ARMS = {
    "dense": DENSE | {"steps": STEPS},
    "dense, longer": DENSE | {"steps": equal_steps(STEPS, 8, 1, 2)},
    "top-2": TOP2 | {"softmax": "before", "blind": False},
    "top-2, blind": TOP2 | {"softmax": "before", "blind": True},
    "top-2, softmax after": TOP2 | {"softmax": "after"},
    "top-1": TOP1 | {"scaled": True, "lr": 5e-3},
    "top-1, not scaled": TOP1 | {"scaled": False, "lr": 5e-3},
    "quarters": FINE | {"virtual": True},
    "quarters, naive": FINE | {"virtual": False},
}
TINY = {"start": "tiny-1m", "steps": STEPS, "rows": 128}
TINY_LR = {"dense": 4e-3, "before": 4e-3, "after": 2e-3, "top-1": 2e-3, "quarters": 4e-3}
_FROM_TINY = TOP2 | TINY | {"lr": TINY_LR["before"]}
_DENSE_STEPS = equal_steps(STEPS, 8, 1, 2, RECIPES["tiny-1m"].config)
FROM_TINY = {
    "dense": TINY | {"expansion": 1, "lr": TINY_LR["dense"]},
    "dense, longer": TINY | {"expansion": 1, "lr": TINY_LR["dense"], "steps": _DENSE_STEPS},
    "top-2": _FROM_TINY | {"softmax": "before", "blind": False},
    "top-2, blind": _FROM_TINY | {"softmax": "before", "blind": True},
    "top-2, softmax after": _FROM_TINY | {"softmax": "after", "lr": TINY_LR["after"]},
    "top-1": TOP1 | TINY | {"lr": TINY_LR["top-1"]},
    "quarters": FINE | TINY | {"lr": TINY_LR["quarters"]},
}
POINTS = [{**arm, "seed": seed} for seed in SEEDS for arm in ARMS.values()]
POINTS += [{**arm, "seed": seed} for seed in SEEDS for arm in FROM_TINY.values()]
_TRIED = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
_BORN = ({"expansion": 1}, TOP2 | {"softmax": "before"}, TOP2 | {"softmax": "after"}, TOP1, FINE)
TUNING = [
    *[{k: v for k, v in (kind | TINY).items() if k != "steps"} | {"lr": lr, "seed": 100}
      for kind in _BORN for lr in _TRIED],
    *grid(expansion=1, lr=(2.5e-3, 5e-3, 1e-2, 2e-2), seed=100),
    *grid(expansion=8, granularity=1, top_k=2, softmax=("before", "after"),
          lr=(5e-3, 1e-2, 2e-2, 4e-2), seed=100),
    *grid(expansion=8, granularity=1, top_k=1, scaled=(True, False),
          lr=(2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2), seed=100),
    *grid(expansion=8, granularity=4, top_k=4, virtual=True,
          lr=(5e-3, 1e-2, 2e-2, 4e-2), seed=100),
]  # fmt: skip
CANARY = {"expansion": 4, "granularity": 2, "top_k": 2, "steps": 3, "dense_steps": 3}
CANARY |= {"rows": 16, "seed": 200}


def kinds(arms: dict) -> dict:
    """What tells each arm's runs from all others: all but the rate."""
    bare = {name: {k: v for k, v in arm.items() if k != "lr"} for name, arm in arms.items()}
    return {name: {"start": None} | arm for name, arm in bare.items()}


def case(kinds: dict, method: str, baseline: str, control: str | None = None) -> dict:
    """A claim's roles, by the names of arms; None where the baseline is the control."""
    return {
        "method": kinds[method],
        "baseline": kinds[baseline],
        "control": kinds[control] if control else None,
    }


KINDS, TINY_KINDS = kinds(ARMS), kinds(FROM_TINY)
ROLES = {
    "tokens": case(KINDS, "top-2", "dense", "top-2, blind"),
    "flops": case(KINDS, "top-2", "dense, longer", "top-2, blind"),
    "order": case(KINDS, "top-2", "top-2, softmax after"),
    "granularity": case(KINDS, "quarters", "top-1", "quarters, naive"),
    "scaling": case(KINDS, "top-1", "top-1, not scaled"),
    "virtual-groups": case(KINDS, "quarters", "quarters, naive"),
    "tokens-tiny": case(TINY_KINDS, "top-2", "dense", "top-2, blind"),
    "flops-tiny": case(TINY_KINDS, "top-2", "dense, longer", "top-2, blind"),
    "order-tiny": case(TINY_KINDS, "top-2", "top-2, softmax after"),
    "granularity-tiny": case(TINY_KINDS, "quarters", "top-1"),
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair of final losses a seed."""
    return {id: paired(runs, r["method"], r["baseline"], "loss") for id, r in ROLES.items()}
