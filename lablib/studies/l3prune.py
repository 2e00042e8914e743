"""The study of L3Prune (2024): blocks cut off tiny-4m, which then learns to find translations.

A verse of the World English Bible looks for the same verse in Young's Literal Translation, among
others. A seed draws the verses to learn from, each of them once, those to judge on, from other
chapters, and the triples of the initial losses. Trained is all of what remains, not adapters, since
four blocks are little to adapt; vectors are position-weighted means, as in the paper. Beside the
first n blocks stand the two that turn their inputs most, wherever they are.

SmolLM2 is too slow to train here. It is looked at through each of its depths without training, on
verses and on headings of Django's documentation; its middle depth was fixed on the tuning seed.

A cut counts as no worse than the whole model less a margin, or than the whole model before
training where that is more: so that cutting has to keep what training brings. Rates were tuned for
each cut on two other seeds, on chapters of their own, with as many tries for each; one and the same
was best for all. Five seeds, 0 to 4, were too few to tell a cut's loss from its margin: with that
known, and nothing else changed, twelve others were declared, and they alone are judged.

MiniLM is an encoder from the start, of six blocks, and was trained on many pairs. Cut to four,
three or two of them, it is tuned on headings and their sections, and so is the whole one; four
rates for each depth were tried on one other seed. Five seeds, and no claim is judged on them: the
paper's models are decoders.

Other than in the specification: fifty steps of 24 pairs, not sixty, on twelve seeds in the place of
five, and 128 triples for the initial losses, where the paper has a hundred batches of 64. Depths
chosen by chance aren't drawn: their mean over each half of the blocks is computed from all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from lablib.compression.flexigpt import block_influence, least
from lablib.compression.structures import Keep, sliced
from lablib.embeddings import collections, l3prune, lexical, students
from lablib.embeddings.encode import Encoder
from lablib.evidence import Pair, matching
from lablib.models import anatomy, pretrained
from lablib.models.classifier import encoder as trained_encoder

STEPS, BATCH = 50, 24
HELD_OUT = 500  # verses to judge on
TRIPLES = 128  # of the initial losses
VERSES, HEADINGS = 48, 16  # triples that SmolLM2 is looked at with
LENGTH = 48  # tokens of a text, at most
LLM = "smollm2-135m-instruct"
MINILM = "minilm-l6-v2"
CUTS = (6, 4, 3, 2)  # blocks of MiniLM that stay
MINI = {"steps": 40, "batch": 16, "length": 32, "held_out": 300}
SLIGHT, MODEST = 1.0, 5.1  # points: what counts as negligible, and the paper's mean for small


def run(
    kept: str,
    seed: int,
    rate: float | None = None,
    steps: int = STEPS,
    held_out: int = HELD_OUT,
    model: str = "tiny-4m",
    attempt: int | None = None,
    rates: Sequence[float] | None = None,
) -> dict:
    """One cut and its training, or all cuts on the same verses, or other models' depths.

    kept: "1" to "4", the first blocks; "influence", the two that turn most; "all" of these;
        "depths" trains none, but looks at each depth of SmolLM2; "minilm", CUTS of MiniLM, each at
        one of the rates, and "minilm, tries", all of them at each rate, in lists. rate: None is the
        one that the cut was tuned to. attempt: which of GRID instead. Seeds from 100 on are judged
        on chapters, or documents, for validation.
    trained: accuracy in %, the share of verses that find their own translation first; before: the
        same of that depth without training. losses: initial ones, of each depth. Of "all", the same
        as "3 trained" and so on, and chosen: mean of trained over the two depths of least initial
        loss; random: mean over all depths, which is what chance gives in each half.
    """
    if kept == "depths":
        return depths(seed)
    if kept == "minilm":
        return minilm(seed, rates)
    if kept == "minilm, tries":
        tries = [minilm(seed, [one] * len(CUTS)) for one in rates]
        return {key: [told[key] for told in tries] for key in tries[0]}
    encoder = Encoder(*pretrained(model), pooling="weighted-mean", max_length=LENGTH)
    train, judged, triples = verses(seed, steps, held_out)
    names = [*map(str, range(1, 1 + len(anatomy.blocks(encoder.model)))), "influence"]
    if kept != "all":
        return trained(encoder, kept, train, judged, steps, rate_of(kept, rate, attempt), seed)
    losses = l3prune.layer_losses(encoder, triples)
    told = {"losses": rounded(losses)}
    told |= {f"{n} before": value for n, value in zip(names, accuracies(encoder, judged))}
    for name in names:
        own = trained(encoder, name, train, judged, steps, rate_of(name, rate, attempt), seed)
        told |= {f"{name} {key}": value for key, value in own.items()}
    return told | by_choice(told, losses)


def rate_of(kept: str, rate: float | None, attempt: int | None) -> float:
    """The given one, the grid's, or the tuned one."""
    if attempt is not None:
        return GRID[attempt]
    return TUNED[kept] if rate is None else rate


def trained(
    encoder: Encoder,
    kept: str,
    train: list,
    judged: list,
    steps: int,
    rate: float,
    seed: int,
) -> dict:
    """Cut, train, judge."""
    short, places = shortened(encoder, kept, train)
    start = perf_counter()
    losses = students.train(short, train, steps, rate, batch=BATCH, seed=seed)
    seconds = perf_counter() - start
    a, b = (short(side) for side in zip(*judged))
    last = float(np.mean(losses[-max(1, steps // 5) :]))
    told = {"trained": right(a, b), "loss": round(last, 4), "train_seconds": round(seconds, 2)}
    return told | ({"blocks": places} if kept == "influence" else {})


def shortened(encoder: Encoder, kept: str, train: list) -> tuple[Encoder, list[int]]:
    """The encoder over fewer blocks, and their places."""
    if kept != "influence":
        return l3prune.cut(encoder, int(kept)), list(range(int(kept)))
    texts = " ".join(a for a, _ in train[:100])
    ids = torch.tensor(encoder.tokenizer([texts])["input_ids"][0])
    rows = ids[: len(ids) // 65 * 65].view(-1, 65)
    scores = block_influence(encoder.model, rows)
    places = sorted(set(range(len(scores))) - set(least(scores, len(scores) - 2)))
    short = sliced(encoder.model, Keep(blocks=places))
    return Encoder(short, encoder.tokenizer, encoder.pooling, max_length=encoder.max_length), places


def by_choice(told: dict, losses: Tensor) -> dict[str, float]:
    """Trained accuracy of the chosen depths, and of depths by chance, mean of both halves."""
    n = len(losses)
    after = [told[f"{depth} trained"] for depth in range(1, n + 1)]
    small, large = l3prune.choose(losses)
    halves = after[: n // 2], after[n // 2 :]
    return {
        "chosen": (after[small - 1] + after[large - 1]) / 2,
        "random": float(np.mean([np.mean(half) for half in halves])),
    }


def depths(seed: int) -> dict:
    """SmolLM2 cut at each of its blocks, untrained: losses, accuracies, those of two depths."""
    encoder = Encoder(*llm(), pooling="weighted-mean", max_length=LENGTH)
    told = {}
    for name, n in (("verses", VERSES), ("headings", HEADINGS)):
        triples = drawn(collections.triples(name, split(seed)), n, seed)
        q, d, hard = (l3prune.layer_vectors(encoder, side) for side in zip(*triples))
        told[f"{name} losses"] = rounded(l3prune.losses_of(q, d, hard))
        told[f"{name} before"] = [right(*pair) for pair in zip(q, torch.cat([d, hard], 1))]
    told["middle"], told["last"] = (told["verses before"][depth - 1] for depth in (MIDDLE, 30))
    return told


def minilm(seed: int, rates: Sequence[float]) -> dict:
    """MiniLM cut at each of CUTS and tuned on headings: as `run` tells it of "all"."""
    whole = Encoder(*trained_encoder(MINILM), max_length=MINI["length"])
    steps, batch = MINI["steps"], MINI["batch"]
    train = drawn(collections.pairs("headings", "train"), steps * batch, seed)
    sides = [*zip(*headings(seed))]
    told = {}
    for n, rate in zip(CUTS, rates, strict=True):
        short = l3prune.cut(whole, n)
        told[f"{n} before"] = right(*map(short, sides))
        start = perf_counter()
        students.train(short, train, steps, rate, batch=batch, seed=seed)
        told[f"{n} train_seconds"] = round(perf_counter() - start, 2)
        told[f"{n} trained"] = right(*map(short, sides))
    return told


def headings(seed: int) -> list[tuple[str, str]]:
    """(heading, section) that MiniLM is judged on."""
    return drawn(collections.pairs("headings", split(seed)), MINI["held_out"], seed)


def by_words(judged: list[tuple[str, str]]) -> tuple[float, float]:
    """Per cent of first texts that find their second one by BM25 and by tf-idf."""
    asked, known = zip(*judged)
    tables = (index(known)(asked) for index in (lexical.bm25, lexical.tfidf))
    bm25, tfidf = (100 * float((t.argmax(1) == np.arange(len(t))).mean()) for t in tables)
    return bm25, tfidf


def verses(seed: int, steps: int, held_out: int) -> tuple[list, list, list]:
    """Pairs to learn from and to judge on, and triples of the training split."""
    train = drawn(collections.pairs("verses", "train"), steps * BATCH, seed)
    judged = drawn(collections.pairs("verses", split(seed)), held_out, seed)
    n = min(TRIPLES, 4 * held_out)
    return train, judged, drawn(collections.triples("verses", "train"), n, seed)


def split(seed: int) -> str:
    """What a seed is judged on."""
    return "validation" if seed >= 100 else "test"


def drawn(rows: Sequence, n: int, seed: int) -> list:
    """n of the rows, by the seed."""
    places = np.random.default_rng(seed).choice(len(rows), n, replace=False)
    return [rows[place] for place in places]


def accuracies(encoder: Encoder, judged: list) -> list[float]:
    """Of each depth, untrained."""
    a, b = (l3prune.layer_vectors(encoder, side) for side in zip(*judged))
    return [right(*layer) for layer in zip(a, b)]


def right(a: Tensor, b: Tensor) -> float:
    """Per cent of vectors a (n, dim) whose nearest of b (n or more, dim) is their own."""
    nearest = (a @ b.t()).argmax(1)
    return 100 * int((nearest == torch.arange(len(a))).sum()) / len(a)


def rounded(values: Tensor) -> list[float]:
    """Short numbers."""
    return [round(float(value), 4) for value in values]


@lru_cache(maxsize=1)
def llm():
    """SmolLM2 and its tokenizer."""
    return pretrained(LLM)


GRID = (5e-4, 1.5e-3, 4.5e-3)
TUNED = dict.fromkeys(("1", "2", "3", "4", "influence"), 1.5e-3)
MIDDLE = 18  # depth; 17 to 19 were the best on the tuning seed

SEEDS = range(10, 22)
POINTS = [{"kept": "1", "seed": SEEDS[0]}]
POINTS += [{"kept": kept, "seed": seed} for seed in SEEDS for kept in ("all", "depths")]
MINI_RATES = [5e-5, 2e-4, 2e-4, 2e-4]  # the best of TUNING, for each of CUTS
POINTS += [{"kept": "minilm", "seed": seed, "rates": MINI_RATES} for seed in SEEDS[:5]]
TUNING = [
    {"kept": "all", "seed": seed, "attempt": attempt}
    for seed in (100, 101)
    for attempt in range(len(GRID))
]
TUNING += [{"kept": "depths", "seed": 100}]
MINI_GRID = (1.25e-5, 5e-5, 2e-4, 8e-4)
TUNING += [
    {"kept": "minilm, tries", "seed": 100, "rates": list(some)}
    for some in (MINI_GRID[:1], MINI_GRID[1:])
]
TINY = {"rate": 1e-3, "steps": 1, "held_out": 12, "model": "tiny-1m"}
CANARY = {"kept": "all", "seed": 200, **TINY}

ROLES = {
    "cut-30": {"method": "3 trained", "baseline": "4 before", "control": "3 before"},
    "cut-75": {"method": "1 trained", "baseline": "4 before", "control": "1 before"},
    "middle": {"method": "middle", "baseline": "last", "control": None},  # others are in lists
    "choice": {"method": "chosen", "baseline": "random", "control": "4 before"},
    "first": {"method": "2 trained", "baseline": "influence trained", "control": "2 before"},
}


def values(runs: list) -> dict:
    """A pair a seed for each claim."""
    every = matching(runs, kept="all")
    return {
        "cut-30": [within(run, "3", SLIGHT) for run in every],
        "cut-75": [within(run, "1", MODEST) for run in every],
        "middle": [pair_of(run, "middle") for run in matching(runs, kept="depths")],
        "choice": [pair_of(run, "choice") for run in every],
        "first": [pair_of(run, "first") for run in every],
    }


def within(run: dict, kept: str, margin: float) -> Pair:
    """A cut model, and the whole one less a margin, or untrained where that is better."""
    rival = max(run["4 trained"] - margin, run["4 before"])
    return Pair(run["seed"], run[f"{kept} trained"], rival)


def pair_of(run: dict, id: str) -> Pair:
    """Two results of a seed."""
    return Pair(run["seed"], run[ROLES[id]["method"]], run[ROLES[id]["baseline"]])
