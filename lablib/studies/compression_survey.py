"""The study of the survey on compression (2024): recipes side by side, at equal bytes.

`tiny-4m` on documents of the kinds that it was trained on, none of them seen; windows and seeds as
in the study of DReSS. A recipe is judged by the nats that it adds to the whole model's loss on the
same held-out text. Budgets are bits for each weight of the blocks' projections, those of 8, 4 and 2
bits in groups of 64 with their scales; embeddings stay in 16 bits, a quarter of this small model,
and are counted apart. "Narrow" takes heads and neurons by what they add; "sparse" keeps the largest
|w| times input norm of each row, with a bit a weight for its place.

Recovery is 200 steps of 4 windows, through the rounding where there is one, for every recipe but
two in 8 and in 4 bits, which lose so little that there is nothing to repair. On another seed the
rate was tuned for each recipe by itself, three tries or more, until one on each side of the best
was worse; for imitation it is that of plain tuning. Each lab of the theme has a recipe, with its
own settings: a model that is emptied first (803) is cut at the same parts after three quarters of
the steps; one that trains with blocks left out (801) is cut at the end; of one that trains as a
super-network (805) a search takes the best that is small enough, on text that it trained on; shared
blocks (804) train what is their own, and no more. A step of a super-network costs two and a half
plain ones. Two of four by curvature (802) and 3 bits with 1 weight in 64 kept (807) come in one
shot.

All but what belongs to labs 801, 804 and 805 was judged on `tiny-1m` first, with the same seeds and
twice as much text to recover on; those runs are not kept. No claim compares the new ones.

REAL runs: SmolLM2, what needs no training, an illustration made once. Its copy here came out of a
4-bit file, so no claim is judged on it. Left out there: what takes gradients of all of it.

Effects are in nats: the logarithm of the ratio of two perplexities. Left out, for time: curvature
measured again and again (802), and 4 bits in more groupings than two.
"""

from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from lablib.compression import compression_survey as cs
from lablib.compression.calibration import token_losses
from lablib.compression.quantize import quantize, rounded
from lablib.evidence import Pair, paired
from lablib.models import anatomy, pretrained
from lablib.studies.dress import KNOWN, windows

STEPS = 200
BATCH = 4
GROUP = 64
INSIDE = {"empty": ("keep",), "shed": ("blocks",), "search": ("keep",)}  # what these are told
BUDGETS = {"half": 8.25, "quarter": 4.25, "eighth": 2.25}  # bits a weight, with scales


def recipes(n_blocks: int = 4) -> dict[str, list]:
    """Name -> steps, by budget, for a model of so many blocks; what trains is added by `run`."""
    bits, half, quarter = BUDGETS, n_blocks // 2, n_blocks // 4
    return {
        "8 bits": [("round", {"bits": 8})],
        "2:4": [("2:4", {})],
        "2:4, others moved": [("2:4, moved", {})],
        "sparse, half": [("sparse", {"keep": (bits["half"] - 1) / 16})],
        "narrow, half": [("narrow", {"keep": bits["half"] / 16})],
        "half of the blocks": [("narrow", {"keep": bits["half"] / 16, "blocks": half})],
        "half of the blocks, shared": [("shared", {"keep": bits["half"] / 16, "blocks": half})],
        "4 bits": [("round", {"bits": 4})],
        "4 bits, chosen groups": [("round adaptively", {"bits": 4, "alpha": 0.3})],
        "sparse, quarter": [("sparse", {"keep": (bits["quarter"] - 1) / 16})],
        "narrow, quarter": [("narrow", {"keep": bits["quarter"] / 16})],
        "a quarter of the blocks": [("narrow", {"keep": bits["quarter"] / 16, "blocks": quarter})],
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
    model: str = "tiny-4m",
    rows: int = 96,
    batch: int = BATCH,
    temperature: float = 1.0,
) -> dict:
    """One recipe. learn: "no", or what comes last: "tune", "teach" or "imitate", at `rate`.

    Some ways to learn have the recipe's cut inside of them: "empty" after a phase with a penalty on
    what will go, "shed" after training with blocks left out, "search" after a super-network's
    training. temperature: of "teach".
    over: nats above the whole model; bytes: of the whole file, blocks: of the blocks' projections.
    """
    whole = pretrained(model)[0]
    train, held_out = windows(model, seed, rows, KNOWN)
    plan = list(recipes(len(anatomy.blocks(whole)))[recipe])
    training = {"steps": steps, "rate": rate, "batch": batch}
    if learn in INSIDE:
        own = {key: plan[0][1][key] for key in INSIDE[learn]}
        plan = [(learn, own | training)]
    elif learn != "no":
        own = {"temperature": temperature} if learn == "teach" else {}
        plan.append((learn, training | own))
    small = cs.compress(whole, plan, train)
    over = loss(small, held_out) - loss(whole, held_out)
    return {"over": over, "bytes": cs.stored_bytes(small), "blocks": cs.stored_bytes(small, True)}


def loss(model: nn.Module, rows: Tensor) -> float:
    """Nats a token."""
    return token_losses(model, rows, batch=32).double().mean().item()


def where_no_scale_changes() -> tuple[Tensor, Tensor]:
    """A pruned weight rounded, where the largest of each group stays, then the distillation loss;
    beside them rounded codes that are pruned, and torch's loss.
    """
    torch.manual_seed(0)
    one, two = torch.randn(2, 8, 64).unbind()
    largest = one.unflatten(1, (-1, 16)).abs().topk(8, 2).indices
    stays = torch.zeros(8, 4, 16, dtype=torch.bool).scatter_(2, largest, True).flatten(1)
    pruned_codes = quantize(one, 4, group=16).dequantize() * stays
    student, teacher = torch.log_softmax(one / 2, -1), torch.log_softmax(two / 2, -1)
    theirs = 4 * kl_div(student, teacher, log_target=True, reduction="batchmean")
    ours = cs.divergence(one, two, temperature=2.0)
    both = cs.Constraint(stays, bits=4, group=16)(one)
    return torch.cat([both.flatten(), ours[None]]), torch.cat(
        [pruned_codes.flatten(), theirs[None]]
    )


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

    names = [f"{name}.weight" for name in anatomy.projections(model, "down")]
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
    ("4 bits", "tune"): 3e-5,
    ("3 bits and cherries", "tune"): 1e-4,
    ("2 bits", "tune"): 1e-4,
    ("2:4", "tune"): 1e-4,
    ("2:4, others moved", "tune"): 1e-4,
    ("sparse, half", "tune"): 1e-4,
    ("sparse, quarter", "tune"): 1e-3,
    ("sparse, then 3 bits", "tune"): 1e-4,
    ("3 bits, then sparse", "tune"): 1e-4,
    ("narrow, half", "tune"): 3e-4,
    ("half of the blocks", "tune"): 3e-4,
    ("a quarter of the blocks", "tune"): 3e-4,
    ("narrow, then 4 bits", "tune"): 3e-4,
    ("narrow, eighth", "tune"): 1e-3,
    ("narrow, quarter", "tune"): 1e-3,
    ("narrow, quarter", "teach"): 3e-3,
    ("narrow, quarter", "imitate"): 1e-3,
    ("narrow, quarter", "empty"): 3e-3,
    ("narrow, quarter", "search"): 1e-3,
    ("half of the blocks", "shed"): 3e-4,
    ("half of the blocks, shared", "tune"): 1e-2,
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
REAL = "smollm2-135m-instruct"
GRADIENTS = ("2:4, others moved", "3 bits and cherries")
POINTS += [
    point(recipe) | {"seed": 0, "model": REAL, "rows": 16}
    for recipe in recipes()
    if recipe not in GRADIENTS
]
TRIED = {  # rates on another seed
    (1e-5, 3e-5, 1e-4, 3e-4): [("4 bits", "tune")],
    (3e-5, 1e-4, 3e-4): [
        ("3 bits and cherries", "tune"),
        ("2 bits", "tune"),
        ("2:4, others moved", "tune"),
    ],
    (3e-5, 1e-4, 3e-4, 1e-3): [
        ("2:4", "tune"),
        ("sparse, half", "tune"),
        ("sparse, then 3 bits", "tune"),
        ("3 bits, then sparse", "tune"),
    ],
    (1e-4, 3e-4, 1e-3): [
        ("half of the blocks", "tune"),
        ("half of the blocks", "shed"),
    ],
    (1e-4, 3e-4, 1e-3, 3e-3): [
        ("narrow, half", "tune"),
        ("a quarter of the blocks", "tune"),
        ("narrow, then 4 bits", "tune"),
    ],
    (3e-4, 1e-3, 3e-3, 6e-3): [
        ("sparse, quarter", "tune"),
        ("narrow, eighth", "tune"),
        ("narrow, quarter", "tune"),
        ("narrow, quarter", "teach"),
        ("narrow, quarter", "empty"),
        ("narrow, quarter", "search"),
    ],
    (1e-3, 3e-3, 1e-2, 3e-2): [("half of the blocks, shared", "tune")],
}
TUNING = [
    {"recipe": recipe, "learn": learn, "rate": rate, "seed": 100}
    for rates, cases in TRIED.items()
    for recipe, learn in cases
    for rate in rates
]
CANARY = {"recipe": "sparse, then 3 bits", "learn": "teach", "rate": 1e-4, "seed": 200}
CANARY |= {"model": "tiny-1m", "steps": 1, "rows": 2, "batch": 1}


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


# What the lab's reader composes: what goes, which weights stay, in how many bits.
CUT = {
    "nothing": [],
    "a quarter of heads and neurons": [("narrow", {"keep": 0.75})],
    "half of heads and neurons": [("narrow", {"keep": 0.5})],
    "one of four blocks": [("narrow", {"keep": 3 / 4, "blocks": 3})],
}
STAY = {
    "half": [("sparse", {"keep": 0.5})],
    "all": [],
    "a quarter": [("sparse", {"keep": 0.25})],
    "two of four": [("2:4", {})],
}
THEN = {f"{n} bits": [("round", {"bits": n})] for n in (3, 4, 8)} | {"16 bits": []}
THEN["2 bits"] = [("round", {"bits": 2, "scheme": "asymmetric"})]

BOTH = ("no", "tune")


def each(*recipes: str, learn: tuple = BOTH) -> list[tuple[str, str]]:
    """Each recipe in each way to learn."""
    return [(recipe, way) for recipe in recipes for way in learn]


# Which rows a leaf of the tree has: (recipe, what it learns from). Compositions have no leaf, and
# what is rounded and then trained belongs to another leaf than rounding alone.
ROWS = {
    "weights alone, rounded": each("8 bits", "4 bits", "2 bits", learn=("no",)),
    "fine-grained": each("4 bits, chosen groups", learn=("no",)),
    "mixed precision": each("3 bits and cherries", learn=("no",)),
    "straight through": each("4 bits", "2 bits", "3 bits and cherries", learn=("tune",)),
    "single weights": each("sparse, half", "sparse, quarter"),
    "two of four": each("2:4", "2:4, others moved"),
    "heads and neurons": each(*(f"narrow, {budget}" for budget in BUDGETS)),
    "emptied first": [("narrow, quarter", "empty")],
    "searched": [("narrow, quarter", "search")],
    "blocks": [
        *each("half of the blocks", "a quarter of the blocks"),
        ("half of the blocks", "shed"),
    ],
    "shared weights": each("half of the blocks, shared"),
    "white box": [("narrow, quarter", "teach")],
    "black box": [("narrow, quarter", "imitate")],
}
LEARNED = {
    "no": "",
    "tune": ", tuned",
    "teach": ", taught",
    "imitate": ", imitating",
    "empty": ", emptied first",
    "shed": ", trained to lose them",
    "search": ", searched",
}


def judged(runs: list) -> list:
    """Those of the model that claims are judged on."""
    return [run for run in runs if run.get("model") != REAL]


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
    runs = judged(runs)
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
