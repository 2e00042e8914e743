"""The study of LayerNorm tuning (2023): which part of a decoder to tune, so that it reads images.

A seed draws an encoder, the scans of scikit-learn's digits to train on, a connector and the order
of all rows. Stage one trains the connector alone, on captions of the first five digits; every way
of stage two starts there, sees the same rows in the same order, and is judged on all other scans.

Tuned on another seed: the rate of each way in each model, as many tries for LoRA as for the norms,
until the best lay inside its grid. LoRA at queries and values, with rank one, is the one nearest to
the norms from above in numbers that train; LoRA at the feed-forward layers' outputs is as near, and
stands beside it for the reader to see that the place decides. The paper's two other ways are
attention and feed-forward layers with connector, embedding and head.

All claims but one are judged in `tiny-4m`. The study was made in `tiny-1m` first, where all ways
have runs, too; there, beside connector and words, gains and the matrices of queries and values
differed so little that the sign was open. Norms, LoRA at queries and values, and all weights were
known in `tiny-4m` when the others were planned there. Norms on questions alone and on captions
alone take the rate of the others, and have as many tokens of answers to learn from; captions alone
have met neither of the two prompts that all are judged on.

Tried and left: a third kind of text, the digit that comes after the one shown; in as many steps the
norms learned it badly, and so did LoRA. Questions alone, from which pilots learned fastest: there,
too, the norms were far ahead of LoRA. An encoder of 2 x 2 patches beside the whole image gave much
the same.
"""

import copy
from functools import lru_cache

import numpy as np
import torch

from lablib.compression.recover import recover
from lablib.evidence.studies import Pair, matching, paired
from lablib.experts.digits import digits
from lablib.models import pretrained
from lablib.peft import layernorm_tuning as ln
from lablib.peft.measure import account

SEEN_FIRST = 5  # stage one shows zeros to fours
FIRST, FIRST_RATE = 150, 1e-2  # of stage one
STEPS, BATCH = 200, 16
TRAIN = 1200  # scans
RANK = 8  # of LoRA on all projections
VARIANCE = 8  # batches


def run(
    way: str,
    seed: int,
    rate: float = 0.0,
    rank: int = 1,
    kinds: str = "all",
    model: str = "tiny-1m",
    steps: int = STEPS,
    first: int = FIRST,
    held_out: int = 597,
) -> dict:
    """One point: what a way of stage two reaches on scans that it has not seen.

    way: one of `layernorm_tuning.WAYS`, "none", the model as stage one left it, or "every": those
    of EVERY in turn, each at its tuned rate, with keys such as "norms loss". kinds: of text to
    train on: "all", or "question" alone. Both are judged on all kinds.
    Returns loss (nats a token of answers), exact, named (shares) and these of each kind, training
    (how many numbers), bytes of a step by account, similarity of neighboring blocks, variance of
    the gains' gradients, moved (how far each norm's gains went, root mean square) and the losses of
    training, five means.
    """
    if way == "every":
        sizes = {"seed": seed, "model": model, "steps": steps, "first": first, "held_out": held_out}
        return {
            f"{name} {key}": value
            for name, part in EVERY.items()
            for key, value in run(**part, **sizes).items()
            if key in KEPT or name == "norms"
        }
    learner = copy.deepcopy(aligned(model, seed, first))
    train, test = drawn(model, seed, kinds, held_out)
    names, losses = [], [0.0]
    before = {name: gain.clone() for name, gain in ln.gains(learner.decoder).items()}
    if way != "none":
        torch.manual_seed(seed)
        names = ln.open_(learner, way, rank)
        losses = learned(learner, train, names, rate, steps, seed)
    told = scored(learner, test) | {"training": count(learner, names)}
    told |= analyzed(learner, names, train, test, seed)
    after = ln.gains(learner.decoder).values()
    moved = [(a - b).square().mean().sqrt().item() for a, b in zip(after, before.values())]
    curve = [float(np.mean(part)) for part in np.array_split(losses, min(5, len(losses)))]
    return told | {"moved": rounded(moved), "curve": rounded(curve)}


def learned(learner, train: ln.Talk, names: list, rate: float, steps: int, seed: int) -> list:
    """Train what is named, in place; the losses."""

    def loss(model, places):
        return ln.talk_loss(model, train.at(places[:, 0]))

    places = torch.arange(len(train.kind))[:, None]
    options = {"batch": BATCH, "trainable": names, "seed": seed, "loss": loss}
    return recover(learner, places, steps, rate, **options)


@lru_cache(maxsize=2)
def aligned(model: str, seed: int, first: int) -> ln.VisionLanguage:
    """What stage one leaves: a connector trained on captions of the first classes."""
    decoder, tokenizer = pretrained(model)
    torch.manual_seed(seed)
    learner = ln.VisionLanguage(decoder, ln.RandomFeatures(seed=seed)).eval()
    images, labels = scans(seed)[0]
    chosen = labels < SEEN_FIRST
    captions = ln.talk(images[chosen], labels[chosen], tokenizer, ["caption"])
    learned(learner, captions, list(ln.CONNECTOR), FIRST_RATE, first, seed)
    return learner


def scans(seed: int) -> tuple:
    """(images, labels) to train on, and the same of all others."""
    images, labels = digits()
    images, labels = torch.from_numpy(images).float(), torch.from_numpy(labels)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    return tuple((images[part], labels[part]) for part in (order[:TRAIN], order[TRAIN:]))


@lru_cache(maxsize=4)
def drawn(model: str, seed: int, kinds: str, held_out: int) -> tuple[ln.Talk, ln.Talk]:
    """What is said of a seed's scans: to train on, and of the first `held_out` others."""
    tokenizer = pretrained(model)[1]
    train, (images, labels) = scans(seed)
    trained = ln.MIXED if kinds == "all" else [kinds]
    test = ln.talk(images[:held_out], labels[:held_out], tokenizer)
    return ln.talk(*train, tokenizer, trained), test


def scored(learner, test: ln.Talk) -> dict:
    """Loss and shares of right answers, of all rows and of each kind."""
    rows = ln.answers(learner, test)
    told = {"loss": (rows["loss"].sum() / rows["count"].sum()).item()}
    for key in ("exact", "named"):
        told[key] = rows[key].float().mean().item()
        kinds = [
            rows[key][test.kind == place].float().mean().item() for place in range(len(ln.MIXED))
        ]
        told[f"{key}_of_kinds"] = rounded(kinds)
    return told


def analyzed(learner, names: list, train: ln.Talk, test: ln.Talk, seed: int) -> dict:
    """Memory of a training step by account, and the paper's two looks into the model."""
    order = torch.randperm(len(train.kind), generator=torch.Generator().manual_seed(seed))
    batches = [train.at(places) for places in order.split(BATCH)[:VARIANCE]]
    for name, parameter in learner.named_parameters():
        parameter.requires_grad_(name in names)
    spent = account(learner, lambda model: ln.talk_loss(model, batches[0])) if names else {}
    few = test.at(torch.randperm(len(test.kind), generator=torch.Generator().manual_seed(0))[:96])
    return {
        "bytes": spent.get("total", 0),
        "saved": spent.get("saved", 0),
        "similarity": ln.similarity(learner, few),
        "variance": ln.gradient_variance(learner, batches),
    }


def count(learner, names: list) -> int:
    """How many numbers train."""
    named = dict(learner.named_parameters())
    return sum(named[name].numel() for name in names)


def rounded(values: list) -> list[float]:
    """Four digits are enough for a picture."""
    return [float(f"{value:.4g}") for value in values]


VISION = 303_179_776  # parameters of CLIP's ViT-L/14 at 224 pixels
LLAMAS = {"7B": (4096, 32, 11_008), "13B": (5120, 40, 13_824)}  # dim, blocks, feed-forward width
SEEDS = range(5)
TUNED = {  # rate
    "norms": 0.3,
    "lora": 0.1,
    "lora-down": 0.03,
    "lora-thin": 1e-2,  # all projections
    "lora-all": 1e-2,
    "layernorm": 1e-2,
    "full": 1e-3,
}
RANKS = {"lora-all": RANK}
KEPT = ("loss", "exact", "named", "training", "bytes", "similarity", "variance")
EVERY = {
    name: {"way": name, "rate": TUNED[name], "rank": RANKS.get(name, 1)}
    for name in ("norms", "lora", "lora-down", "lora-thin", "lora-all", "layernorm", "full")
}
EVERY |= {"none": {"way": "none"}, "questions": EVERY["norms"] | {"kinds": "question"}}


def point(way: str, seed: int, rate: float) -> dict:
    """A way's point on a tuning seed."""
    rank = RANKS.get(way, 1)
    return {"way": way, "seed": seed, "rate": rate, "rank": rank, "kinds": "all"}


RIVALS = {"attention": 1e-2, "mlp": 3e-3}  # rates; with connector, embedding and head
POINTS = [{"way": "every", "seed": seed} for seed in SEEDS]
ALONE = {"layernorm": TUNED["layernorm"]} | RIVALS  # the norms again, as a run like the rivals'
POINTS += [
    {"way": way, "seed": seed, "rate": rate} for way, rate in ALONE.items() for seed in SEEDS
]
LARGER = "tiny-4m"
RATES_4M = {
    "norms": 0.1,
    "lora": 0.1,
    "full": 1e-3,
    "lora-down": 0.03,
    "lora-thin": 1e-2,
    "lora-all": 3e-3,
    "layernorm": 1e-2,
    "attention": 3e-3,
    "mlp": 1e-3,
}
IN_4M = {
    way: {"way": way, "rate": rate, "model": LARGER, "kinds": "all"}
    | ({"rank": RANKS[way]} if way in RANKS else {})
    for way, rate in RATES_4M.items()
}
IN_4M |= {"none": {"way": "none", "model": LARGER, "kinds": "all"}}
IN_4M |= {
    name: IN_4M["norms"] | {"kinds": kind}
    for name, kind in {"questions": "question", "captions": "caption"}.items()
}
POINTS += [{**one, "seed": seed} for one in IN_4M.values() for seed in SEEDS]
QUESTIONS, CAPTIONS = (
    {"way": "norms", "rate": TUNED["norms"], "kinds": kind} for kind in ("question", "caption")
)
POINTS += [{**one, "seed": seed} for one in (QUESTIONS, CAPTIONS) for seed in SEEDS]
GRID = dict.fromkeys(("norms", "lora"), (0.03, 0.1, 0.3, 1.0))
GRID |= {"lora-down": (0.01, 0.03, 0.1, 0.3), "lora-thin": (3e-3, 1e-2, 3e-2, 0.1)}
GRID |= {
    "lora-all": (3e-3, 1e-2, 3e-2),
    "full": (3e-4, 1e-3, 3e-3, 1e-2),
    "mlp": (1e-3, 3e-3, 1e-2),
}
GRID |= dict.fromkeys(("layernorm", "attention"), (1e-3, 3e-3, 1e-2, 3e-2))
TUNING = [point(way, 100, rate) for way, rates in GRID.items() for rate in rates]
GRID_4M = dict.fromkeys(("norms", "lora"), (0.03, 0.1, 0.3, 1.0)) | {"full": (3e-4, 1e-3, 3e-3)}
GRID_4M |= {"lora-down": (0.01, 0.03, 0.1)}
GRID_4M |= {"lora-thin": (3e-3, 1e-2, 3e-2), "lora-all": (1e-3, 3e-3, 1e-2, 3e-2)}
GRID_4M |= dict.fromkeys(("layernorm", "attention"), (1e-3, 3e-3, 1e-2, 3e-2))
GRID_4M |= {"mlp": (3e-4, 1e-3, 3e-3, 1e-2)}
TUNING += [
    IN_4M[way] | {"seed": 100, "rate": rate} for way, rates in GRID_4M.items() for rate in rates
]
CANARY = {"way": "layernorm", "seed": 200, "rate": 1e-2, "steps": 2, "first": 2, "held_out": 8}


def against(method: str, baseline: str, control: str = "none") -> dict[str, dict | None]:
    """What a claim compares in LARGER: ways by their names in IN_4M, the rate left out."""
    sides = {"method": method, "baseline": baseline, "control": control}
    return {
        side: {key: IN_4M[way][key] for key in ("way", "model", "kinds")}
        for side, way in sides.items()
    }


ROLES = {
    "beats-lora": against("norms", "lora"),
    "memory": against("norms", "lora-all", control="full"),
    "similarity": against("norms", "full"),
    "gradient-variance": against("norms", "full"),
    "conversation": against("questions", "norms"),
    "captions": against("questions", "captions"),
    "beats-wide-lora": against("norms", "lora-all"),
    # The control tunes another part in the norms' place.
    "beats-attention": against("layernorm", "attention", control="mlp"),
    "beats-lora-1m": {"method": "norms loss", "baseline": "lora loss", "control": "none loss"},
}
RESULT = {  # which result of a run a claim compares; the loss where none is named
    "memory": "bytes",
    "similarity": "similarity",
    "gradient-variance": "variance",
    "conversation": "named",
    "captions": "named",
}


def share(words: bool = True) -> float:
    """Per cent of Llama-2-7B, an encoder before it, that LayerNorm tuning trains.

    words: with connector, embedding and head, or the blocks' norms alone.
    """
    counts = ln.llama_counts(*LLAMAS["7B"], encoder=VISION)
    beside = counts.words + counts.connector if words else 0
    return 100 * (counts.norms + beside) / counts.total


def by_seed(runs: list) -> list[dict]:
    """Each seed's runs in LARGER as one: "norms loss" and so on, by the names in IN_4M."""
    judged = []
    for seed in SEEDS:
        told: dict = {"seed": seed}
        for name, point in IN_4M.items():
            for run in matching(runs, seed=seed, **point):
                told |= {f"{name} {key}": run[key] for key in (*KEPT, "moved")}
        judged.append(told)
    return judged


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed, or a number."""
    judged = {
        id: paired(runs, role["method"], role["baseline"], RESULT.get(id, "loss"))
        for id, role in ROLES.items()
        if isinstance(role["method"], dict)
    }
    small = ROLES["beats-lora-1m"]
    judged["beats-lora-1m"] = [
        Pair(run["seed"], run[small["method"]], run[small["baseline"]])
        for run in matching(runs, way="every")
    ]
    thirteen = ln.llama_counts(*LLAMAS["13B"]).norms / 1e6
    return judged | {"simple-share": [share(words=False)], "thirteen": [thirteen]}
