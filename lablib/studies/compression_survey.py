"""The study of the survey on compression (2024): recipes side by side, at equal bytes.

`tiny-1m` on documents of the kinds that it was trained on, none of them seen; windows and seeds as
in the study of DReSS. A recipe is judged by the nats that it adds to the whole model's loss on the
same held-out text. Budgets are bits for each weight of the blocks' projections, those of 8, 4 and 2
bits in groups of 64 with their scales; embeddings stay in 16 bits, half of this small model, and
are counted apart. "Narrow" takes heads and neurons by what they add; "sparse" keeps the largest
|w| times input norm of each row, with a bit a weight for its place.

Recovery is 200 steps of 8 windows for every recipe, through the rounding where there is one. On
another seed the rate was tuned for each recipe by itself, three tries or more, until one on each
side of the best was worse; for imitation it is that of plain tuning. A model that is emptied first,
as in lab 803, is cut at the same parts after three quarters of the steps, with that lab's penalty.

Of labs 802 and 807 there is one recipe each, in one shot: two of four by curvature, with the others
moved, and 3 bits with 1 weight in 64 kept. Blocks go by their influence. They were added after the
others had been judged, with the settings of their labs, and no claim compares them. The training of
thirteen recipes came last; of the claims "order-tuned" alone compares those. "gap-narrows" reads
runs that were known when it was written.

Effects are in nats: the logarithm of the ratio of two perplexities.

Left out, for time: methods that train for long before they are cut (801, 804, 805), curvature
measured again and again (802), and 4 bits in more groupings than two. Their labs measure them. The
model is a fifth of `tiny-4m`, for time, too.
"""

from statistics import fmean

import torch
from torch import Tensor, nn

from lablib.compression import compression_survey as cs
from lablib.compression.calibration import token_losses
from lablib.compression.quantize import quantize, rounded
from lablib.evidence import Pair, grid, paired
from lablib.models import pretrained
from lablib.studies.dress import KNOWN, windows

STEPS = 200
BATCH = 8
GROUP = 64
BUDGETS = {"half": 8.25, "quarter": 4.25, "eighth": 2.25}  # bits a weight, with scales


def recipes() -> dict[str, list]:
    """Name -> steps, by budget; whatever trains is added by `run`."""
    bits = BUDGETS
    return {
        "8 bits": [("round", {"bits": 8})],
        "2:4": [("2:4", {})],
        "2:4, others moved": [("2:4, moved", {})],
        "sparse, half": [("sparse", {"keep": (bits["half"] - 1) / 16})],
        "narrow, half": [("narrow", {"keep": bits["half"] / 16})],
        "two blocks, half": [("narrow", {"keep": bits["half"] / 16, "blocks": 2})],
        "4 bits": [("round", {"bits": 4})],
        "4 bits, chosen groups": [("round adaptively", {"bits": 4, "alpha": 0.3})],
        "sparse, quarter": [("sparse", {"keep": (bits["quarter"] - 1) / 16})],
        "narrow, quarter": [("narrow", {"keep": bits["quarter"] / 16})],
        "one block, quarter": [("narrow", {"keep": bits["quarter"] / 16, "blocks": 1})],
        "3 bits and cherries": [("cherries", {"bits": 3})],
        "2 bits": [("round", {"bits": 2, "scheme": "asymmetric"})],
        "narrow, eighth": [("narrow", {"keep": bits["eighth"] / 16})],
        "narrow, then 4 bits": [("narrow", {"keep": 0.5}), ("round", {"bits": 4})],
        "sparse, then 3 bits": [("sparse", {"keep": 0.5}), ("round", {"bits": 3})],
        "3 bits, then sparse": [("round", {"bits": 3}), ("sparse", {"keep": 0.5})],
    }


def run(
    recipe: str,
    seed: int,
    learn: str = "no",
    rate: float = 1e-3,
    steps: int = STEPS,
    model: str = "tiny-1m",
    rows: int = 96,
    batch: int = BATCH,
    temperature: float = 1.0,
) -> dict:
    """One recipe. learn: "no", or what comes last: "tune", "teach" or "imitate", at `rate`.

    learn "empty" is "tune" with a narrow recipe's cut inside of it, after a phase with a penalty on
    what will go. temperature: of "teach".
    over: nats above the whole model; bytes: of the whole file, blocks: of the blocks' projections.
    """
    whole = pretrained(model)[0]
    train, held_out = windows(model, seed, rows, KNOWN)
    plan, training = list(recipes()[recipe]), {"steps": steps, "rate": rate, "batch": batch}
    if learn == "empty":
        plan = [(learn, dict(plan[0][1]) | training)]
    elif learn != "no":
        own = {"temperature": temperature} if learn == "teach" else {}
        plan.append((learn, training | own))
    small = cs.compress(whole, plan, train)
    over = loss(small, held_out) - loss(whole, held_out)
    return {"over": over, "bytes": cs.stored_bytes(small), "blocks": cs.stored_bytes(small, True)}


def loss(model: nn.Module, rows: Tensor) -> float:
    """Nats a token."""
    return token_losses(model, rows, batch=32).double().mean().item()


BITS, LAYERS = 3 + 16 / 32, ("up", "down")  # of a real model, in groups of 32


def on_a_real_model(model: nn.Module, seen: Tensor, unseen: Tensor) -> dict[str, float]:
    """Nats that three ways to BITS bits a weight of LAYERS add to the loss, with nothing trained.

    3 bits in groups of 32; as few weights of each row in 16 bits, with a bit a weight for their
    places; as few neurons. What stays is chosen on `seen`, (n, length + 1), and judged on `unseen`.
    """
    norms = cs.input_norms(model, seen, *LAYERS)

    def few(name: str, weight: Tensor) -> Tensor:
        score = weight.abs() * norms[name.removesuffix(".weight")]
        kept = score.topk(round((BITS - 1) / 16 * weight.shape[1]), 1).indices
        return weight * torch.zeros_like(weight).scatter_(1, kept, 1.0)

    names = [f"{name}.weight" for name in cs.anatomy.projections(model, "down")]
    scores = dict(zip(names, cs.importance.of_neurons(model, seen), strict=True))

    def narrow(name: str, weight: Tensor) -> Tensor:
        best = scores[name].topk(round(BITS / 16 * weight.shape[1])).indices
        return weight * torch.zeros_like(weight[0]).index_fill_(0, best, 1.0)

    ways = {
        "3 bits": (lambda _, weight: quantize(weight, 3, group=32).dequantize(), LAYERS),
        "few weights": (few, LAYERS),
        "few neurons": (narrow, ("down",)),  # what none of them reads is gone in "up" as well
    }
    before, added = token_losses(model, unseen, 1).mean().item(), {}
    for word, (how, roles) in ways.items():
        with rounded(model, how, *roles):
            added[word] = token_losses(model, unseen, 1).mean().item() - before
    return added


SEEDS = range(5)
TUNED = {  # the rate, by recipe and what it learns from
    ("8 bits", "tune"): 1e-4,
    ("4 bits", "tune"): 1e-4,
    ("4 bits, chosen groups", "tune"): 1e-4,
    ("3 bits and cherries", "tune"): 1e-4,
    ("2 bits", "tune"): 1e-4,
    ("2:4", "tune"): 3e-4,
    ("2:4, others moved", "tune"): 1e-4,
    ("sparse, half", "tune"): 3e-4,
    ("sparse, quarter", "tune"): 1e-3,
    ("sparse, then 3 bits", "tune"): 3e-4,
    ("3 bits, then sparse", "tune"): 3e-4,
    ("narrow, half", "tune"): 1e-3,
    ("two blocks, half", "tune"): 3e-4,
    ("one block, quarter", "tune"): 1e-3,
    ("narrow, then 4 bits", "tune"): 1e-3,
    ("narrow, eighth", "tune"): 3e-3,
    ("narrow, quarter", "tune"): 3e-3,
    ("narrow, quarter", "teach"): 3e-3,
    ("narrow, quarter", "imitate"): 3e-3,
    ("narrow, quarter", "empty"): 3e-3,
}


def point(recipe: str, learn: str = "no") -> dict:
    """What names a judging run, its seed aside."""
    rate = {"rate": TUNED[recipe, learn]} if learn != "no" else {}
    return {"recipe": recipe, "learn": learn} | rate


POINTS = [
    case | {"seed": seed}
    for seed in SEEDS
    for case in (*map(point, recipes()), *(point(*key) for key in TUNED))
]
WAYS = ("tune", "teach", "empty")
TUNING = [
    *grid(recipe="narrow, quarter", learn=WAYS, rate=(1e-3, 3e-3, 6e-3), seed=100),
    *grid(recipe="narrow, quarter", learn="tune", rate=3e-4, seed=100),
    *grid(recipe="sparse, quarter", learn="tune", rate=(3e-4, 1e-3, 2e-3, 3e-3), seed=100),
    *grid(recipe=("4 bits", "2 bits"), learn="tune", rate=(3e-5, 1e-4, 3e-4, 1e-3), seed=100),
]
TRIED = {  # rates for what was judged without training at first
    (3e-5, 1e-4, 3e-4, 1e-3): ["8 bits", "4 bits, chosen groups", "3 bits and cherries"],
    (1e-4, 3e-4, 1e-3): ["sparse, then 3 bits", "3 bits, then sparse"],
    (3e-5, 1e-4, 3e-4, 1e-3, 3e-3): ["2:4, others moved"],
    (1e-4, 3e-4, 1e-3, 3e-3): ["2:4", "sparse, half"],
    (3e-4, 1e-3, 3e-3): ["narrow, then 4 bits"],
    (1e-4, 3e-4, 1e-3, 3e-3, 6e-3): ["two blocks, half"],
    (3e-4, 1e-3, 3e-3, 6e-3): ["narrow, half", "one block, quarter"],
    (1e-3, 3e-3, 6e-3): ["narrow, eighth"],
}
TUNING += [
    point
    for rates, names in TRIED.items()
    for point in grid(recipe=names, learn="tune", rate=rates, seed=100)
]
CANARY = {"recipe": "sparse, then 3 bits", "learn": "teach", "rate": 1e-4, "seed": 200}
CANARY |= {"steps": 1, "rows": 2, "batch": 1}


def against(method: str, baseline: str, control: str | None = None) -> dict:
    """Roles of recipes, nothing trained."""
    sides = {"method": method, "baseline": baseline, "control": control}
    return {side: recipe and {"recipe": recipe, "learn": "no"} for side, recipe in sides.items()}


def learners(recipe: str, method: str, baseline: str, control: str | None = None) -> dict:
    """Roles of ways to learn, after one recipe."""
    sides = {"method": method, "baseline": baseline, "control": control}
    return {side: learn and {"recipe": recipe, "learn": learn} for side, learn in sides.items()}


# Five have no control. What lacks the order or the training alone is the baseline; and every other
# recipe of their bytes is ahead of the narrow models that "narrow" and "eighth" have as baselines.
ROLES = {
    "quarter": against("4 bits", "sparse, quarter", "narrow, quarter"),
    "order": against("sparse, then 3 bits", "3 bits, then sparse"),
    "order-tuned": {
        "method": {"recipe": "sparse, then 3 bits", "learn": "tune"},
        "baseline": {"recipe": "3 bits, then sparse", "learn": "tune"},
        "control": {"recipe": "sparse, then 3 bits", "learn": "no"},
    },
    "recovery": learners("sparse, quarter", "tune", "no"),
    "gap-narrows": learners("narrow, quarter", "tune", "no"),
    "white-box": learners("narrow, quarter", "teach", "tune", "imitate"),
    "black-box": learners("narrow, quarter", "imitate", "tune", "no"),
    "emptied": learners("narrow, quarter", "empty", "tune", "no"),
    "narrow": against("4 bits", "narrow, quarter"),
    "eighth": against("narrow, then 4 bits", "narrow, eighth"),
    "two-bits": against("2 bits", "narrow, then 4 bits", "narrow, eighth"),
}
GAPS = {"recovery": "sparse, quarter", "gap-narrows": "narrow, quarter"}  # behind 4 bits


BOTH = ("no", "tune")


def each(*recipes: str, learn: tuple = BOTH) -> list[tuple[str, str]]:
    """Each recipe in each way to learn."""
    return [(recipe, way) for recipe in recipes for way in learn]


# Which rows a leaf of the tree has: (recipe, what it learns from). Compositions have no leaf, and
# what is rounded and then trained belongs to another leaf than rounding alone.
_ROUNDED = ("8 bits", "4 bits", "2 bits")
ROWS = {
    "weights alone, rounded": each(*_ROUNDED, learn=("no",)),
    "fine-grained": each("4 bits, chosen groups", learn=("no",)),
    "mixed precision": each("3 bits and cherries", learn=("no",)),
    "straight through": each(
        *_ROUNDED, "4 bits, chosen groups", "3 bits and cherries", learn=("tune",)
    ),
    "single weights": each("sparse, half", "sparse, quarter"),
    "two of four": each("2:4", "2:4, others moved"),
    "heads and neurons": each(*(f"narrow, {budget}" for budget in BUDGETS)),
    "emptied first": [("narrow, quarter", "empty")],
    "blocks": each("two blocks, half", "one block, quarter"),
    "white box": [("narrow, quarter", "teach")],
    "black box": [("narrow, quarter", "imitate")],
}
LEARNED = {
    "no": "",
    "tune": ", tuned",
    "teach": ", taught",
    "imitate": ", imitating",
    "empty": ", emptied first",
}


def table(runs: list, weights: int) -> dict[tuple[str, str], tuple[float, float]]:
    """(recipe, what it learns from) -> bits a weight of the blocks, nats; means over seeds.

    weights: of the whole model's blocks.
    """
    kinds = {(run["recipe"], run["learn"]): [] for run in runs}
    for run in runs:
        kinds[run["recipe"], run["learn"]].append((8 * run["blocks"] / weights, run["over"]))
    return {
        kind: (fmean(b for b, _ in own), fmean(o for _, o in own)) for kind, own in kinds.items()
    }


def repaired(means: dict, at_least: float) -> dict[str, float]:
    """Recipe -> which share of the nats that it lost training brings back; more than 1 is a gain.

    means: as `table` has them. at_least: nats that must have been lost.
    """
    tuned = {recipe: nats for (recipe, learn), (_, nats) in means.items() if learn == "tune"}
    lost = {recipe: means[recipe, "no"][1] for recipe in tuned}
    return {name: 1 - tuned[name] / lost[name] for name in tuned if lost[name] >= at_least}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed. Those of GAPS compare two gaps."""
    made = {
        id: paired(runs, role["method"], role["baseline"], "over")
        for id, role in ROLES.items()
        if id not in GAPS
    }
    for id, recipe in GAPS.items():
        tuned, raw = (behind(runs, learn, recipe) for learn in ("tune", "no"))
        made[id] = [Pair(seed, tuned[seed], raw[seed]) for seed in sorted(raw)]
    return made


def behind(runs: list, learn: str, recipe: str = "sparse, quarter") -> dict[int, float]:
    """Seed -> how far a recipe is behind 4 bits, nats; both untrained, or both trained alike."""
    cases = ({"recipe": name, "learn": learn} for name in (recipe, "4 bits"))
    return {pair.seed: pair.method - pair.baseline for pair in paired(runs, *cases, "over")}
