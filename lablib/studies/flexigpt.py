"""The study of FlexiGPT (2025): a removed block replaced by a shared one, against its removal.

"tiny" runs: the house's `tiny-4m` loses one of its four blocks, that of lowest influence on a
seed's calibration text, and trains for a while on text that it knows. A seed is a draw of
calibration text, the text to train on and its order, and a slice of held-out text of its own. The
rank is chosen so that a shared block stores a tenth of a block, as in the paper; LoRA on the blocks
that are left has at least as many weights to train. "base" and "longer" train the whole model
without anything removed; "longer" runs its two middle blocks twice.

Tuned on another seed: the rate and what gains start at for the method, and as many rates for LoRA;
two rates each for sharing without normalized outputs, for the longer model and for the model as it
is. Sharing that starts at the base's own weights takes the method's settings. Pilots on that seed
tried more for the method (its rate at 1e-2, gains from 0.1) and for LoRA (1e-3, 2e-2), and none of
these was better. LoRA with one rank more was a little better, still behind the method, and trains
nearly a third more weights than it.

"real" runs: SmolLM2 loses nine of its 30 blocks and nothing trains; a seed is a draw of calibration
and of held-out text. "map" runs take no text: distances between its blocks, by each metric.

Smaller than it might be, for time: four blocks instead of eight, a hundred steps, fifty for the
longer model, and no training of SmolLM2. An eight-block model of the house would have to be
trained first, on each reader's machine. With one block to remove, all three metrics choose the same
base in `tiny-4m`, so what the choice of a base is worth after training is not judged.
"""

import copy
from functools import lru_cache

import numpy as np
import torch

from lablib.compression import flexigpt
from lablib.compression.calibration import token_losses
from lablib.compression.recover import recover
from lablib.evidence import grid, matching, paired
from lablib.evidence.studies import Pair
from lablib.models import anatomy, pretrained
from lablib.training.checkpoints import corpora

LENGTH = 96  # tokens of a row to train on
SCORED = 128  # of a row to score or to calibrate on
STEPS = 100
RANK = 16  # of tiny-4m's 256
REAL = "smollm2-135m-instruct"
REAL_RANK = 32  # of 576
GONE = {"tiny-4m": 1, "tiny-1m": 1, REAL: 9}  # blocks
TWICE = (1, 2)  # what the longer model repeats, first and last
PUBLISHED_LR = 4e-3


def run(
    kind: str,
    seed: int,
    lr: float = 1e-3,
    gamma: float | None = flexigpt.GAMMA,
    model: str = "tiny-4m",
    steps: int = STEPS,
    rank: int = RANK,
    metric: str = "paper",
    rows: int = 32,
    batch: int = 4,
    device: str = "cpu",
) -> dict:
    """One point. start, loss: nats a token before and after training.

    kind: "shared"; "bare", outputs not normalized; "zero", thin matrices that start at nothing;
        "lora", the block dropped and the rest adapted; "base", nothing removed and all trained;
        "longer", the same with blocks repeated. "real" scores SmolLM2 untrained, "map" compares its
        blocks' weights.
    gamma: what gains start at. rank: of thin matrices. rows: of held-out text. device: that trains.
    """
    if kind == "map":
        return mapped(model, rank, metric)
    calibration, train, held_out = drawn_texts(model, seed, steps * batch, rows)
    scores = flexigpt.block_influence(whole(model), calibration)
    gone = flexigpt.least(scores, GONE[model])
    if kind == "real":
        return untrained(model, gone, scores, held_out, rank, gamma)
    learner = copy.deepcopy(whole(model))
    torch.manual_seed(seed)
    trainable = prepared(learner, kind, model, gone, rank, gamma)
    learner, train = learner.to(device), train.to(device)
    thin = lora_rank(model, rank)
    options = {"batch": batch, "trainable": trainable, "seed": seed, "rank": thin}
    with flexigpt.without(learner, gone if kind == "lora" else []):
        start, learning = loss_of(learner, held_out), count(learner, trainable, thin)
        losses = recover(learner, train, steps, lr, **options)
        loss = loss_of(learner, held_out)
    told = {"start": start, "loss": loss, "first": gone[0], "learning": learning}
    return told | {
        "train": [round(float(np.mean(part)), 4) for part in np.array_split(losses, min(5, steps))]
    }


def prepared(
    learner, kind: str, model: str, gone: list, rank: int, gamma: float | None
) -> str | list[str]:
    """Change the model in place for a kind; what of it is to train."""
    if kind == "lora":
        return "lora"
    if kind == "longer":
        flexigpt.extend_(learner, *TWICE, rank=rank, gamma=gamma)
    if kind in ("base", "longer"):
        return "all"
    chosen = flexigpt.bases(table(model, rank, "paper"), gone)
    outputs = None if kind == "bare" else gamma
    flexigpt.share_(learner, chosen, rank, outputs, "zero" if kind == "zero" else "svd")
    return flexigpt.learning(learner)


def untrained(model: str, gone: list, scores, held_out, rank: int, gamma: float) -> dict:
    """Losses right after blocks are removed: dropped, or replaced with outputs normalized or not.

    gone: the blocks; scores: their influence, of all; bases: what stands in for each.
    """
    learner = copy.deepcopy(whole(model))
    told = {"whole": loss_of(learner, held_out)}
    with flexigpt.without(learner, gone):
        told["dropped"] = loss_of(learner, held_out)
    chosen = flexigpt.bases(table(model, rank, "paper"), gone)
    flexigpt.share_(learner, chosen, rank, gamma)
    told["normalized"] = loss_of(learner, held_out)
    for layer in learner.modules():
        if isinstance(layer, flexigpt.SharedLinear):
            layer.gain = None
    told["bare"] = loss_of(learner, held_out)
    lists = {"gone": gone, "bases": [*chosen.values()], "scores": rounded_list(scores)}
    return told | lists


def mapped(model: str, rank: int, metric: str) -> dict:
    """Distances between blocks (the lower triangle, row by row), and which block is nearest."""
    found = table(model, rank, metric)
    low = found[tuple(torch.tril_indices(len(found), len(found), -1))]
    own = torch.eye(len(found)).bool()
    nearest = found.masked_fill(own, float("inf")).argmin(1).tolist()
    return {"mean": low.mean().item(), "nearest": nearest, "distances": rounded_list(low)}


def rounded_list(values) -> list[float]:
    """Four digits are enough for a picture."""
    return [float(f"{value:.4g}") for value in values.tolist()]


def lora_rank(model: str, rank: int) -> int:
    """The rank with which LoRA on the blocks that stay trains at least as much."""
    blocks = len(anatomy.blocks(whole(model)))
    gone = GONE[model]
    return -(-rank * gone // (blocks - gone))


def count(learner, trainable: str | list[str], thin: int) -> int:
    """How many weights will train; thin: LoRA's rank."""
    if trainable == "lora":
        layers = anatomy.projections(learner).values()
        return thin * sum(layer.in_features + layer.out_features for layer in layers)
    named = dict(learner.named_parameters())
    return sum(named[n].numel() for n in (named if trainable == "all" else trainable))


def loss_of(model, rows) -> float:
    """Nats a token."""
    return token_losses(model, rows, 16).mean().item()


@lru_cache(maxsize=2)
def whole(model: str):
    """The checkpoint as it is stored."""
    return pretrained(model)[0]


@lru_cache(maxsize=4)
def table(model: str, rank: int, metric: str):
    """Distances between blocks, which depend on no text."""
    return flexigpt.distances(whole(model), rank, metric)


@lru_cache(maxsize=2)
def texts(model: str) -> tuple:
    """Token ids of what tiny checkpoints were trained on, a part, and of what was held out."""
    _, tokenizer = pretrained(model)
    parts = []
    for documents in corpora():
        some = [d.text[:40_000] for group in documents.values() for d in group[:12]]
        parts.append(torch.tensor([i for row in tokenizer(some)["input_ids"] for i in row]))
    return tuple(parts)


def drawn_texts(model: str, seed: int, n: int, rows: int) -> tuple:
    """A seed's rows: to calibrate on (8, SCORED + 1), to train on (n, LENGTH + 1), held out."""
    train, held_out = texts(model)
    return (
        windows(train, 8, SCORED, seed),
        windows(train, n, LENGTH, seed + 1000),
        slice_of(held_out, seed, rows),
    )


def windows(ids, n: int, length: int, seed: int):
    """(n, length + 1) windows of a text, drawn at random."""
    starts = np.random.default_rng(seed).integers(0, len(ids) - length, n)
    return torch.stack([ids[start : start + length + 1] for start in starts])


def slice_of(ids, seed: int, rows: int):
    """(rows, SCORED + 1) of held-out text: 32 rows belong to a seed and to no other."""
    cut = ids[: len(ids) // (SCORED + 1) * (SCORED + 1)].view(-1, SCORED + 1)
    order = np.random.default_rng(0).permutation(len(cut))
    start = 32 * (seed % (len(cut) // 32))
    return cut[torch.from_numpy(order[start : start + rows])]


SEEDS = range(5)
FEWER = 50  # steps of what trains a whole model
TUNED = {  # rate, what gains start at, steps
    "shared": (3e-3, 2.0, STEPS),
    "zero": (3e-3, 2.0, STEPS),
    "lora": (5e-3, None, STEPS),
    "bare": (1e-3, None, STEPS),
    "base": (1e-4, None, FEWER),
    "longer": (1e-4, 0.1, FEWER),
}


def trained(kind: str, seed, lr=None, gamma=()) -> list[dict]:
    """Points of one kind, by default with its tuned rate and start of gains."""
    rate, start, steps = TUNED[kind]
    gamma = start if gamma == () else gamma
    return grid(kind=kind, seed=seed, lr=lr or rate, gamma=gamma, steps=steps)


MAP_RANKS = (4, 8, 16, REAL_RANK, 64, 128)
POINTS = [
    *(point for kind in TUNED for point in trained(kind, SEEDS)),
    *grid(kind="map", seed=0, model=REAL, metric="paper", rank=MAP_RANKS),
    *grid(kind="map", seed=0, model=REAL, metric=("plain", "whole"), rank=REAL_RANK),
    *grid(kind="real", seed=SEEDS, model=REAL, rank=REAL_RANK, rows=4),
]
TUNING = [
    *trained("shared", 110, 3e-3, (0.3, 1.0, 2.0, 4.0)),
    *trained("lora", 110, (2e-3, 3e-3, 5e-3, 1e-2)),
    *trained("bare", 110, (3e-4, 1e-3)),
    *trained("base", 110, (1e-4, 3e-4)),
    *trained("longer", 110, (1e-4, 3e-4)),
]
CANARY = {
    "kind": "shared",
    "seed": 200,
    "lr": 1e-3,
    "gamma": 0.3,
    "model": "tiny-1m",
    "steps": 2,
    "rank": 8,
    "rows": 2,
    "batch": 2,
}

_SHARED = {"kind": "shared"}
# None where the method without what it is credited with (normalized outputs, a start at singular
# values, blocks that run twice, training) is the baseline, and no other run lacks it.
ROLES = {
    "recovered": {"method": _SHARED, "baseline": {"kind": "lora"}, "control": {"kind": "zero"}},
    "norm-start": {"method": "normalized", "baseline": "bare", "control": None},
    "norm-final": {"method": _SHARED, "baseline": {"kind": "bare"}, "control": None},
    "longer": {"method": {"kind": "longer"}, "baseline": {"kind": "base"}, "control": None},
    "init": {"method": _SHARED, "baseline": {"kind": "zero"}, "control": None},
    "start-dropped": {"method": "normalized", "baseline": "dropped", "control": "bare"},
    "lora": {"method": "loss", "baseline": "start", "control": None},
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed, or a number."""
    one_run = {"real": ("norm-start", "start-dropped"), "lora": ("lora",)}
    made = {}
    for kind, ids in one_run.items():
        for id in ids:
            ours, theirs = ROLES[id]["method"], ROLES[id]["baseline"]
            of_kind = matching(runs, kind=kind)
            made[id] = [Pair(run["seed"], run[ours], run[theirs]) for run in of_kind]
    for id in ROLES.keys() - made.keys():
        made[id] = paired(runs, ROLES[id]["method"], ROLES[id]["baseline"], "loss")
    return made | averages() | {"overhead": [100 * (parameters("shared") / parameters("gone") - 1)]}


LLAMA = {"total": 6_738_415_616, "blocks": 32, "dim": 4096, "ffn_dim": 11_008, "rank": 256}
PAPERS_GONE = 11  # of Llama-2-7B's blocks, as Table 6's time for dropping them says


def parameters(kind: str, gone: int = PAPERS_GONE, rank: int = LLAMA["rank"]) -> int:
    """Of Llama-2-7B: "whole", with blocks "gone", or with "shared" ones in their place."""
    sizes = LLAMA["dim"], LLAMA["ffn_dim"]
    left = LLAMA["total"] - gone * flexigpt.block_parameters(*sizes)
    kinds = {"whole": LLAMA["total"], "gone": left}
    return kinds.get(kind, left + gone * flexigpt.shared_parameters(*sizes, rank))


def averages() -> dict[str, list[float]]:
    """Table 1's averages, from its five columns."""
    rows = {"average": ("FlexiGPT", "30"), "average-40": ("FlexiGPT", "40")}
    rows |= {"average-lora": ("ShortGPT + LoRA", "30")}
    return {id: [mean_of_table(*row)] for id, row in rows.items()}


def mean_of_table(method: str, ratio: str) -> float:
    """Of a row of Table 1, in per cent."""
    row = matching(flexigpt.published(), table="1", method=method, ratio=ratio)
    return float(np.mean([float(r["value"]) for r in row if r["what"] not in ("PPL", "Average")]))
