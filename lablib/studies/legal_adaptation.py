"""The study of prefix domain adaptation (2022): does a prefix that has read licences learn faster?

`tiny-1m`, a decoder that was trained on Shakespeare, the Bible, and Python's documentation and
source, meets licences and notices. A seed is an order of the text that is read without labels, a
draw of labelled texts, their order, and the start of what trains. Texts are cut after the first
tokens, and read by the mean of the last states; test sets are balanced, and the same for all seeds.
Texts that share half of their runs of eight words are in one split (`lablib.data.tasks`).

All ways train for as many steps on as many texts. The prefix from scratch starts where the reading
starts: at what the untrained MLP computes. Full domain adaptation reads the same rows, for as many
steps. On one tuning seed each reading had three rates, tried by hand, by the loss on held-out
licences; then each way had four rates on the validation splits. Accuracies differ less between
neighboring rates than between draws of labels, so the two ways that train a prefix share a rate, as
do those that train all weights, and those that train the last layer alone: that with the best mean
accuracy over both ways, the three legal tasks, and two counts of labels. Alone, with eight labels,
the prefix from scratch did best at a larger one, so it has runs at that, too, made when the others
were known; beyond it both prefixes had a fifth rate, which was worse. A lower rate would have
served the losses of all of them better, and left the order of the ways nearly the same. Neither the
number of steps nor the length of the prefix was tuned. Sixteen labels were added last.

Tried on the tuning seed and left: the last token's state in place of the mean, with which no way
did much better than chance with few labels; texts of twice the length, better for all ways and
twice as dear; training the prefix's rows themselves while it reads, slower than through the MLP.

Two legal tasks were added when all else was known, clauses and families of licences
(`lablib.data.legal`), at the same rates, with eight labels a class and 32. Then came `tiny-4m`,
with eight labels and the three legal tasks. There every way has its own best of five rates on the
tuning seed, by accuracy; each reading had four, by the loss on held-out licences, tried by hand,
and no best one was an edge.

Smaller than the specification has it, for time: few seeds, a short reading. SmolLM2's prefix, which
read for longer, is judged in the lab alone, by a layer on top.
"""

from __future__ import annotations

import copy
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lablib.compression.calibration import token_losses
from lablib.compression.recover import recover
from lablib.data import legal as legal_tasks
from lablib.data.tasks import (
    Example,
    Splits,
    few_shot,
    licence_texts,
    load_task,
    with_near_copies,
)
from lablib.evidence import Pair, grid
from lablib.evidence.studies import against
from lablib.models import pretrained
from lablib.models.classifier import Classifier, Encoded, cached_below, encode, predicted
from lablib.models.scores import scored
from lablib.peft import legal_adaptation as legal
from lablib.peft.adapter import n_trainable
from lablib.peft.prefix import drop_mlp_, prefix_
from lablib.peft.tuning import tune

LENGTH = 8  # rows of the prefix
HIDDEN = 64  # of the MLP that computes them while they read
WORDS = 64  # tokens of a text, at most, and of a row that is read
SEEN = 400  # letters: more than so many tokens hold
LETTERS = 1000  # of a licence that is read, from its beginning
READING, STEPS, BATCH = 240, 60, 8  # steps without labels, steps with them, texts a step
HELD_OUT = 96  # rows of licences on which a reading is judged, of as many licences at most
JUDGED = 120  # texts a class, at most, on which a classifier is
LEGAL = ("category", "notices", "kind")
MORE = ("clause", "family")  # also legal, added when the others were known
TASKS = {"category": 4, "notices": 3, "kind": 2, "hedges": 2}  # and their classes
TASKS |= {"clause": len(legal_tasks.CLAUSES), "family": len(legal_tasks.FAMILIES)}
READERS = {"adapted": "prefix", "read-head": "prefix", "full-adapted": "full"}


def run(
    kind: str,
    n: int | str,
    seed: int,
    rate: float | None = None,
    part: str = "test",
    tasks: str = " ".join(LEGAL),
    steps: int = STEPS,
    reading: int = READING,
    place: int | None = None,
    model: str = "tiny-1m",
) -> dict:
    """One way, with n labels a class of each task, or all ways.

    kind: "scratch", a prefix from scratch; "adapted", one that has read; "full", all weights;
        "full-adapted", the same after all weights have read; "head", the classifier alone;
        "read-head", the same above a prefix that has read, and stays. "all": each of these, with
        each n of a text such as "8 32"; keys then begin with the way and n. With 8, hedges, too.
        "more": the same on the two tasks of MORE; keys begin with the way, "more" and n.
        "own": three of them, the prefix from scratch at SCRATCH; keys begin with "scratch_own".
        "larger": five of them on LARGER, each at its own rate; keys begin with "scratch_larger".
    part: "test" or "validation". tasks: names, with a space between. reading, steps: without and
    with labels. place: of the rate among those that are tried. model: the decoder.

    loss: of held-out licences, nats a token, after the reading. learning: numbers that train, the
    classifier apart. Of each task, and without a task's name the mean over the legal ones:
    accuracy and ece (expected calibration error), %; nll, nats; steps_to: steps until the training
    loss is half of what guessing costs; curve: the training loss of six parts.
    """
    if kind in ("all", "more"):
        told, more = {}, kind == "more"
        for count, name in ((count, name) for count in n.split() for name in TUNED):
            chosen = " ".join(MORE) if more else tasks
            if count == "8" and part == "test" and not more:
                chosen = " ".join((*LEGAL, "hedges"))
            tried = rate if place is None else RATES[name][place]
            row = run(name, int(count), seed, tried, part, chosen, steps, reading, model=model)
            about = f"{name}_{kind}{count}" if more else f"{name}_{count}"
            told |= {f"{about}_{key}": value for key, value in row.items()}
        return told
    if kind == "larger":
        rates = {k: BEST_LARGER[k] if place is None else r[place] for k, r in TRIED_LARGER.items()}
        few = tasks, steps, reading
        rows = {k: run(k, n, seed, r, part, *few, model=LARGER) for k, r in rates.items()}
        kept = ("loss", "learning", "accuracy", "ece", "nll", "steps_to")  # the file has a limit
        return {f"{k}_larger_{key}": row[key] for k, row in rows.items() for key in kept}
    if kind == "own":
        rates = {"adapted": None, "scratch": SCRATCH, "head": None}
        few = tasks, steps, reading
        rows = {k: run(k, n, seed, r, part, *few, model=model) for k, r in rates.items()}
        return {f"{k}_own_{key}": value for k, row in rows.items() for key, value in row.items()}
    start = read(READERS.get(kind, "none"), seed, reading, model)
    rate = TUNED[kind] if rate is None else rate
    rows = {task: judged(kind, start, task, n, seed, rate, part, steps) for task in tasks.split()}
    told = {"loss": round(start.loss, 5), "learning": next(iter(rows.values()))["learning"]}
    curves = {task: row.pop("curve") for task, row in rows.items()}
    ours = [task for task in rows if task != "hedges"]
    for task, row in rows.items():
        told |= {f"{task}_{key}": round(v, 4) for key, v in row.items() if isinstance(v, float)}
    for key in ("accuracy", "ece", "nll", "steps_to"):
        told[key] = round(float(np.mean([rows[task][key] for task in ours])), 5)
    curve = np.mean([curves[task] for task in ours], 0)
    return told | {"curve": [round(float(c), 3) for c in curve]}


@lru_cache(maxsize=3)
def read(name: str, seed: int, steps: int, of: str = "tiny-1m") -> legal.Start:
    """name: "prefix" lets a prefix alone read, "full" all weights, "none" nothing. of: decoder."""
    model, prefix, losses = copy.deepcopy(tiny(of)[0]), None, []
    rate = (READING_LARGER if of == LARGER else READING_RATE).get(name)
    train, held_out = text_of(seed, steps * BATCH)
    if name == "prefix":
        options = {"hidden": HIDDEN, "batch": BATCH, "seed": seed}
        losses = legal.adapt_(model, train, LENGTH, steps, rate, **options)
        prefix = legal.prefix_of(model)
    elif name == "full":
        losses = recover(model, train, steps, rate, batch=BATCH, seed=seed)
    loss = token_losses(model, held_out, 32).mean().item()
    plain = copy.deepcopy(tiny(of)[0]) if name == "prefix" else model
    return legal.Start(plain, prefix, loss, losses)


def judged(
    kind: str, start: legal.Start, task: str, n: int, seed: int, rate: float, part: str, steps: int
) -> dict:
    """A classifier of one task, trained on n texts a class, and its scores."""
    classifier, names = built(kind, start, task, seed)
    learning = n_trainable(classifier) if names is None else 0
    train = few_shot(splits_of(task).train, n, seed)
    few, test = encoded(train), encoded(texts(task, part))
    if kind in ("head", "read-head"):
        few, test = (cached_below(classifier.model, one, classifier.below) for one in (few, test))
    elif names is not None:
        learning = sum(p.numel() for p in classifier.model.parameters())
    options = {"batch": BATCH, "seed": seed, "trainable": names}
    losses = tune(classifier, few, labels_of(train), steps, rate, **options)
    scores = scored(predicted(classifier, test), labels_of(texts(task, part)))
    half = np.log(TASKS[task]) / 2
    return {
        "accuracy": 100 * scores["accuracy"],
        "ece": 100 * scores["ece"],
        "nll": scores["nll"],
        "steps_to": float(legal.steps_until(losses, half, min(5, steps))),
        "curve": sixths(losses),
        "learning": learning,
    }


def built(
    kind: str, start: legal.Start, task: str, seed: int
) -> tuple[Classifier, list[str] | None]:
    """A classifier that nothing has trained yet, and the names of what will; None: its prefix."""
    model = copy.deepcopy(start.model)
    torch.manual_seed(seed)
    if kind == "scratch":
        prefix_(model, LENGTH, mlp=HIDDEN)
        drop_mlp_(model)
    elif start.prefix is not None:
        legal.start_(model, start.prefix)
    alone = kind in ("head", "read-head")
    below = len(model.blocks) if alone else 0
    classifier = Classifier(model, TASKS[task], below=below)
    if kind in ("scratch", "adapted"):
        return classifier, None
    return classifier, [n for n, _ in classifier.named_parameters() if not alone or "head." in n]


def sixths(losses: list[float]) -> list[float]:
    """Means of six parts."""
    parts = np.array_split(losses, min(6, len(losses))) if losses else []
    return [round(float(part.mean()), 4) for part in parts]


@lru_cache(maxsize=3)
def tiny(name: str = "tiny-1m"):
    """One of the house's small decoders and its tokenizer, which they share."""
    return pretrained(name)


@lru_cache(maxsize=4)
def splits_of(task: str) -> Splits:
    """One of the three legal tasks, or the one outside the domain."""
    if task in MORE:
        return {"clause": legal_tasks.clauses, "family": legal_tasks.families}[task]()
    if task != "kind":
        return load_task({"category": "licences"}.get(task, task))
    both = zip(load_task("licences-all"), load_task("notices"))  # a whole licence, or a notice
    kinds = ([Example(e.text, n) for n, part in enumerate(two) for e in part] for two in both)
    return apart(Splits(*kinds))


def apart(splits: Splits) -> Splits:
    """Without what nearly repeats a training text; of each text, what a classifier may see."""
    cut = [Example(e.text[:SEEN], e.label) for part in splits for e in part]
    sources = [example.source for example in with_near_copies(cut)]
    known, rest = set(sources[: len(splits.train)]), iter(zip(sources, cut))
    train, *others = ([next(rest) for _ in part] for part in splits)
    kept = ([pair for pair in part if pair[0] not in known] for part in others)
    return Splits(*([example for _, example in part] for part in (train, *kept)))


@lru_cache(maxsize=8)
def texts(task: str, part: str) -> tuple[Example, ...]:
    """A balanced part of a split: what classifiers are judged on, the same for all seeds."""
    examples = getattr(splits_of(task), part)
    fewest = min(np.bincount([example.label for example in examples]))
    return tuple(few_shot(examples, min(int(fewest), JUDGED), 0))


def encoded(examples) -> Encoded:
    """Their first tokens."""
    return encode(tiny()[1], [example.text for example in examples], length=WORDS)


def labels_of(examples) -> Tensor:
    """(n,) int64."""
    return torch.tensor([example.label for example in examples])


@lru_cache(maxsize=1)
def licences() -> tuple[Tensor, Tensor]:
    """Rows (n, WORDS + 1) of licences: to read, and HELD_OUT of them."""
    made, (train, held_out) = [], licence_texts()
    for documents in (train, held_out[:HELD_OUT]):
        ids = [tiny()[1].encode(document.text[:LETTERS]) for document in documents]
        cut = [row[i : i + WORDS + 1] for row in ids for i in range(0, len(row), WORDS + 1)]
        made.append(torch.tensor([row for row in cut if len(row) == WORDS + 1]))
    return tuple(made)


def text_of(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """A seed's rows to read, and the rows that judge any reading."""
    train, held_out = licences()
    chosen = np.random.default_rng(seed).choice(len(train), count, replace=False)
    same = np.random.default_rng(0).choice(len(held_out), HELD_OUT, replace=False)
    return train[chosen], held_out[same]  # the same held-out rows for every seed


MARGIN = 2.0  # points of accuracy that count as none
READING_RATE = {"prefix": 3e-2, "full": 3e-3}
RATES = {  # the last of each was added where a first choice was on an edge
    "scratch": (3e-3, 1e-2, 3e-2, 1e-1),
    "adapted": (3e-3, 1e-2, 3e-2, 1e-1),
    "full": (1e-4, 3e-4, 1e-3, 3e-3),
    "full-adapted": (1e-4, 3e-4, 1e-3, 3e-3),
    "head": (1e-2, 3e-2, 1e-1, 3e-3),
    "read-head": (1e-2, 3e-2, 1e-1, 3e-3),
}
TUNED = {
    "scratch": 3e-2,
    "adapted": 3e-2,
    "full": 1e-3,
    "full-adapted": 1e-3,
    "head": 1e-2,
    "read-head": 1e-2,
}

LARGER = "tiny-4m"
READING_LARGER = {"prefix": 1e-2, "full": 3e-3}
TRIED_LARGER = {  # the last was added for the sake of those whose best was an edge
    "adapted": (3e-3, 1e-2, 3e-2, 1e-1, 1e-3),
    "scratch": (3e-3, 1e-2, 3e-2, 1e-1, 1e-3),
    "full": (1e-4, 3e-4, 1e-3, 3e-3, 3e-5),
    "full-adapted": (1e-4, 3e-4, 1e-3, 3e-3, 3e-5),
    "head": (1e-2, 3e-2, 1e-1, 3e-3, 3e-1),
}
BEST_LARGER = {"adapted": 3e-3, "scratch": 3e-2, "full": 3e-4, "full-adapted": 3e-4, "head": 1e-1}
COUNTS = (8, 16, 32, 64)  # labels a class
SCRATCH = 1e-1  # the rate that is best for a prefix from scratch alone
SEEDS = range(5)
POINTS = [
    {"kind": "head", "n": 8, "seed": 0, "tasks": "category"},
    *grid(kind="all", n=("8 32 64", "16"), seed=SEEDS),
    *grid(kind="own", n=8, seed=SEEDS),
    *grid(kind="more", n="8 32", seed=SEEDS),
    *grid(kind="larger", n=8, seed=SEEDS),
]
TUNING = grid(kind="all", n="8 32", seed=100, part="validation", place=range(4))
TUNING += grid(kind=("scratch", "adapted"), n=(8, 32), seed=100, part="validation", rate=3e-1)
TUNING += grid(kind="larger", n=8, seed=100, part="validation", place=range(5))
CANARY = {
    "kind": "adapted",
    "n": 4,
    "seed": 200,
    "rate": 3e-2,
    "steps": 2,
    "reading": 2,
    "tasks": "category",
}


MINE, HEAD = "adapted_8_accuracy", "head_8_accuracy"
ROLES = {  # controls: a linear layer alone, or a prefix that has not read
    "few-shot": against(MINE, "scratch_8_accuracy", HEAD),
    "full": against(MINE, "full_8_accuracy", HEAD),
    "comparable": against(MINE, HEAD, "scratch_8_accuracy"),
    # A linear layer alone is far better calibrated than full fine-tuning, too, and less accurate.
    "calibration": against("adapted_8_ece", "full_8_ece", "scratch_8_ece"),
    "convergence": against("adapted_8_steps_to", "scratch_8_steps_to", "head_8_steps_to"),
    "few-shot-32": against("adapted_32_accuracy", "scratch_32_accuracy", "head_32_accuracy"),
    "few-shot-16": against("adapted_16_accuracy", "scratch_16_accuracy", "head_16_accuracy"),
    "few-shot-more": against(
        "adapted_more8_accuracy", "scratch_more8_accuracy", "head_more8_accuracy"
    ),
    "few-shot-larger": against(
        "adapted_larger_accuracy", "scratch_larger_accuracy", "head_larger_accuracy"
    ),
    "full-larger": against(
        "adapted_larger_accuracy", "full_larger_accuracy", "head_larger_accuracy"
    ),
    "comparable-larger": against(
        "adapted_larger_accuracy", "full-adapted_larger_accuracy", "scratch_larger_accuracy"
    ),
    "calibration-larger": against("adapted_larger_ece", "full_larger_ece", "scratch_larger_ece"),
    "few-shot-own": against("adapted_own_accuracy", "scratch_own_accuracy", "head_own_accuracy"),
}


def of_seeds(runs: list) -> list[dict]:
    """Each seed's runs of several ways as one."""
    seeds: dict[int, dict] = {}
    for run in runs:
        if run["kind"] in ("all", "own", "more", "larger"):
            seeds.setdefault(run["seed"], {}).update(run)
    return list(seeds.values())


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed."""
    every = of_seeds(runs)
    found = {
        id: [Pair(run["seed"], run[role["method"]], run[role["baseline"]]) for run in every]
        for id, role in ROLES.items()
    }
    for id, mine in {"comparable": MINE, "comparable-larger": MINE.replace("8", "larger")}.items():
        theirs = mine.replace("adapted", "full-adapted")
        found[id] = [Pair(run["seed"], run[mine] + MARGIN, run[theirs]) for run in every]
    return found
