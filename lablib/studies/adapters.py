"""Methods of the Adapters library against full fine-tuning, capacity and rate, and three in one.

Two tasks: movies, kind sentences or harsh ones, and sentence pairs, STS-B, how alike two are.
MiniLM's lower four blocks are computed once; the upper two get a method at the library's sizes, and
a new head. Documentation: `tiny-1m` gets bottlenecks of three widths, at several rates each. In
parallel: three adapters in the upper two blocks, in one pass and in three.

Tuned on one seed, by the held-out loss: five rates for each method, for full fine-tuning and for
each task, and one more beyond the two bests that stood at an edge; the head alone has LoRA's. The
method that is judged is the one with the best mean score of both tasks there. The rates of the
capacity study were chosen so that on that seed the best of each width lies inside. An earlier
design, of fewer examples and steps, and with one method on sentence pairs, was judged on other
seeds than these.

Languages: an impression of the library's stacks, on SmolLM2. No claim is judged on it, as the
French reviews come from a collection for personal use. Of four rates the language adapters have
the one that is best for French on the tuning seed; the task adapter's is not tuned.

The prefix trains its rows directly: the network that computes them in the library makes those of
all blocks, most of which do not train here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import astuple
from functools import lru_cache, partial
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

from lablib.compression.calibration import token_losses
from lablib.compression.recover import cross_entropy, recover
from lablib.data import load
from lablib.data.tasks import Example, load_task, parallel
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
    upper_states,
)
from lablib.models.scores import scored
from lablib.peft.adapter import n_trainable, remove_, trainable
from lablib.peft.adapters import Parallel, active, add_, parameters_of
from lablib.peft.adapters_library import METHODS, serial_
from lablib.peft.prefix import prefix_
from lablib.peft.tuning import backbone_above, task_loss, tune
from lablib.resources import measure

BELOW = 4  # MiniLM's blocks that stay as they are
STEPS, DOCS_STEPS = 150, 50
BATCH, DOCS_BATCH = 16, 8
SIZES = {"movies": 1000, "sts-b": 1500}  # examples to learn from
JUDGED = 1000  # other examples
WORDS = 20  # tokens of a sentence, at most
LENGTH = 32  # tokens of a row of documentation
LETTERS = 3000  # of a document, from its beginning
REAL, UPPER = "smollm2-135m-instruct", 2  # blocks that get adapters of languages
READ, HELD = 160, 24  # rows of messages
WORN = ("", "english", "french")
LANGUAGE_RATE, TASK_RATE, LANGUAGE_STEPS = 1e-2, 3e-3, 40
BUILD = METHODS | {"prefix_tuning": partial(prefix_, length=30)}  # the library's "flat" one


def run(
    kind: str,
    seed: int,
    rate: float | None = None,
    rank: int = 2,
    steps: int | None = None,
    judged: int = JUDGED,
    task: str = "movies",
) -> dict:
    """One training, or many.

    kind: "full", "head" or one of `BUILD`, on the task; "thin", a bottleneck of this rank on
        documentation; "rates", all of the task's `RATES`; "all", all of its `TUNED` and "head";
        "docs", bottlenecks of `RANKS` at all rates of `GRID`, and three adapters at once;
        "languages", SmolLM2's language adapters under a task adapter, see `in_french`.
    rate: None takes the tuned one.
    task: "movies", or "sts-b", how alike two sentences are.
    judged: examples, or tenths of rows of documentation, that are held out.
    score: accuracy in %, of sts-b Spearman's rank correlation in %. loss: nats, of sts-b the mean
    square of what runs from -1/2 to 1/2; both on what was held out. Of "thin" nll alone, nats a
    token. learning: numbers that train, without the head. area: the training loss, mean of all
    steps. "all" has a kind's name before each of these, "rates" lists of the first two. "docs" has
    rank_2, rank_16 and so on, a list of nlls, one a rate; parallel_seconds, passes_seconds, of one
    pass and of three; gap, the largest difference of their states.
    """
    if kind == "docs":
        found = {f"rank_{r}": [docs_loss(seed, rate, r) for rate in GRID] for r in RANKS}
        return found | in_parallel(seed)
    if kind == "languages":
        return in_french(seed, rate or LANGUAGE_RATE, steps or LANGUAGE_STEPS, judged // 10)
    if kind == "rates":
        told = {}
        for one, rates in RATES[task].items():
            made = [run(one, seed, rate, steps=steps, judged=judged, task=task) for rate in rates]
            told |= {f"{one}_{key}": [row[key] for row in made] for key in ("score", "loss")}
        return told
    if kind == "all":
        every = (*TUNED[task], "head")
        made = {one: run(one, seed, steps=steps, judged=judged, task=task) for one in every}
        return {f"{one}_{key}": value for one, row in made.items() for key, value in row.items()}
    if kind == "thin":
        found = on_docs(seed, rate or GRID[2], rank, steps or DOCS_STEPS, judged)
    else:
        rate = TUNED[task][LIKE.get(kind, kind)] if rate is None else rate
        found = on_task(task, kind, seed, rate, steps or STEPS, judged)
    model, losses, result = found
    learning = full_size(model) if kind == "full" else n_trainable(model)
    return result | {"learning": learning, "area": round(float(np.mean(losses)), 5)}


def docs_loss(seed: int, rate: float, rank: int) -> float:
    """Held-out nats a token of one training on documentation."""
    return round(on_docs(seed, rate, rank, DOCS_STEPS, JUDGED)[2]["nll"], 5)


def on_task(task: str, kind: str, seed: int, rate: float, steps: int, judged: int):
    """The adapted model, its training losses, and how it did."""
    train, labels, test, truth = sentences_of(seed, judged, task)
    model = copy.deepcopy(mini()[0])
    torch.manual_seed(seed)
    classifier = Classifier(model, 1 if task == "sts-b" else 2, below=BELOW)
    if kind not in ("full", "head"):
        BUILD[kind](model)
    for block in anatomy.blocks(model)[:BELOW]:
        remove_(block)
    names = backbone_above(classifier, BELOW) if kind == "full" else learned(classifier)
    options = {"batch": BATCH, "seed": seed, "trainable": names}
    losses = tune(classifier, train, labels, steps, rate, **options)
    made = predicted(classifier, test)
    scores = scored(made, truth)
    score, loss = scores["spearman" if task == "sts-b" else "accuracy"], task_loss(made, truth)
    return model, losses, {"score": round(100 * score, 4), "loss": round(loss.item(), 6)}


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
    train, held_out = rows_of(seed, DOCS_BATCH * steps, judged // 10)
    model = copy.deepcopy(tiny()[0])
    torch.manual_seed(seed)
    serial_(model, anatomy.embedding(model).weight.shape[1] // rank)
    options = {"batch": DOCS_BATCH, "trainable": list(trainable(model)), "seed": None}
    losses = recover(model, train, steps, rate, **options)
    return model, losses, {"nll": token_losses(model, held_out, 32).mean().item()}


def in_parallel(seed: int) -> dict:
    """Three adapters over the same lower blocks: one pass, and three."""
    texts = [example.text for example in examples_of(seed, 40)]
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


def in_french(seed: int, rate: float, steps: int, judged: int) -> dict:
    """A task adapter that was trained above an adapter of English, put above one of French.

    SmolLM2's last UPPER blocks get both language adapters, each trained on the next token of the
    same messages in its language; then, above the English one, an adapter and a head that tell kind
    movie sentences from harsh ones. No French review is read before they are judged.
    english, french: nats a token of held-out messages; movies, reviews: accuracy in % of the task.
        Each a list, with none, the English and the French adapter.
    rate: of the language adapters. judged: sentences, as many reviews.
    """
    model, tokenizer = pretrained(REAL)
    below = len(anatomy.blocks(model)) - UPPER
    torch.manual_seed(seed)
    for name in ("english", "french", "task"):
        add_(model, name, "seq_bn", below=below)
    told: dict = {}
    for name, rows in messages(tokenizer, seed).items():
        loss, places = reading(model, rows, below), torch.arange(len(rows))[:, None]
        options = {"batch": 8, "trainable": parameters_of(model, name), "seed": seed}
        with stacked(model, name):
            recover(model, places[HELD:], steps, rate, loss=loss, **options)
        told[name] = []
        for language in WORN:
            with stacked(model, language), torch.no_grad():
                told[name] += [round(loss(model, places[:HELD]).item(), 5)]
    classifier = Classifier(model, 2, below=below)
    names = [f"model.{n}" for n in parameters_of(model, "task")] + ["head.weight", "head.bias"]
    learned = examples_of(seed, 4 * judged)
    with stacked(model, "english", "task"):
        options = {"batch": 8, "trainable": names, "seed": seed}
        texts, labels = states_of(model, tokenizer, learned, below)
        tune(classifier, texts, labels, 2 * steps, TASK_RATE, **options)
    for key, task in (("movies", "movies"), ("reviews", "reviews-fr")):
        test = examples_of(seed, judged, "test", task)
        texts, truth = states_of(model, tokenizer, test, below)
        told[key] = []
        for language in WORN:
            with stacked(model, language, "task"):
                right = scored(predicted(classifier, texts), truth)["accuracy"]
            told[key] += [round(100 * right, 4)]
    return told


def stacked(model: nn.Module, *names: str):
    """A context: these adapters, one above another; "" is none."""
    names = tuple(name for name in names if name)
    return active(model, f"Stack({', '.join(names)})") if names else nullcontext()


def states_of(model, tokenizer, examples: list[Example], below: int) -> tuple[Encoded, Tensor]:
    """Texts as the lower blocks leave them, and their labels."""
    encoded = encode(tokenizer, [example.text for example in examples], length=2 * WORDS)
    labels = torch.tensor([example.label for example in examples])
    return cached_below(model, encoded, below, batch=16), labels


def messages(tokenizer, seed: int) -> dict[str, Tensor]:
    """Rows (HELD + READ, LENGTH + 1) of a program's messages, in either language; HELD come first.

    Held out are messages of a split of their own.
    """
    train, _, test = parallel(["fr"])
    made, draw = {"english": [], "french": []}, np.random.default_rng(seed)
    for part, n in ((test, HELD), (train, READ)):
        order = draw.permutation(len(part))
        for place, rows in enumerate(made.values()):
            texts = [f"{part[i][place]}\n" for i in order]
            ids = [token for text in texts for token in tokenizer.encode(text)]
            rows.append(torch.tensor(ids[: n * (LENGTH + 1)]).view(n, LENGTH + 1))
    return {name: torch.cat(rows) for name, rows in made.items()}


def reading(model: nn.Module, rows: Tensor, below: int) -> Callable[..., Tensor]:
    """Nats a token of some rows, a function of (model, places); the lower blocks run once."""
    whole = torch.ones_like(rows[:, 1:], dtype=torch.bool)
    known = cached_below(model, Encoded(rows[:, :-1], whole), below, batch=16)

    def loss(model: nn.Module, places: Tensor) -> Tensor:
        states = upper_states(model, known.at(places[:, 0]), below)
        return cross_entropy(anatomy.head(model)(states), rows[places[:, 0]])

    return loss


@lru_cache(maxsize=1)
def mini():
    """MiniLM and its tokenizer."""
    return encoder()


@lru_cache(maxsize=1)
def tiny():
    """The house's small decoder and its tokenizer."""
    return pretrained("tiny-1m")


def examples_of(seed: int, n: int, part: str = "train", task: str = "movies") -> list[Example]:
    """A seed's examples of a task, short ones first."""
    train, validation, test = load_task(task)
    examples = train if part == "train" else [*validation, *test]
    places = np.random.default_rng(seed).choice(len(examples), n, replace=False)
    return sorted((examples[i] for i in places), key=lambda e: len(e.text) + len(e.pair))


@lru_cache(maxsize=1)
def sentences_of(seed: int, judged: int, task: str) -> tuple[Encoded, Tensor, Encoded, Tensor]:
    """Examples to learn from and to judge on, as MiniLM's lower blocks leave them, and labels."""
    model, tokenizer = mini()
    made = []
    for part, n in (("train", min(SIZES[task], 2 * judged)), ("test", judged)):
        texts, labels, pairs, _ = zip(*map(astuple, examples_of(seed, n, part, task)), strict=True)
        encoded = encode(tokenizer, texts, pairs, WORDS if task == "movies" else 2 * WORDS)
        labels = torch.tensor(labels)
        made += [cached_below(model, encoded, BELOW)]
        made += [labels / 5 - 0.5 if task == "sts-b" else labels]
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
BOTTLENECK, SPARE = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
GRIDS = {
    "full": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    "double_seq_bn": BOTTLENECK,
    "par_bn": BOTTLENECK,
    "lora": SPARE,
    "prefix_tuning": SPARE,
    "compacter": SPARE,
    "ia3": SPARE,
}
RATES = {"movies": GRIDS, "sts-b": GRIDS}
TUNED = {
    "movies": {
        "full": 1e-4,
        "double_seq_bn": 1e-3,
        "par_bn": 3e-4,
        "lora": 3e-3,
        "prefix_tuning": 3e-3,
        "compacter": 3e-3,
        "ia3": 3e-3,
    },
    "sts-b": {
        "full": 1e-3,
        "double_seq_bn": 1e-2,
        "par_bn": 3e-3,
        "lora": 1e-2,
        "prefix_tuning": 1e-2,
        "compacter": 3e-2,
        "ia3": 1e-1,
    },
}
LIKE = {"head": "lora"}  # whose rate a kind takes
NAMES = {  # in words
    "par_bn": "bottleneck beside the mlp",
    "double_seq_bn": "bottleneck behind both",
    "lora": "LoRA",
    "compacter": "Compacter",
    "ia3": "(IA)³",
    "prefix_tuning": "prefix",
    "head": "no adapter",
}
BEST = "lora"  # of the methods, on the tuning seed
RANKS = (2, 16, 128)
GRID = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)  # of rates, for each rank

SEEDS = range(5, 10)
POINTS = [
    *grid(kind="thin", seed=SEEDS[0], rank=4, rate=GRID[2]),  # short enough to be repeated
    *grid(kind="all", task=("movies", "sts-b"), seed=SEEDS),
    *grid(kind="docs", seed=SEEDS),
    *grid(kind="languages", seed=SEEDS),
]
TUNING = [
    *grid(kind="rates", seed=100, task=("movies", "sts-b"), judged=800),
    *grid(kind="par_bn", seed=100, task="movies", rate=1e-4, judged=800),  # beyond the edge
    *grid(kind="ia3", seed=100, task="sts-b", rate=3e-1, judged=800),
    *grid(kind="languages", seed=100, rate=(1e-3, 3e-3, 1e-2, 3e-2)),
]
CANARY = {"kind": "lora", "seed": 200, "rate": 1e-3, "steps": 2, "judged": 40}

ROLES = {  # where there is no control, it would need a second thin bottleneck, or adapters in turns
    "competitive": {
        "method": f"{BEST}_score",
        "baseline": "full_score",
        "control": "head_score",  # nothing added
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
    docs = matching(runs, kind="docs")
    return {
        "competitive": within_margin(runs),
        "capacity-rate": pairs_of(docs, "capacity-rate", best_rate),
        "parallel-time": pairs_of(docs, "parallel-time", float),
    }


def within_margin(runs: list) -> list[Pair]:
    """A pair a seed, means of both tasks: the method's score and MARGIN; full fine-tuning's."""
    means: dict[int, list] = {}
    for run in matching(runs, kind="all"):
        both = run[ROLES["competitive"]["method"]] + MARGIN, run["full_score"]
        means.setdefault(run["seed"], []).append(both)
    return [Pair(seed, *map(float, np.mean(rows, 0))) for seed, rows in means.items()]


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
