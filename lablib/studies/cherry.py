"""The study of Cherry on Top (2024): which weights to keep in 16 bits, and what training adds.

Groups of 64 along the input axis, the levels of the authors' code, all projections of `tiny-4m`,
which was never quantized. A seed is a draw of 128 calibration windows from the text that the model
was trained on, a slice of held-out text that no other seed has, and, where it is trained, the order
of the windows. Losses are those of the same tokens, minus the whole model's.

Two ways to take a group's step: from the weights that are not kept, as the authors do, and frozen
at what it is with nothing kept. A large weight that is kept does two things under the first, it is
exact, and its neighbours get finer levels; under the second only one.

Training is straight through the rounding, 150 steps with the paper's optimizer. The rate was tuned
on another seed, four tries each for the method and for plain quantization-aware training; where
the largest weights are kept, the method's is taken. The paper's rate was among them. On the first
five seeds the method was ahead by less than their spread; with that known twelve others were
declared, and what is trained is judged on these alone.

"ranks" compares impacts with brute force: one weight at a time is moved up and down by the same
amount, in double precision, and the mean change of the loss taken.

Where nothing is trained, the runs are a whole grid: 4, 3 and 2 bits; a 256th, a 64th and a 16th
kept for each of the five reasons; both ways to take a step; and nothing kept. Claims are judged on
a 64th at 3 and 2 bits. What was made with these is 3 bits with three of the reasons at the other
fractions; the rest came later, nothing was chosen on it, and no claim is judged on it.

Smaller than it might be, for time: 100 weights a seed are moved by brute force, and a step of
training sees two windows of 96 tokens.
"""

import json
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from scipy.stats import spearmanr

from lablib.compression import cherry
from lablib.compression.calibration import input_norms, token_losses
from lablib.compression.importance import activation_weighted, magnitude
from lablib.compression.quantize import matrices, rounded
from lablib.data import Batches
from lablib.evidence import grid, matching, paired
from lablib.evidence.studies import Pair
from lablib.models import GPT, GPTConfig, anatomy, pretrained
from lablib.paths import PACKAGE
from lablib.training import adamw, fit
from lablib.training.checkpoints import corpora

GROUP = 64
LENGTH = 128  # tokens of a calibration window
TRAINED = 96  # of a window to train on
SCORED = 256  # of a held-out row
STEPS = 150
KEPT = 1 / 64  # where nothing is trained
MOVED = 100  # weights that are moved by brute force
PAPER = 1 / 256  # where it is, as in the paper
TUNED = {"impact": 5e-5, "magnitude": 5e-5, "nothing": 5e-5}  # the rate
PUBLISHED_LR = 2e-5


def run(
    kind: str,
    seed: int,
    bits: int = 3,
    by: str = "impact",
    fraction: float = KEPT,
    frozen: bool = False,
    steps: int = 0,
    lr: float = 1e-3,
    model: str = "tiny-4m",
    rows: int = 8,
    calibration: int = 128,
    batch: int = 2,
    moved: int = 15,
) -> dict:
    """One point. kind: "loss" rounds a model's weights and scores held-out text, in nats above the
    whole model; "scores" looks at the impacts themselves.

    by: what a weight is kept for: "impact", "magnitude", "activation" (|w| times the norm of its
        input), "error" (impact times the squared rounding error), "random"; or "nothing".
    fraction: of a row that is kept. frozen: steps follow from all weights, kept ones too.
    steps: of training before, at rate lr, on `batch` windows each.
    rows: of held-out text; calibration: windows that impacts are taken from; moved: weights.
    """
    source = (model, seed, calibration)
    if kind == "scores":
        return described(source, moved)
    kept = chosen(by, source, fraction, bits)
    student = learned(model, kept, bits, steps, lr, seed, batch) if steps else whole(model)
    weights = weights_of(student)
    mixed = {n: cherry.round_rest(w, kept[n], bits, GROUP, frozen) for n, w in weights.items()}
    with rounded(student, lambda name, _: mixed[name.removesuffix(".weight")]):
        losses = token_losses(student, slice_of(model, seed, rows)).double()
    over = (losses - whole_losses(model, seed, rows)).mean().item()
    return {"over": over} | ({} if steps else explained(mixed, kept, bits, source))


def explained(mixed: dict, kept: dict, bits: int, source: tuple) -> dict:
    """What impacts foretell, and how far steps have shrunk.

    expected: sum of T s (w' - w)^2 / 2 over all weights, nats; a window's loss is a mean over its T
        tokens, and if their gradients point anywhere, that of the mean is a T-th as large, squared.
    step: the mean over groups of the step without kept weights, over that with all of them.
    """
    expected, ratios = 0.0, []
    for name, w in weights_of(whole(source[0])).items():
        off = (mixed[name] - w).square()
        expected += LENGTH * (impacts_of(*source)[name] * off).sum().item() / 2
        without = cherry.step_of_groups(w, kept[name], bits, GROUP)
        ratios.append((without / cherry.step_of_groups(w, kept[name] & False, bits, GROUP)).mean())
    return {"expected": expected, "step": float(np.mean(ratios))}


def learned(
    model: str, kept: dict, bits: int, steps: int, lr: float, seed: int, batch: int
) -> torch.nn.Module:
    """The checkpoint after some steps straight through the rounding, with plain layers again."""
    student = cherry.cherry_(pretrained(model)[0], kept, bits, GROUP)
    batches = Batches(texts(model)[0], batch, TRAINED, seed)
    optimizer = adamw(lr=lr, weight_decay=0.0)
    fit(student, batches, steps=steps, optimizer=optimizer, seed=seed, progress=False)
    for name, layer in anatomy.projections(student).items():
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = layer.weight
        anatomy.replace(student, name, plain)
    return student.eval()


def chosen(by: str, source: tuple, fraction: float, bits: int) -> dict:
    """Name -> which weights are kept, (out, in) bool."""
    if by == "nothing":
        return {n: torch.zeros_like(w, dtype=bool) for n, w in weights_of(whole(source[0])).items()}
    scores = scores_by(by, source, bits)
    return {name: cherry.cherries(score, fraction) for name, score in scores.items()}


def scores_by(by: str, source: tuple, bits: int) -> dict:
    """Name -> scores (out, in), larger for what is kept. source: model, seed, windows."""
    weights = weights_of(whole(source[0]))
    if by == "magnitude":
        return {name: magnitude(w) for name, w in weights.items()}
    if by == "activation":
        norms = norms_of(*source)
        return {name: activation_weighted(w, norms[name]) for name, w in weights.items()}
    if by == "random":
        draw = torch.Generator().manual_seed(source[1])
        return {name: torch.rand(w.shape, generator=draw) for name, w in weights.items()}
    if by == "error":
        return {n: s * rounding(weights[n], bits).square() for n, s in impacts_of(*source).items()}
    if by != "impact":
        raise ValueError(f"{by!r} is no reason to keep a weight")
    return impacts_of(*source)


def rounding(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """By how much each weight moves when none is kept."""
    return cherry.round_rest(weight, torch.zeros_like(weight, dtype=bool), bits, GROUP) - weight


def described(source: tuple, moved: int) -> dict:
    """How uneven scores are, the mean over matrices, and how they rank beside brute force.

    impact, magnitude, squares (w^2) and uniform: the top 1 %'s mean over the largest of the rest.
    half: the share of all weights that has half of the impact. stored: bits a weight of a matrix
    with the paper's width and settings, places not counted.
    """
    impacts, weights = impacts_of(*source), weights_of(whole(source[0]))
    found = {"impact": impacts, "magnitude": {n: w.abs() for n, w in weights.items()}}
    found |= {"squares": {n: w.square() for n, w in weights.items()}}
    found |= {"uniform": scores_by("random", source, 3)}
    uneven = {key: uneven_by(scores) for key, scores in found.items()}
    pooled = torch.cat([s.flatten() for s in impacts.values()])
    half = {"half": cherry.share_that_carries(pooled), "stored": stored_bits()}
    return uneven | half | ranks(source, moved)


def uneven_by(scores: dict) -> float:
    """Heterogeneity, the mean over matrices."""
    return float(np.mean([cherry.heterogeneity(s) for s in scores.values()]))


def stored_bits(width: int = 4096, group: int = 128, bits: int = 3) -> float:
    """Of a matrix of the paper's width, kept as the paper does: 16 of 4,096 a row."""
    weight = torch.linspace(-1, 1, 8 * width).view(8, width)
    kept = cherry.cherries(weight, PAPER, 8)
    return cherry.store(weight, kept, bits, group).bits_per_weight(places=False)


def ranks(source: tuple, moved: int) -> dict:
    """Rank correlations over some weights of the whole model with what brute force finds."""
    double = pretrained(source[0])[0].double()
    rows = calibration_rows(source[0], source[1], 4)[:, :65]
    draw, weights, found = np.random.default_rng(source[1]), weights_of(double), []
    for name in draw.choice(list(weights), moved):
        at = tuple(int(draw.integers(size)) for size in weights[name].shape)
        size = weights[name].square().mean().sqrt().item()
        change = mean_change(lambda: loss_of(double, rows), weights[name], at, size) / size**2
        found.append((change, impacts_of(*source)[name][at].item(), abs(weights[name][at].item())))
    change, impact, height = np.array(found).T
    rank = {"rank_impact": impact, "rank_magnitude": height}
    return {key: float(spearmanr(change, score).statistic) for key, score in rank.items()}


def mean_change(loss: Callable[[], float], weight: torch.Tensor, at: tuple, size: float) -> float:
    """The loss with one weight moved by size, up and down, on average, minus that without."""
    before, losses = weight[at].item(), []
    for by in (size, -size, 0.0):
        weight[at] = before + by
        losses.append(loss())
    return (losses[0] + losses[1]) / 2 - losses[2]


@torch.no_grad()
def loss_of(model: torch.nn.Module, rows: torch.Tensor) -> float:
    """Nats a token, in the model's own precision."""
    logits = anatomy.logits(model, rows[:, :-1]).flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten()).item()


def weights_of(model) -> dict:
    """Name -> weight (out, in) of every projection, detached."""
    return {name.removesuffix(".weight"): w.detach() for name, w in matrices(model).items()}


@lru_cache(maxsize=2)
def whole(model: str):
    """The checkpoint as it is stored."""
    return pretrained(model)[0]


@lru_cache(maxsize=2)
def impacts_of(model: str, seed: int, calibration: int) -> dict:
    """Name -> E[g^2] (out, in) on a seed's calibration windows."""
    return cherry.impact(whole(model), calibration_rows(model, seed, calibration))


@lru_cache(maxsize=2)
def norms_of(model: str, seed: int, calibration: int) -> dict:
    """Name -> root mean square (in,) of what a projection reads there."""
    return input_norms(whole(model), calibration_rows(model, seed, calibration))


@lru_cache(maxsize=4)
def whole_losses(model: str, seed: int, rows: int) -> torch.Tensor:
    """Of the model as it is, on a seed's slice."""
    return token_losses(whole(model), slice_of(model, seed, rows)).double()


@lru_cache(maxsize=2)
def texts(model: str) -> tuple:
    """Token ids of what a checkpoint was trained on, a part of it, and of what was held out."""
    _, tokenizer = pretrained(model)
    parts = []
    for documents in corpora():
        some = [d.text[:40_000] for group in documents.values() for d in group[:12]]
        parts.append(torch.tensor([i for row in tokenizer(some)["input_ids"] for i in row]))
    return tuple(parts)


def calibration_rows(model: str, seed: int, n: int) -> torch.Tensor:
    """(n, LENGTH + 1) windows of the text that the model was trained on."""
    ids = texts(model)[0]
    starts = np.random.default_rng(seed).integers(0, len(ids) - LENGTH, n)
    return torch.stack([ids[start : start + LENGTH + 1] for start in starts])


def slice_of(model: str, seed: int, rows: int) -> torch.Tensor:
    """(rows, SCORED + 1) of held-out text: 16 rows belong to a seed and to no other."""
    ids = texts(model)[1]
    table = ids[: len(ids) // (SCORED + 1) * (SCORED + 1)].view(-1, SCORED + 1)
    order = np.random.default_rng(0).permutation(len(table))
    start = 16 * (seed % (len(table) // 16))
    return table[torch.from_numpy(order[start : start + rows])]


def fixed_model() -> torch.nn.Module:
    """One block of two heads, whose weights follow from sines: the same everywhere."""
    config = {"vocab_size": 12, "dim": 8, "n_layers": 1, "n_heads": 2, "ffn_dim": 12}
    model = GPT(GPTConfig(**config, max_length=8)).eval()
    with torch.no_grad():
        for place, weight in enumerate(model.parameters()):
            waves = torch.sin(torch.arange(weight.numel()) * (1.0 + 0.37 * place))
            weight.copy_(0.6 * waves.view_as(weight) + (weight.ndim == 1))
    return model


def by_curvlinops() -> dict:
    """Name -> E[g^2] of that model, as recorded from package curvlinops."""
    return json.loads((PACKAGE / "compression" / "cherry.json").read_text("utf-8"))


def fixed_rows() -> torch.Tensor:
    """(6, 8) token ids."""
    row, place = torch.arange(6)[:, None], torch.arange(8)
    return (3 * row * row + 5 * place + row * place) % 12


SEEDS = range(5)
FRESH = range(5, 17)  # of what is trained
REASONS = ("impact", "magnitude", "activation", "error", "random")
FRACTIONS = (1 / 256, KEPT, 1 / 16)
BITS = (4, 3, 2)
TRAINING = {"kind": "loss", "bits": 3, "steps": STEPS, "rows": 16}


def scored(seed: int) -> list[dict]:
    """Nothing trained: one seed's points, one after the other, which share their impacts."""
    same = {"kind": "loss", "seed": seed, "steps": 0}
    return [
        {"kind": "scores", "seed": seed, "moved": MOVED},
        *grid(**same, bits=BITS, by="nothing", fraction=0.0, frozen=False),
        *grid(**same, bits=BITS, by=REASONS, fraction=FRACTIONS, frozen=(False, True)),
    ]


def trained(seed, lr: dict) -> list[dict]:
    """150 steps of each method. lr: method -> rate or rates."""
    return [
        point
        for by, rate in lr.items()
        for point in grid(**TRAINING, by=by, fraction=kept_by(by), lr=rate, seed=seed)
    ]


def kept_by(by: str) -> float:
    """The paper's fraction, or none."""
    return 0.0 if by == "nothing" else PAPER


POINTS = [*(point for seed in SEEDS for point in scored(seed)), *trained(FRESH, TUNED)]
TUNING = trained(110, dict.fromkeys(("impact", "nothing"), (PUBLISHED_LR, 5e-5, 1e-4, 3e-4)))
CANARY = {
    "kind": "loss",
    "seed": 200,
    "model": "tiny-1m",
    "by": "error",
    "steps": 2,
    "lr": 1e-4,
    "rows": 2,
    "calibration": 2,
    "batch": 1,
}


def case(by: str, bits: int = 3, frozen: bool = False) -> dict:
    """What names the runs without training that keep 1/64, or nothing, which freezes nothing."""
    keeps = by != "nothing"
    how = {"fraction": KEPT if keeps else 0.0, "frozen": frozen and keeps}
    return {"by": by, "bits": bits, "steps": 0} | how


def against(baseline: str, control: str, *how) -> dict:
    """Weights kept by impact, against those that are kept for another reason."""
    sides = {"method": "impact", "baseline": baseline, "control": control}
    return {side: case(by, *how) for side, by in sides.items()}


_IMPACT, _LARGEST, _NOTHING = (
    {"by": by, "steps": STEPS} for by in ("impact", "magnitude", "nothing")
)
ROLES = {
    # Kept for their size, weights are as far ahead of nothing: "trained-magnitude" judges the rest.
    "trained": {"method": _IMPACT, "baseline": _NOTHING, "control": None},
    "trained-magnitude": {"method": _IMPACT, "baseline": _LARGEST, "control": _NOTHING},
    "uneven": {"method": "impact", "baseline": "magnitude", "control": "uniform"},
    "uneven-squares": {"method": "impact", "baseline": "squares", "control": "uniform"},
    # No control: how a ranking at random goes with brute force is not stored.
    "ranks": {"method": "rank_impact", "baseline": "rank_magnitude", "control": None},
    "magnitude": against("magnitude", "random"),
    "magnitude-frozen": against("magnitude", "random", 3, True),
    "magnitude-2": against("magnitude", "random", 2),
    "magnitude-frozen-2": against("magnitude", "random", 2, True),
    "random": against("random", "nothing"),
    "random-frozen": against("random", "nothing", 3, True),
    "random-2": against("random", "nothing", 2),
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed, or a number."""
    scores = matching(runs, kind="scores")
    made = {"bits": sorted({run["stored"] for run in scores})}  # one: a count, whatever the seed
    for id, role in ROLES.items():
        ours, theirs = role["method"], role["baseline"]
        if isinstance(ours, str):
            made[id] = [Pair(run["seed"], run[ours], run[theirs]) for run in scores]
        else:
            made[id] = paired(runs, ours, theirs, "over")
    return made
