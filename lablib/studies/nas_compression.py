"""The study of compression by architecture search (2024): many models in one, or one at a time.

`tiny-4m` and the documentation of Django, as in the study of DReSS, whose windows these are: a seed
is an order of training windows, the first of which are the calibration text, a draw of
sub-networks, and held-out documents, half of them to search on and half to judge on. Sub-networks
have two to four blocks and, block by block, one or two key-value groups and a quarter to all of the
neurons.

A super-network trains 200 steps of 4 windows on the largest, the smallest and two random
sub-networks. The baseline cuts four sizes out of the same sorted model and trains each alone: as
many steps each as the super-network has, or a quarter, so that the sum is the same. Steps are
counted; a sandwich step costs about two and a half plain ones. Models with a quarter of the steps
all read the first quarter of the super-network's text.

On another seed four rates were tried for each: the super-network with and without distillation, and
the models trained alone for all steps and for a quarter of them. The best was inside each time. All
was judged on `tiny-1m` first, a fifth of the size, with the same seeds; those runs are not kept.
Pilots there: a share of distillation of 1/2 and 1. The channels of the residual stream are left
out: a model that small has few to spare.

SmolLM2's two runs are illustrations, made once, with nothing trained: no claim is judged on them.
"""

import json
import math
from time import thread_time

import numpy as np
import torch
from torch import Tensor, nn

from lablib.compression import nas_compression as nas
from lablib.compression.calibration import token_losses
from lablib.compression.flexigpt import block_influence
from lablib.compression.recover import recover
from lablib.data import load
from lablib.evidence import Pair, grid, matching, paired
from lablib.models import pretrained
from lablib.paths import PACKAGE
from lablib.studies.dress import NEW, cut, windows

CALIBRATION = 64  # windows that importance is taken from
STEPS = 200
BATCH = 4
CHOICES = {"blocks": (2, 3, 4), "groups": (1, 2), "neurons": (172, 344, 516, 688)}
SMALL, SMALL_CHOICES = (
    "tiny-1m",
    {
        "blocks": (1, 2, 3),
        "groups": (1, 2),
        "neurons": (88, 176, 264, 352),
    },
)
TRIES = 60  # sub-networks that a search measures
BUDGET = 0.8  # of the parameters of SmolLM2 that stay
REFERENCE = (4.0, 6.5)  # millions of parameters, nats: worse than every model here


def run(
    kind: str,
    seed: int,
    sort: bool = True,
    distill: float = 0.0,
    rate: float = 3e-3,
    steps: int = STEPS,
    tries: int = 0,
    model: str = "tiny-4m",
    rows: int = 64,
    batch: int = BATCH,
) -> dict:
    if kind == "untrained":
        return untrained(model, seed, tries, rows)
    if kind == "sliced":
        return cut_out(model, rows)
    whole = pretrained(model)[0]
    train, held_out = windows(model, seed, 2 * rows, NEW)
    search_on, judged_on = held_out.split(rows)
    space = sorted_space(whole, train[:CALIBRATION], sort, choices_of(model))
    few = [*nas.uniform(space)]
    if kind == "pruned":
        losses = [tuned(space, config, train, steps, rate, batch, judged_on) for config in few]
        return {"few": losses, "front": front(space, few, losses)}
    random = np.random.default_rng(seed)
    before = [loss(space.cut(config), judged_on) for config in few]
    how = nas.sandwich_loss(space, random, distill=distill)
    recover(whole, train[: batch * steps], steps, rate, batch=batch, loss=how, seed=None)
    losses = {config: loss(space.cut(config), judged_on) for config in space.grid()}
    found = {"before": before, "few": [losses[config] for config in few]}
    found |= {"all": [*losses.values()], "mean": float(np.mean([*losses.values()]))}
    found["front"] = front(space, few, found["few"])
    return found | (searched(space, few, tries, random, search_on, judged_on) if tries else {})


def choices_of(model: str) -> dict[str, tuple[int, ...]]:
    """What sub-networks of one of the house's models may have."""
    return SMALL_CHOICES if model == SMALL else CHOICES


def sorted_space(model: nn.Module, rows: Tensor, sort: bool, choices: dict = CHOICES) -> nas.Space:
    """The model's sub-networks, sorted by importance, in place, or as it happens to be."""
    order = None
    if sort:
        nas.sort_by_importance_(model, rows)
        order = block_influence(model, rows[:16]).argsort(descending=True).tolist()
    return nas.Space(model, **choices, fine=True, order=order)


def tuned(space, config, train, steps, rate, batch, judged_on) -> float:
    """The loss of one size, cut out and trained alone."""
    small = space.cut(config)
    recover(small, train[: batch * steps], steps, rate, batch=batch, seed=None)
    return loss(small, judged_on)


def front(space: nas.Space, configs: list, losses: list) -> float:
    """Hypervolume, in millions of parameters times nats."""
    sizes = [space.parameters(config) / 1e6 for config in configs]
    return nas.hypervolume([*zip(sizes, losses, strict=True)], REFERENCE)


def searched(space, few, tries, random, search_on, judged_on) -> dict:
    """The best of each size that a search finds on one half of the text, judged on the other."""

    def measure(config):
        return space.parameters(config), loss(space.cut(config), search_on)

    found = nas.evolve(space, measure, tries, random)
    best = []
    for config in few[1:-1]:
        fit = {c: value for c, (size, value) in found.items() if size <= space.parameters(config)}
        best.append(loss(space.cut(min(fit, key=fit.get)), judged_on))
    uniform = [loss(space.cut(config), judged_on) for config in few[1:-1]]
    cloud = [[size, round(value, 4)] for size, value in found.values()]
    return {"searched": float(np.mean(best)), "uniform": float(np.mean(uniform)), "cloud": cloud}


def untrained(name: str, seed: int, tries: int, rows: int) -> dict:
    """A pretrained model's sub-networks, sorted and not trained: `tries` drawn, as many searched.

    All have at most BUDGET of the parameters, and hardly fewer. cloud: millions of parameters and
    nats on `rows` windows, the drawn ones first; shapes: the quarters of neurons that stay, a digit
    a block, "-" where it goes; heads: key-value heads alike. On other windows: whole, and drawn and
    searched, the best of each.
    """
    model, tokenizer = pretrained(name)
    text = cut([document.text[:9000] for document in load("shakespeare")[:6]], tokenizer)
    seen, search_on, judged_on = text[: 3 * rows].split(rows)
    space, random = quarters(model, seen), np.random.default_rng(seed)
    most = BUDGET * space.parameters(space.largest)
    found: dict = {}

    def look(config: nas.Config) -> None:
        if 0.97 * most <= space.parameters(config) <= most and config not in found:
            found[config] = loss(space.cut(config), search_on)

    while len(found) < tries:
        look(space.sample(random))
    while len(found) < 2 * tries:
        best = sorted(found, key=found.get)[:5]
        one, other = (best[random.integers(len(best))] for _ in range(2))
        look(space.neighbor(space.neighbor(space.crossed(one, other, random), random), random))
    halves = [*found][:tries], [*found][tries:]
    ends = [loss(space.cut(min(half, key=found.get)), judged_on) for half in halves]
    return {
        "cloud": [[space.parameters(c) / 1e6, round(value, 4)] for c, value in found.items()],
        "shapes": [digits(space, c.neurons, c.blocks, space.size.neurons // 4) for c in found],
        "heads": [digits(space, c.groups, c.blocks, 1) for c in found],
        "whole": loss(model, judged_on),
        "best": dict(zip(("drawn", "searched"), ends, strict=True)),
    }


SHAPES = {  # shares of blocks, key-value heads and neurons that make four fifths of SmolLM2
    "all": (1, 1, 1),
    "fewer blocks": (0.74, 1, 1),
    "fewer neurons": (1, 1, 0.66),
    "fewer heads and neurons": (1, 0.67, 0.77),
}


def cut_out(name: str, rows: int) -> dict:
    """SHAPES of a pretrained model, each a model of its own, sorted and not trained.

    millions: of parameters; nats: on `rows` windows; seconds: a token, as one window is read, of
    this thread, the least of seven turns.
    """
    model, tokenizer = pretrained(name)
    text = cut([document.text[:9000] for document in load("shakespeare")[:6]], tokenizer)
    seen, judged_on = text[:rows], text[2 * rows : 3 * rows]
    whole, found = quarters(model, seen), {"millions": {}, "nats": {}, "seconds": {}}
    all_of = (whole.size.blocks, whole.size.kv_heads, whole.size.neurons)
    for word, shares in SHAPES.items():
        sides = [[round(share * n)] for share, n in zip(shares, all_of, strict=True)]
        sides = dict(zip(("blocks", "groups", "neurons"), sides, strict=True))
        space = nas.Space(model, **sides, order=whole.order)
        small = model if word == "all" else space.cut(space.largest)
        found["millions"][word] = space.parameters(space.largest) / 1e6
        found["nats"][word] = loss(small, judged_on)
        found["seconds"][word] = seconds_a_token(small, judged_on[:1, :-1])
    return found


@torch.no_grad()
def seconds_a_token(model: nn.Module, tokens: Tensor, turns: int = 7) -> float:
    """Of this thread, the least of some turns: tokens (1, length)."""
    times = []
    for _ in range(turns):
        start = thread_time()
        model(tokens)
        times.append(thread_time() - start)
    return min(times) / tokens.numel()


def quarters(model: nn.Module, rows: Tensor) -> nas.Space:
    """Of a model, sorted in place: at least half of the neurons, two thirds of the blocks."""
    nas.sort_by_importance_(model, rows)
    order = block_influence(model, rows[:2]).argsort(descending=True).tolist()
    size = nas.Space(model).size
    choices = {"blocks": range(2 * size.blocks // 3, size.blocks + 1)}
    choices |= {"groups": range(1, size.kv_heads + 1)}
    choices |= {"neurons": [size.neurons * k // 4 for k in (2, 3, 4)]}
    return nas.Space(model, **choices, fine=True, order=order)


def digits(space: nas.Space, values: tuple, blocks: int, unit: int) -> str:
    """A digit a block: its value in units, "-" where the block goes."""
    stays = space.order[:blocks]
    return "".join(str(v // unit) if b in stays else "-" for b, v in enumerate(values))


def counted() -> list:
    """Blocks, groups, neurons, channels, parameters: as recorded from package whittle."""
    file = PACKAGE / "compression" / "nas_compression.json"
    return json.loads(file.read_text("utf-8"))["counts"]


def loss(model: nn.Module, rows: Tensor) -> float:
    """Nats a token."""
    return token_losses(model, rows, batch=32).double().mean().item()


SEEDS = range(5)
TUNED = {"super": 2e-3, "pruned": 2e-3}  # the rate
SHORT_RATE = 1e-3  # of a quarter of the steps
SHARE = 0.5  # of distillation


def point(kind: str, **options) -> dict:
    """What names a judging run, its seed aside."""
    usual = {"steps": STEPS} | ({"sort": True, "distill": 0.0} if kind == "super" else {})
    return {"kind": kind, "rate": TUNED[kind]} | usual | options


DISTILLED = point("super", distill=SHARE, tries=TRIES)
SORTED, UNSORTED = point("super"), point("super", sort=False)
ALONE, SHORT = point("pruned"), point("pruned", steps=STEPS // 4, rate=SHORT_RATE)
POINTS = [
    case | {"seed": seed} for seed in SEEDS for case in (DISTILLED, SORTED, UNSORTED, ALONE, SHORT)
]
REAL = {"kind": "untrained", "model": "smollm2-135m-instruct"}
POINTS += [REAL | {"seed": 0, "tries": 20, "rows": 8}]
POINTS += [{"kind": "sliced", "model": REAL["model"], "seed": 0, "rows": 8}]
RATES = (5e-4, 1e-3, 2e-3, 4e-3)
TUNING = grid(kind=("super", "pruned"), rate=RATES, steps=STEPS, seed=100)
TUNING += grid(kind="pruned", rate=RATES, steps=STEPS // 4, seed=100)
TUNING += grid(kind="super", rate=RATES, distill=SHARE, steps=STEPS, seed=100)
CANARY = {"kind": "super", "model": SMALL, "seed": 200, "distill": 0.5, "steps": 2, "tries": 4}
CANARY |= {"rows": 2, "batch": 1}


def role(case: dict) -> dict:
    """What names its runs; a tuned rate does not."""
    return {key: value for key, value in case.items() if key != "rate"}


_DISTILLED, _SORTED, _UNSORTED, _ALONE, _SHORT = map(
    role, (DISTILLED, SORTED, UNSORTED, ALONE, SHORT)
)
# Controls that are missing: "sum" and "front" credit any super-network, and one that is neither
# sorted nor taught is ahead of their baseline, too. "search": no draw at random of equal size is
# stored. "sorted", "untrained": what lacks sorting alone is the baseline.
ROLES = {
    "sum": {"method": _DISTILLED, "baseline": _SHORT, "control": None},
    "each": {"method": _DISTILLED, "baseline": _ALONE, "control": _SHORT},
    "sorted": {"method": _SORTED, "baseline": _UNSORTED, "control": None},
    "distilled": {"method": _DISTILLED, "baseline": _SORTED, "control": _UNSORTED},
    "search": {"method": "searched", "baseline": "uniform", "control": None},
    "front": {"method": _DISTILLED, "baseline": _SHORT, "control": None},
    "untrained": {"method": _SORTED, "baseline": _UNSORTED, "control": None},
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed."""

    def mean(key: str):
        return lambda run: float(np.mean(run.get(key, math.nan)))  # what a kind lacks is no number

    of = {"sum": "few", "each": "few", "sorted": "mean", "distilled": "mean", "front": "front"}
    of["untrained"] = "before"
    made = {id: paired(runs, *_sides(id), mean(key)) for id, key in of.items()}
    found = [run for run in matching(runs, **_DISTILLED) if "searched" in run]
    made["search"] = [Pair(run["seed"], run["searched"], run["uniform"]) for run in found]
    return made


def _sides(id: str) -> tuple[dict, dict]:
    return ROLES[id]["method"], ROLES[id]["baseline"]
