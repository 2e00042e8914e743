"""The study of FlexiGPT (2025): removed blocks replaced by shared ones, against their removal.

"tiny" runs: the house's `tiny-2m` loses three of its eight blocks, those of lowest influence on a
seed's calibration text, and trains for a while on text that it knows. A seed is a draw of
calibration text, the text to train on and its order, and a slice of held-out text of its own. With
eight parts of 128 a shared block stores a tenth of a block, as in the paper; 32 are judged beside
it. LoRA on the blocks that are left has at least as many weights to train. "base" and "longer"
train the whole model without anything removed; "longer" runs its two middle blocks twice.

Tuned on another seed, six settings for the method and for each of its rivals: what gains start at
and the rate for the method, the rate for LoRA and for sharing without normalized outputs; with 32
parts, and for the longer model and the model as it is, four rates each. Sharing that starts at the
base's own weights, and sharing with another metric's bases, take the method's settings.

Left out, for time: a longer model of TinyLlama's size, and training SmolLM2. The claims but
"metric" and "recovered-more" were judged on `tiny-4m` first, one of whose four blocks went, with
the same seeds; those runs are not kept.

"real" runs: SmolLM2 loses nine of its 30 blocks and nothing trains; a seed is a draw of calibration
and of held-out text. "map" runs take no text: distances between its blocks, by each metric.
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
STEPS = 150
RANK, MORE = 8, 32  # parts of tiny-2m's 128
SMALL = "tiny-2m"
REAL = "smollm2-135m-instruct"
REAL_RANK = 32  # of 576
GONE = {SMALL: 3, "tiny-1m": 1, REAL: 9}  # blocks
TWICE = (3, 4)  # what the longer model repeats, first and last
PUBLISHED_LR = 4e-3


def run(
    kind: str,
    seed: int,
    lr: float = 1e-3,
    gamma: float | None = flexigpt.GAMMA,
    model: str = SMALL,
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
    gamma: what gains start at. metric: that chooses bases. rank: of thin matrices. rows: of
    held-out text. device: that trains.
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
    trainable = prepared(learner, kind, model, gone, rank, gamma, metric)
    learner, train = learner.to(device), train.to(device)
    thin = lora_rank(model, rank)
    options = {"batch": batch, "trainable": trainable, "seed": seed, "rank": thin}
    with flexigpt.without(learner, gone if kind == "lora" else []):
        start, learning = loss_of(learner, held_out), count(learner, trainable, thin)
        losses = recover(learner, train, steps, lr, **options)
        loss = loss_of(learner, held_out)
    told = {"start": start, "loss": loss, "gone": gone, "learning": learning}
    return told | {
        "train": [round(float(np.mean(part)), 4) for part in np.array_split(losses, min(5, steps))]
    }


def prepared(
    learner, kind: str, model: str, gone: list, rank: int, gamma: float | None, metric: str
) -> str | list[str]:
    """Change the model in place for a kind; what of it is to train."""
    if kind == "lora":
        return "lora"
    if kind == "longer":
        flexigpt.extend_(learner, *TWICE, rank=rank, gamma=gamma)
    if kind in ("base", "longer"):
        return "all"
    chosen = flexigpt.bases(table(model, rank, metric), gone)
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


def by_gain(model: str, gone: list, rank: int, gains: list, rows) -> tuple[list[float], float]:
    """Losses with blocks shared and nothing trained, by what gains start at; and not normalized."""
    learner = copy.deepcopy(whole(model))
    flexigpt.share_(learner, flexigpt.bases(table(model, rank, "paper"), gone), rank, 1.0)
    layers = [m for m in learner.modules() if getattr(m, "gain", None) is not None]
    losses = []
    for gain in gains:
        for layer in layers:
            layer.gain.data.fill_(gain)
        losses.append(loss_of(learner, rows))
    for layer in layers:
        layer.gain = None
    return losses, loss_of(learner, rows)


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
TUNED = {  # rate, what gains start at, parts
    "shared": (3e-3, 1.0, RANK),
    "zero": (3e-3, 1.0, RANK),
    "lora": (4e-3, None, RANK),
    "bare": (2e-3, None, RANK),
    "base": (3e-5, None, RANK),
    "longer": (3e-5, 0.1, RANK),
}
WIDE = {"shared": (1e-3, 1.0, MORE), "lora": (4e-3, None, MORE)}


def trained(setting: tuple, kind: str, seed, lr=None, gamma=(), **more) -> list[dict]:
    """Points of one kind. setting: as in TUNED; lr, gamma: others than these, one or several."""
    rate, start, rank = setting
    gamma = start if gamma == () else gamma
    more = ({"metric": "paper"} if kind == "shared" else {}) | more
    return grid(kind=kind, seed=seed, lr=lr or rate, gamma=gamma, rank=rank, **more)


MAP_RANKS = (4, 8, 16, REAL_RANK, 64, 128)
POINTS = [
    *(
        point
        for table in (TUNED, WIDE)
        for kind in table
        for point in trained(table[kind], kind, SEEDS)
    ),
    *trained(TUNED["shared"], "shared", SEEDS, metric=("whole", "plain")),
    *grid(kind="map", seed=0, model=REAL, metric="paper", rank=MAP_RANKS),
    *grid(kind="map", seed=0, model=REAL, metric=("plain", "whole"), rank=REAL_RANK),
    *grid(kind="real", seed=SEEDS, model=REAL, rank=REAL_RANK, rows=4),
]
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
TUNING = [
    *trained(TUNED["shared"], "shared", 110, 3e-3, (0.1, 0.3, 1.0, 2.0)),
    *trained(TUNED["shared"], "shared", 110, (1e-3, 1e-2)),
    *trained(TUNED["lora"], "lora", 110, RATES),
    *trained(TUNED["bare"], "bare", 110, RATES),
    *trained(WIDE["shared"], "shared", 110, (3e-4, 1e-3, 3e-3, 1e-2)),
    *trained(WIDE["lora"], "lora", 110, (1e-3, 2e-3, 4e-3, 8e-3)),
    *trained(TUNED["base"], "base", 110, (1e-5, 3e-5, 1e-4, 3e-4)),
    *trained(TUNED["longer"], "longer", 110, (1e-5, 3e-5, 1e-4, 3e-4)),
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

_SHARED = {"kind": "shared", "rank": RANK, "metric": "paper"}
_LORA, _ZERO = {"kind": "lora", "rank": RANK}, {"kind": "zero"}
# None where the method without what it is credited with (normalized outputs, a start at singular
# values, blocks that run twice, training) is the baseline, and no other run lacks it; with 32 parts
# a start at nothing was not run.
ROLES = {
    "recovered": {"method": _SHARED, "baseline": _LORA, "control": _ZERO},
    "recovered-more": {
        "method": _SHARED | {"rank": MORE},
        "baseline": _LORA | {"rank": MORE},
        "control": None,
    },
    "metric": {
        "method": _SHARED,
        "baseline": _SHARED | {"metric": "whole"},
        "control": _SHARED | {"metric": "plain"},
    },
    "norm-start": {"method": "normalized", "baseline": "bare", "control": None},
    "norm-final": {"method": _SHARED, "baseline": {"kind": "bare"}, "control": None},
    "longer": {"method": {"kind": "longer"}, "baseline": {"kind": "base"}, "control": None},
    "init": {"method": _SHARED, "baseline": _ZERO, "control": None},
    "start-dropped": {"method": "normalized", "baseline": "dropped", "control": "bare"},
    "lora": {"method": "loss", "baseline": "start", "control": None},
}


def of(runs: list, kind: str, rank: int = RANK, metric: str = "paper") -> list:
    """Trained runs of one kind. metric: of "shared" ones."""
    return matching(runs, kind=kind, rank=rank, **({"metric": metric} if kind == "shared" else {}))


def losses(runs: list, kind: str, rank: int = RANK, metric: str = "paper") -> np.ndarray:
    """Their losses after training, one a seed."""
    return np.array([run["loss"] for run in of(runs, kind, rank, metric)])


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed, or a number."""
    real, lora = matching(runs, kind="real"), matching(runs, **_LORA)
    one_run = {"norm-start": real, "start-dropped": real, "lora": lora}
    made = {}
    for id, of_kind in one_run.items():
        ours, theirs = ROLES[id]["method"], ROLES[id]["baseline"]
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
