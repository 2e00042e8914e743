"""The study of the guide (2023): what methods cost, and whether their order survives tuning.

`tiny-1m` learns from Django's documentation, which it was not trained on: one pass over short rows,
with each of the methods of lab 714's table at the size that the catalogue gives it. A seed is a
draw of rows to learn from and of others to judge on, and the start of what trains. "orders" trains
every method twice, at one rate that is the same for all and at the best of six. "costs" counts the
bytes of a training step on rows of a length that goes with the seed, and times inference, in this
thread's own seconds: a method's change is written into the weights first, where that is possible.

All methods were tuned alike, six rates each on another seed, by the loss on held-out rows. Where
the best was the largest, a larger one was tried, too, and not taken: so have all as many tries. The
common rate is a usual one for these methods on large models; it was chosen before any run.

"movies orders" does the same with MiniLM on sentences about movies, on a seed's draw of sentences,
fewer steps than in lab 713: the upper two blocks get each method and a new layer. It was added
when the rest was known, with six rates of its own on one seed. The ladder's best is the smallest
there, the common one. "larger orders" came last: the orders once more in `tiny-4m`, with six rates
of its own on one seed. For the same three methods as before the largest rate is the best one.

Smaller than the specification has it, for time: dozens of steps, five seeds; costs are those of the
smallest decoder.
Of the catalogue's methods those are left out that need a penalty or a schedule of their own,
several tasks, or longer rows.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from lablib.compression.recover import cross_entropy, language_loss, recover
from lablib.data import load
from lablib.evidence import Pair, grid, matching
from lablib.evidence.studies import against
from lablib.models import anatomy, pretrained
from lablib.models.classifier import Classifier, predicted
from lablib.models.scores import scored, spearman
from lablib.peft.adapter import n_trainable, trainable
from lablib.peft.catalogue import Probe, put_, upper
from lablib.peft.peft_guide import MixedAdam, inference_seconds, ready_to_serve, step_bytes
from lablib.peft.tuning import tune
from lablib.studies.peft_review import BELOW, mini, sentences_of
from lablib.studies.peft_review import put_ as put_into

METHODS = (
    "serial adapter",
    "parallel adapter",
    "prefix",
    "(IA)3",
    "LoReFT",
    "ladder side",
    "BitFit",
    "norms",
    "FISH",
    "LoRA",
    "DoRA",
    "VeRA",
    "KronA",
    "intrinsic SAID",
    "Compacter",
)
RIVALS = ("(IA)3", "LoReFT", "DoRA", "KronA")  # their papers report to beat LoRA
STEPS = 40
BATCH = 16
LENGTH = 32  # tokens of a row
HELD_OUT = 128  # rows
LETTERS = 3000  # of a document, from its beginning
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
COMMON = 1e-3  # the one rate of whoever can't try six
LIMIT = 0.8  # a rank correlation that counts as the same order
SLOWER = 1.02  # times the base's seconds that count as none
POINT = 1.0  # of a hundred tokens, what counts as on a par
PARTS = 5  # of the methods, that are tuned together
MOVIES = {"steps": 50, "sentences": 400, "words": 28}  # of the second task, MiniLM's upper blocks
SMALL, LARGER = "tiny-1m", "tiny-4m"
HEAD_RATE = 2e-2  # of a new layer alone, as lab 713 tuned it


def run(
    kind: str,
    seed: int,
    method: str = "LoRA",
    rate: float = 1e-2,
    part: int = 0,
    steps: int = STEPS,
    rows: int = HELD_OUT,
    repeats: int = 24,
) -> dict:
    """One training, or several.

    kind: "one", one method at a rate: nll, nats a token, and accuracy, the share of next tokens
            guessed, in %, both on held-out rows; learning, how many numbers train.
        "rates", a part of the methods at all six rates: "NAME RATE" is the nll.
        "orders", all methods at the common and at the tuned rate: "NAME few" and "NAME tuned" are
            nlls; correlation, of the two orders; limit, what it is compared with; "base", "norms"
            and "LoRA" with "right", the accuracy at the tuned rate; rivals, the mean of `RIVALS`.
        "costs": "NAME bytes" of a step, "NAME seconds" of inference; base is the model alone.
        "all", the last two.
        "movies rates" and "movies orders": as above, of MiniLM on sentences about movies.
        "larger rates" and "larger orders": as above, of `LARGER` on documentation.
    rows: that are held out. repeats: of each time.
    """
    if kind == "one":
        return trained(method, seed, rate, steps, rows)
    of, own = (LARGER, TUNED_ON_LARGER) if kind.startswith("larger") else (SMALL, TUNED)
    learn = partial(trained, steps=steps, rows=rows, of=of)
    learn = on_movies if kind.startswith("movies") else learn
    if kind.endswith("rates"):
        tried = [(name, rate) for name in METHODS[part::PARTS] for rate in RATES]
        return {f"{n} {r:g}": learn(n, seed, r)["nll"] for n, r in tried}
    if kind == "movies orders":
        return orders(seed, learn, TUNED_ON_MOVIES, on_movies("head", seed, HEAD_RATE))
    found = costs(seed, repeats) if kind in ("costs", "all") else {}
    if kind in ("orders", "all", "larger orders"):
        base = judged(tiny(of)[0], rows_of(seed, 1, rows, LENGTH)[1])
        found |= orders(seed, learn, own, base)
    return found


def trained(name: str, seed: int, rate: float, steps: int, rows: int, of: str = SMALL) -> dict:
    """What a method comes to in one pass over a seed's rows."""
    train, held_out = rows_of(seed, BATCH * steps, rows, LENGTH)
    model = adapted(name, seed, train, of)
    ours = {id(p) for p in trainable(model).values()}
    names = [n for n, p in model.named_parameters() if id(p) in ours]  # a shared one once
    recover(model, train, steps, rate, batch=BATCH, trainable=names, seed=None)
    return judged(model, held_out) | {"learning": n_trainable(model)}


def adapted(name: str, seed: int, train: Tensor, of: str = SMALL) -> nn.Module:
    """A copy of the model with a method in it; "base" is none."""
    model = copy.deepcopy(tiny(of)[0])
    torch.manual_seed(seed)
    if name != "base":
        put_(model, name, Probe(train[: 4 * BATCH].split(BATCH), language_loss))
    return model


@torch.no_grad()
def judged(model: nn.Module, held_out: Tensor) -> dict:
    """nll and accuracy on held-out rows."""
    model.eval()
    told = torch.cat([anatomy.logits(model, part[:, :-1]) for part in held_out.split(32)])
    right = (told.argmax(-1) == held_out[:, 1:]).float().mean().item()
    return {"nll": cross_entropy(told, held_out).item(), "accuracy": 100 * right}


def orders(seed: int, learn: Callable, rates: dict[str, float], base: dict) -> dict:
    """Every method at the common rate and at its own; base: what it would be without any."""
    found, right = {}, {}
    for name in METHODS:
        told = {rate: learn(name, seed, rate) for rate in {COMMON, rates[name]}}
        found |= {f"{name} few": told[COMMON]["nll"], f"{name} tuned": told[rates[name]]["nll"]}
        right |= {f"{name} right": told[rates[name]]["accuracy"]}
    few, tuned = (torch.tensor([found[f"{n} {what}"] for n in METHODS]) for what in WAYS)
    found |= {"correlation": spearman(few, tuned), "limit": LIMIT, "base nll": base["nll"]}
    for what in WAYS:
        found[f"rivals {what}"] = float(np.mean([found[f"{name} {what}"] for name in RIVALS]))
    return found | right | {"base right": base["accuracy"]}


def on_movies(name: str, seed: int, rate: float) -> dict:
    """A method in MiniLM's upper blocks, and a new layer; nll and accuracy on other sentences."""
    steps, count, words = MOVIES.values()
    train, labels, test, truth = sentences_of(seed, count, words)
    torch.manual_seed(seed)
    classifier = Classifier(upper(mini()[0], BELOW), 2)
    put_into(classifier, name, train, labels)
    ours = {id(p) for p in trainable(classifier.model).values()}
    ours |= {id(p) for p in classifier.head.parameters()}
    names = [n for n, p in classifier.named_parameters() if id(p) in ours]  # a shared one once
    tune(classifier, train, labels, steps, rate, batch=count // steps, seed=seed, trainable=names)
    scores = scored(predicted(classifier, test), truth)
    return {"nll": round(scores["nll"], 5), "accuracy": round(100 * scores["accuracy"], 3)}


def costs(seed: int, repeats: int) -> dict:
    """Bytes of a training step and seconds of inference, on rows as long as the seed says."""
    rows = rows_of(seed, 8, 8, LENGTH + 16 * (seed % 8))[1]
    models = {name: adapted(name, seed, rows) for name in ("base", *METHODS)}
    found = {f"{n} bytes": step_bytes(model, rows)["total"] for n, model in models.items()}
    served = {name: ready_to_serve(model) for name, model in models.items()}
    times = inference_seconds(served, rows[:4, :-1], repeats, time.thread_time)
    return found | {f"{name} seconds": value for name, value in times.items()}


@lru_cache(maxsize=3)
def tiny(name: str = SMALL):
    """One of the house's small decoders and its tokenizer, which they share."""
    return pretrained(name)


@lru_cache(maxsize=2)
def documentation(length: int) -> tuple[Tensor, Tensor]:
    """Rows (n, length + 1) of Django's documentation; every fifth document is held out."""
    tokenizer, documents = tiny()[1], [d.text[:LETTERS] for d in load("django-docs")]
    parts = [[t for i, t in enumerate(documents) if (i % 5 == 0) is out] for out in (False, True)]
    made = []
    for texts in parts:
        ids = torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids])
        made.append(ids[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1))
    return tuple(made)


def rows_of(seed: int, count: int, held: int, length: int) -> tuple[Tensor, Tensor]:
    """A seed's rows, to learn from and held out."""
    draw = np.random.default_rng(seed)
    train, held_out = documentation(length)
    kept = held_out[draw.choice(len(held_out), held, replace=False)]
    return train[draw.choice(len(train), count, replace=False)], kept


WAYS = ("few", "tuned")
TUNED = {
    "serial adapter": 3e-2,
    "parallel adapter": 3e-2,
    "prefix": 3e-1,
    "(IA)3": 3e-1,
    "LoReFT": 3e-2,
    "ladder side": 3e-2,
    "BitFit": 1e-1,
    "norms": 1e-1,
    "FISH": 3e-2,
    "LoRA": 3e-2,
    "DoRA": 3e-2,
    "VeRA": 3e-1,
    "KronA": 1e-1,
    "intrinsic SAID": 3e-2,
    "Compacter": 1e-1,
}
TUNED_ON_MOVIES = {
    "serial adapter": 1e-2,
    "parallel adapter": 1e-2,
    "prefix": 1e-2,
    "(IA)3": 1e-2,
    "LoReFT": 1e-2,
    "ladder side": 1e-3,
    "BitFit": 1e-2,
    "norms": 3e-2,
    "FISH": 3e-3,
    "LoRA": 1e-2,
    "DoRA": 1e-2,
    "VeRA": 1e-1,
    "KronA": 1e-2,
    "intrinsic SAID": 3e-2,
    "Compacter": 3e-2,
}
TUNED_ON_LARGER = TUNED | {"serial adapter": 1e-2, "BitFit": 3e-2, "FISH": 1e-2}
SEEDS = range(5)
POINTS = [
    *grid(kind="one", seed=0, method="LoRA", rate=1e-2),
    *grid(kind=("all", "movies orders", "larger orders"), seed=SEEDS),
]
EDGE = {"prefix": 1.0, "(IA)3": 1.0, "VeRA": 1.0}  # a rate more, where the best is the largest
TUNING = [
    *grid(kind=("rates", "movies rates", "larger rates"), seed=100, part=range(PARTS)),
    *[{"kind": "one", "seed": 100, "method": name, "rate": rate} for name, rate in EDGE.items()],
]
CANARY = {"kind": "one", "seed": 200, "method": "Compacter", "rate": 1e-3, "steps": 2, "rows": 8}


ROLES = {
    # The control trains more numbers, too, but inside. A parallel adapter, also inside, would do.
    "side": against("ladder side bytes", "LoRA bytes", "serial adapter bytes"),
    "overhead": against("serial adapter seconds", "base seconds", "LoRA seconds"),  # merged
    "merged": against("LoRA seconds", "serial adapter seconds", "parallel adapter seconds"),
    # No correlation by chance is stored; and a model that nothing trains has a higher loss, too.
    "few-tries": against("correlation", "limit", None),
    "beat-lora": against("rivals few", "LoRA few", None),
    "beat-lora-tuned": against("rivals tuned", "LoRA tuned", "rivals few"),
    # What nothing trains stands in the baseline's place already.
    "norms-are-strong": against("norms right", "base right", None),
    "few-tries-movies": against("correlation", "limit", None),
    "beat-lora-movies": against("rivals few", "LoRA few", None),
    "beat-lora-tuned-movies": against("rivals tuned", "LoRA tuned", "rivals few"),
    "few-tries-larger": against("correlation", "limit", None),
    "beat-lora-larger": against("rivals few", "LoRA few", None),
    "beat-lora-tuned-larger": against("rivals tuned", "LoRA tuned", "rivals few"),
    "norms-larger": against("norms right", "base right", None),
    "norms-movies": against("norms right", "base right", None),
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed, or a number."""
    every = matching(runs, kind="all")
    movies, larger = (matching(runs, kind=f"{text} orders") for text in ("movies", "larger"))
    texts = {"movies": movies, "larger": larger}
    found = {
        id: pairs_of(texts.get(id.split("-")[-1], every), of["method"], of["baseline"])
        for id, of in ROLES.items()
    }
    merged = pairs_of(every, ROLES["merged"]["method"], "base seconds")
    found["merged"] = [pair._replace(baseline=SLOWER * pair.baseline) for pair in merged]
    strong = {"norms-are-strong": every, "norms-movies": movies, "norms-larger": larger}
    for id, rows in strong.items():
        norms = pairs_of(rows, "norms right", "LoRA right")
        found[id] = [pair._replace(method=pair.method + POINT) for pair in norms]
    return found | {"bytes": [sum(adam_bytes().values())]}


def adam_bytes() -> dict[str, float]:
    """What mixed-precision Adam holds between two steps, by kind, in bytes a number that trains."""
    weight = nn.Parameter(torch.ones(300, 200, dtype=torch.bfloat16))
    adam = MixedAdam([weight], rate=1e-3)
    weight.square().mean().backward()
    adam.step()
    return {kind: held / weight.numel() for kind, held in adam.held().items()}


def losses_of(tuning: list, kind: str = "rates") -> dict[str, dict[str, float]]:
    """Method -> rate -> nll of the tuning runs, the mean over their seeds."""
    found = {}
    for name in METHODS:
        keys = {f"{rate:g}": f"{name} {rate:g}" for rate in RATES}
        mine = [run for run in matching(tuning, kind=kind) if keys[f"{COMMON:g}"] in run]
        found[name] = {r: float(np.mean([run[key] for run in mine])) for r, key in keys.items()}
    return found


def ranked(losses: dict[str, float]) -> dict[str, int]:
    """Place of each method, 1 for the lowest loss; in that order."""
    return {name: place + 1 for place, name in enumerate(sorted(losses, key=losses.get))}


def alike(first: dict[str, float], second: dict[str, float]) -> float:
    """Rank correlation of the same methods' losses, or ranks."""
    return spearman(
        *(torch.tensor([one[name] for name in first]).double() for one in (first, second))
    )


def pairs_of(runs: list, method: str, baseline: str) -> list[Pair]:
    """A pair a seed."""
    return [Pair(run["seed"], run[method], run[baseline]) for run in runs]
