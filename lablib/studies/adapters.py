"""Methods of the Adapters library against full fine-tuning, capacity and rate, and three in one.

Movies: MiniLM with its lower four blocks computed once; the upper two get a method at the
library's sizes, and a new head tells kind sentences from harsh ones. Documentation: `tiny-1m` gets
bottlenecks of three widths, at several rates each. In parallel: three adapters in the upper two
blocks, in one pass and in three.

Tuned on one seed, by the held-out loss. Each method and full fine-tuning had four rates, and where
the least of them was the best, two below it; full fine-tuning had those, too. The method that is
judged is the one with the lowest loss there. The rates of the capacity study were chosen on that
seed, too, so that the best of each width lies inside.

Smaller than the specification has it, for time: sentences about movies alone, no sentence pairs;
few steps, and five seeds. The prefix trains its rows directly: the network that computes them in
the library makes those of all blocks, most of which do not train here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from lablib.compression.calibration import token_losses
from lablib.compression.recover import recover
from lablib.data import load
from lablib.data.tasks import load_task
from lablib.evidence import Pair, grid, matching
from lablib.models import anatomy, pretrained
from lablib.models.classifier import (
    Classifier,
    Encoded,
    cached_below,
    encode,
    encoder,
    last_states,
    predicted,
)
from lablib.models.scores import scored
from lablib.peft.adapter import n_trainable, remove_, trainable
from lablib.peft.adapters import Parallel, active, add_
from lablib.peft.adapters_library import METHODS, serial_
from lablib.peft.prefix import prefix_
from lablib.peft.tuning import backbone_above, tune
from lablib.resources import measure

BELOW = 4  # MiniLM's blocks that stay as they are
STEPS = {"movies": 60, "docs": 50}
BATCH = {"movies": 16, "docs": 8}
SENTENCES = 600  # to learn from
JUDGED = 1000  # other sentences
WORDS = 20  # tokens of a sentence, at most
LENGTH = 32  # tokens of a row of documentation
LETTERS = 3000  # of a document, from its beginning
BUILD = METHODS | {"prefix_tuning": partial(prefix_, length=30)}  # the library's "flat" one


def run(
    kind: str,
    seed: int,
    rate: float | None = None,
    rank: int = 2,
    steps: int | None = None,
    judged: int = JUDGED,
    lower: bool = False,
) -> dict:
    """One training, or many.

    kind: "full", "head" or one of `BUILD`, on movies; "thin", a bottleneck of this rank on
        documentation; "capacity", those of `RANKS` at all rates of `GRID`; "rates", all of `RATES`,
        or where asked of `LOWER`.
        "all" is all of `TUNED`, "head" and "capacity" one after another, and three adapters at
        once.
    rate: None takes the tuned one.
    judged: sentences, or tenths of rows of documentation, that are held out.
    accuracy: %, nll: nats, both on what was held out; of "thin" nll alone, nats a token.
    learning: numbers that train, without the head. area: the training loss, mean of all steps.
    "all" has a kind's name before each of these, "rates" lists of them; "capacity" has rank_2,
    rank_16 and so on, a list of nlls, one a rate.
    parallel_seconds, passes_seconds: of one pass and of three; gap: the largest difference of
    their states.
    """
    if kind == "capacity":
        return {f"rank_{r}": [docs_loss(seed, rate, r) for rate in GRID] for r in RANKS}
    if kind == "rates":
        return {
            f"{one}_nll": [run(one, seed, rate, judged=SENTENCES)["nll"] for rate in rates]
            for one, rates in (LOWER if lower else RATES).items()
        }
    if kind == "all":
        found = run("capacity", seed) | in_parallel(seed)
        told = {one: run(one, seed, steps=steps, judged=judged) for one in [*TUNED, "head"]}
        return found | {f"{one}_{k}": v for one, row in told.items() for k, v in row.items()}
    if kind == "thin":
        found = on_docs(seed, rate or GRID[2], rank, steps or STEPS["docs"], judged)
    else:
        rate = TUNED[LIKE.get(kind, kind)] if rate is None else rate
        found = on_movies(kind, seed, rate, steps or STEPS["movies"], judged)
    model, losses, result = found
    learning = full_size(model) if kind == "full" else n_trainable(model)
    return result | {"learning": learning, "area": float(np.mean(losses))}


def docs_loss(seed: int, rate: float, rank: int) -> float:
    """Held-out nats a token of one training on documentation."""
    return round(on_docs(seed, rate, rank, STEPS["docs"], JUDGED)[2]["nll"], 5)


def on_movies(kind: str, seed: int, rate: float, steps: int, judged: int):
    """The adapted model, its training losses, and how it did."""
    train, labels, test, truth = sentences_of(seed, judged)
    model = copy.deepcopy(mini()[0])
    torch.manual_seed(seed)
    classifier = Classifier(model, 2, below=BELOW)
    if kind not in ("full", "head"):
        BUILD[kind](model)
    for block in anatomy.blocks(model)[:BELOW]:
        remove_(block)
    names = backbone_above(classifier, BELOW) if kind == "full" else learned(classifier)
    options = {"batch": BATCH["movies"], "seed": seed, "trainable": names}
    losses = tune(classifier, train, labels, steps, rate, **options)
    scores = scored(predicted(classifier, test), truth)
    return model, losses, {"accuracy": 100 * scores["accuracy"], "nll": scores["nll"]}


def learned(classifier: Classifier) -> list[str]:
    """Names of what the method brought, and of the head; a shared parameter once."""
    every = [n for n, _ in classifier.named_parameters()]
    brought = trainable(classifier)
    return [n for n in every if n in brought or n.startswith("head.")]


def full_size(model: nn.Module) -> int:
    """Numbers in the upper blocks."""
    return sum(p.numel() for block in anatomy.blocks(model)[BELOW:] for p in block.parameters())


def on_docs(seed: int, rate: float, rank: int, steps: int, judged: int):
    """The same of `tiny-1m`, on documentation."""
    train, held_out = rows_of(seed, BATCH["docs"] * steps, judged // 10)
    model = copy.deepcopy(tiny()[0])
    torch.manual_seed(seed)
    serial_(model, anatomy.embedding(model).weight.shape[1] // rank)
    options = {"batch": BATCH["docs"], "trainable": list(trainable(model)), "seed": None}
    losses = recover(model, train, steps, rate, **options)
    return model, losses, {"nll": token_losses(model, held_out, 32).mean().item()}


def in_parallel(seed: int) -> dict:
    """Three adapters over the same lower blocks: one pass, and three."""
    texts = sentences(seed, 40)[0]
    model, encoded = copy.deepcopy(mini()[0]), encode(mini()[1], texts, length=WORDS)
    torch.manual_seed(seed)
    for name in THREE:
        add_(model, name, "seq_bn", below=BELOW)

    @torch.no_grad()
    def states(composition) -> Tensor:
        with active(model, composition):
            return last_states(model, encoded)

    def passes() -> Tensor:
        return torch.cat([states(name) for name in THREE])

    at_once = partial(states, Parallel(*THREE))
    gap = (at_once() - passes()).abs().max().item()
    times = measure({"parallel": at_once, "passes": passes}, repeats=3)
    return {f"{way}_seconds": median(found) for way, found in times.items()} | {"gap": gap}


@lru_cache(maxsize=1)
def mini():
    """MiniLM and its tokenizer."""
    return encoder()


@lru_cache(maxsize=1)
def tiny():
    """The house's small decoder and its tokenizer."""
    return pretrained("tiny-1m")


def sentences(seed: int, count: int, part: str = "train") -> tuple[list[str], Tensor]:
    """A seed's sentences about movies and their labels, short ones first."""
    train, validation, test = load_task("movies")
    examples = train if part == "train" else [*validation, *test]
    places = np.random.default_rng(seed).choice(len(examples), count, replace=False)
    chosen = sorted((examples[i] for i in places), key=lambda example: len(example.text))
    labels = torch.tensor([example.label for example in chosen])
    return [example.text for example in chosen], labels


@lru_cache(maxsize=1)
def sentences_of(seed: int, judged: int) -> tuple[Encoded, Tensor, Encoded, Tensor]:
    """Sentences to learn from and to judge on, as MiniLM's lower blocks leave them."""
    model, tokenizer = mini()
    made = []
    for part, count in (("train", min(SENTENCES, judged)), ("test", judged)):
        texts, labels = sentences(seed, count, part)
        encoded = encode(tokenizer, texts, length=WORDS)
        made += [cached_below(model, encoded, BELOW), labels]
    return tuple(made)


@lru_cache(maxsize=1)
def documentation() -> tuple[Tensor, Tensor]:
    """Rows (n, LENGTH + 1) of Django's documentation; every fifth document is held out."""
    tokenizer, documents = tiny()[1], [d.text[:LETTERS] for d in load("django-docs")]
    made = []
    for out in (False, True):
        texts = [text for i, text in enumerate(documents) if (i % 5 == 0) is out]
        ids = torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids])
        made.append(ids[: len(ids) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1))
    return tuple(made)


def rows_of(seed: int, count: int, held: int) -> tuple[Tensor, Tensor]:
    """A seed's rows, to learn from and held out."""
    draw = np.random.default_rng(seed)
    both = zip(documentation(), (count, held), strict=True)
    return tuple(rows[draw.choice(len(rows), n, replace=False)] for rows, n in both)


THREE = ("one", "two", "three")
MARGIN = 1.0  # points of accuracy that count as none
BOTTLENECK, SPARE = (1e-3, 3e-3, 1e-2, 3e-2), (3e-3, 1e-2, 3e-2, 1e-1)
RATES = {
    "full": (1e-4, 3e-4, 1e-3, 3e-3),
    "double_seq_bn": BOTTLENECK,
    "par_bn": BOTTLENECK,
    "lora": SPARE,
    "prefix_tuning": SPARE,
    "compacter": SPARE,
    "ia3": (1e-2, 3e-2, 1e-1, 3e-1),
}
LOWER = {  # where the least of `RATES` was the best, and for who they are compared with
    "full": (1e-5, 3e-5),
    "par_bn": (1e-4, 3e-4),
    "lora": (3e-4, 1e-3),
    "ia3": (1e-3, 3e-3),
}
TUNED = {
    "full": 3e-4,
    "double_seq_bn": 3e-3,
    "par_bn": 1e-3,
    "lora": 3e-3,
    "prefix_tuning": 1e-2,
    "compacter": 1e-2,
    "ia3": 1e-2,
}
LIKE = {"head": "lora"}  # whose rate a kind takes
BEST = "lora"  # of the methods, on the tuning seed
RANKS = (2, 16, 128)
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of rates, for each rank

SEEDS = range(5)
POINTS = [
    *grid(kind="thin", seed=0, rank=4, rate=GRID[2]),  # short enough to be repeated
    *grid(kind="all", seed=SEEDS),
]
TUNING = [{"kind": "rates", "seed": 100}, {"kind": "rates", "seed": 100, "lower": True}]
CANARY = {"kind": "lora", "seed": 200, "rate": 1e-3, "steps": 2, "judged": 40}

ROLES = {  # no control is stored: one would need a second thin bottleneck, or adapters in turns
    "competitive": {  # whoever adds nothing is not: it stands in the baseline's place already
        "method": f"{BEST}_accuracy",
        "baseline": "head_accuracy",
        "control": None,
    },
    "capacity-rate": {
        "method": f"rank_{max(RANKS)}",
        "baseline": f"rank_{min(RANKS)}",
        "control": None,
    },
    "parallel-time": {
        "method": "parallel_seconds",
        "baseline": "passes_seconds",
        "control": None,
    },
}


def values(runs: list) -> dict:
    """What each claim is judged on, a pair a seed."""
    every = matching(runs, kind="all")
    best = ROLES["competitive"]["method"]
    return {
        "competitive": [
            Pair(run["seed"], run[best] + MARGIN, run["full_accuracy"]) for run in every
        ],
        "capacity-rate": pairs_of(every, "capacity-rate", best_rate),
        "parallel-time": pairs_of(every, "parallel-time", float),
    }


def pairs_of(runs: list, id: str, number: Callable[..., float]) -> list[Pair]:
    """A pair a seed, of a number of both results."""
    sides = ROLES[id]["method"], ROLES[id]["baseline"]
    return [Pair(run["seed"], *(number(run[side]) for side in sides)) for run in runs]


def best_rate(losses: Sequence[float], rates: Sequence[float] = ()) -> float:
    """Where the loss is least, of a parabola over the rate's logarithm (base 10).

    losses: one a rate of `rates`, `GRID` where there are none. The parabola goes through the best
    rate tried and its two neighbors; at the edge of the grid, it is the edge.
    """
    x, least = np.log10(rates or GRID), int(np.argmin(losses))
    if least in (0, len(losses) - 1):
        return float(x[least])
    around = slice(least - 1, least + 2)
    a, b, _ = np.polyfit(x[around], losses[around], 2)
    return float(-b / (2 * a))
