"""The study of MoE redundancy (2025): a text mixture learns to draw handwritten digits.

The theme's base configuration as a mixture, 8 experts, top-2, trained on four domains of text
without a balancing loss, so that text leaves some experts idle. Then digits: a digit's name in
text, and 16 tokens, patches of 2 x 2 pixels from a codebook of 64. All conditions of a seed start
from one text model and see the same images in the same order.

Tuned on another seed: the rate, three tries for low-rank updates (the largest was best) and three
for all weights; codebook, rank and blur were not tuned. Patches, not single pixels: the distances
of gray values are symmetric, so that Gromov-Wasserstein can't tell black from white. The idle half
is compared with all experts twice. First by what each updated parameter gains, since all experts
have twice as many. Then by the loss itself: whether the idle half's is above that of all experts
by no more than a margin of 0.05 nats a patch, which is less than seeds differ by.
Seen on other seeds, too: patches go to the half that text leaves idle less often than to the busy
one, and which half is updated matters little.
"""

import copy
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lablib.data import Batches
from lablib.data.mixtures import mixture
from lablib.evidence import Pair, grid
from lablib.experts import digits
from lablib.experts.moe_redundancy import (
    GrownEmbedding,
    GrownHead,
    draw,
    grow_,
    gw_start,
    least_used,
    n_new_parameters,
    text_loads,
)
from lablib.experts.switch_transformers import reduced_init_
from lablib.experts.upcycling import upcycle_
from lablib.models import GPT, GPTConfig
from lablib.training import evaluate, fit

CONFIG = GPTConfig(vocab_size=1024, dim=32, n_layers=2, n_heads=2, qk_norm=True, max_length=96)
CODES, PATCHES, EXPERTS = 64, 16, 8
BEGIN = CONFIG.vocab_size + CODES  # the token that begins an image
PATCH_IDS = range(CONFIG.vocab_size, CONFIG.vocab_size + CODES)
EVERY = 50  # steps between two points of a curve


ARMS = {  # whose experts get updates, and where new embeddings start
    "idle": ("least", "gw"),
    "random_start": ("least", "random"),
    "shuffled_start": ("least", "shuffled"),
    "all": ("all", "gw"),
    "none": ("none", "gw"),
    "full": ("full", "gw"),
}


def run(
    seed: int,
    arms: tuple = tuple(ARMS),
    steps: int = 300,
    lr: float = 3e-2,
    full_lr: float = 1e-2,
    rank: int = 4,
    text_steps: int = 500,
    drawn: int = 20,
    rows: int = 128,
) -> dict:
    """Train a mixture on text, then let copies of it learn images in several ways.

    arms: which of ARMS, each with results of its own, such as loss_idle, in nats a patch. lr: of
    low-rank updates; full_lr: where all weights are trained, text's too. drawn: how many of each
    digit are drawn and given to a classifier. rows: how many windows a text loss is taken on.
    """
    held_out = mixture().windows(limit=rows)
    reader = text_model(seed, text_steps)
    loads = text_loads(reader, held_out)
    made = {"text_before": evaluate(reader, held_out, text_loss), "chance": 0.1}
    made["idle_load"] = float(sum(load.sort().values[: EXPERTS // 2].sum() for load in loads) / 2)
    for arm in arms:
        adapted, start = ARMS[arm]
        model = copy.deepcopy(reader)
        torch.manual_seed(10_000 + seed)
        embed(model, start, adapted, loads, rank)
        made[f"parameters_{arm}"] = n_new_parameters(model)
        curve = learn(model, steps, full_lr if adapted == "full" else lr, seed)
        made |= {f"loss_{arm}": curve[-1], f"curve_{arm}": [round(loss, 4) for loss in curve]}
        made[f"text_{arm}"] = evaluate(model, held_out, text_loss)
        if drawn and arm in ("idle", "full"):
            made[f"recognized_{arm}"] = recognized(model, images()[2], drawn)
    return made | gains(made)


def learn(model: GPT, steps: int, lr: float, seed: int) -> list[float]:
    """Train on images; the held-out loss on the way, in nats a patch."""
    train, test, _ = images()
    history = fit(
        model,
        image_batches(train, steps, seed),
        steps=steps,
        lr=lr,
        warmup=min(20, steps // 2),
        schedule="inverse-sqrt",
        seed=seed,
        loss=image_loss,
        held_out=[test],
        held_out_every=EVERY,
        progress=False,
    )
    return [loss for _, loss in history.held_out]


def gains(made: dict) -> dict:
    """What updated experts gain over none, in millinats a patch for each 1,000 parameters."""
    gain = {}
    for arm in ("idle", "all"):
        if {f"loss_{arm}", "loss_none"} <= set(made):
            more = made[f"parameters_{arm}"] - made["parameters_none"]
            gain[f"gain_{arm}"] = 1e6 * (made["loss_none"] - made[f"loss_{arm}"]) / more
    return gain


@lru_cache(maxsize=1)
def text_model(seed: int, steps: int) -> GPT:
    """The text mixture that all conditions of a seed start from; copy it before training on."""
    torch.manual_seed(seed)
    model = upcycle_(GPT(CONFIG), EXPERTS, 1, 2, "after", balance=0.0)
    reduced_init_(model, 0.1)
    options = {"schedule": "inverse-sqrt", "warmup": min(100, steps // 2), "progress": False}
    fit(model, Batches(mixture().train, 32, 64, seed), steps=steps, lr=1e-2, seed=seed, **options)
    return model


def embed(model: GPT, start: str, adapted: str, loads: list[Tensor], rank: int) -> None:
    """Give the model rows for patches and for the begin of an image, and what is to be trained.

    adapted: which half of each layer's experts gets updates, the "least" or "most" used by text;
    "all"; "none"; or "full", all weights of the model. start: of new rows, "gw" or "random", or
    "shuffled", which gives each patch another's start.
    """
    codes = torch.from_numpy(images()[2])
    words = model.embedding.weight.detach()
    rows = words.std() * torch.randn(CODES + 1, CONFIG.dim)
    if start != "random":
        rows[:CODES] = gw_start(codes, words[frequent(128)])
    if start == "shuffled":
        rows[:CODES] = rows[torch.randperm(CODES)]
    if adapted == "full":
        model.embedding = GrownEmbedding(model.embedding, rows)
        model.head = GrownHead(model.embedding)
        model.requires_grad_(True)
        return
    half = EXPERTS // 2
    which = {
        "least": [least_used(load, half) for load in loads],
        "most": [least_used(-load, half) for load in loads],
        "all": [torch.arange(EXPERTS)] * len(loads),
        "none": [torch.arange(0)] * len(loads),
    }
    grow_(model, rows, which[adapted], rank)


@lru_cache(maxsize=1)
def frequent(count: int) -> Tensor:
    """The ids that text uses most: (count,) int64."""
    seen = np.bincount(mixture().train, minlength=CONFIG.vocab_size)
    return torch.from_numpy(seen.argsort(kind="stable")[::-1][:count].copy())


@lru_cache(maxsize=1)
def images() -> tuple[Tensor, Tensor, np.ndarray]:
    """Digits as tokens, name first: for training and held out, (n, prompt + 17); the codebook."""
    pictures, labels = digits.digits()
    order = np.random.default_rng(0).permutation(len(pictures))
    codes = digits.codebook(pictures[order[:1400]], CODES)
    ids = digits.nearest(digits.patches(pictures[order]), codes) + CONFIG.vocab_size
    rows = torch.cat([prompts()[labels[order]], torch.from_numpy(ids)], 1)
    return rows[:1400], rows[1400:], codes


@lru_cache(maxsize=1)
def prompts() -> Tensor:
    """Each digit's name in text and the begin of an image: (10, prompt), padded by new lines."""
    tokenizer = mixture().tokenizer
    names = [tokenizer.encode(f" {name}") for name in digits.NAMES]
    (line,) = tokenizer.encode("\n")
    width = max(map(len, names))
    return torch.tensor([[line] * (width - len(name)) + [*name, BEGIN] for name in names])


def image_batches(rows: Tensor, steps: int, seed: int, size: int = 64) -> list[Tensor]:
    """Batches of images, drawn without repetition within an epoch."""
    random = torch.Generator().manual_seed(seed)
    epochs = 1 + steps * size // len(rows)
    order = torch.cat([torch.randperm(len(rows), generator=random) for _ in range(epochs)])
    return [rows[order[at * size : (at + 1) * size]] for at in range(steps)]


def image_loss(model: GPT, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of patches, given the name and the patches before, in nats."""
    logits = model(tokens[:, :-1])[:, -PATCHES:]  # (rows, 16, vocab + new)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, -PATCHES:].flatten())


def text_loss(model: GPT, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of text tokens among text tokens, in nats."""
    logits = model(tokens[:, :-1])[..., : CONFIG.vocab_size]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def recognized(model: GPT, codes: np.ndarray, drawn: int) -> float:
    """Share of drawn digits in which a classifier trained on real ones sees what was asked for."""
    pictures, labels = digits.digits()
    model.eval()
    asked = torch.arange(10).repeat_interleave(drawn)
    ids = draw(model, prompts()[asked], PATCH_IDS, PATCHES) - CONFIG.vocab_size
    seen = digits.recognizer(pictures, labels)(digits.pictures(codes[ids.numpy()]))
    return float((seen == asked.numpy()).mean())


STEPS, SEEDS = 300, range(5)
SMALL = {"arms": ["idle"], "steps": 100, "lr": 6e-2, "text_steps": 100}  # short: the lab repeats it
POINTS = [
    *grid(steps=STEPS, lr=6e-2, full_lr=1e-2, seed=SEEDS),
    *[SMALL | {"seed": seed} for seed in (0, 1)],
]
TUNING = [
    {
        "arms": ["idle", "random_start", "full"],
        "steps": STEPS,
        "lr": lr,
        "full_lr": full_lr,
        "seed": 100,
    }
    for lr, full_lr in ((1e-2, 3e-3), (3e-2, 1e-2), (6e-2, 2e-2))
]
CANARY = {"steps": 3, "text_steps": 3, "drawn": 0, "rows": 16, "seed": 200}
CANARY |= {"arms": ["idle", "none", "full"]}
# None: only two arms draw, and chance is the control; a gain is one over no update already.
ROLES = {
    "recognized": {"method": "recognized_idle", "baseline": "chance", "control": None},
    "start": {
        "method": "loss_idle",
        "baseline": "loss_random_start",
        "control": "loss_shuffled_start",
    },
    "efficiency": {"method": "gain_idle", "baseline": "gain_all", "control": None},
    "full": {"method": "loss_full", "baseline": "loss_idle", "control": "loss_none"},
    "margin": {"method": "loss_idle", "baseline": "loss_all", "control": "loss_none"},
}
MARGIN = 0.05  # nats a patch


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed, from the runs with all arms."""
    whole = [run for run in runs if "gain_all" in run]
    made = {
        id: [Pair(run["seed"], run[role["method"]], run[role["baseline"]]) for run in whole]
        for id, role in ROLES.items()
    }
    above = [Pair(seed, idle - every, MARGIN) for seed, idle, every in made["margin"]]
    return made | {"margin": above}
