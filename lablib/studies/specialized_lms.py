"""The study of specialized language models (2024): what a small model has read before fine-tuning.

Three special domains, none of them in the generic text: Shakespeare's histories, the Bible's
letters, Django's release notes; a loss is the mean over the three. The small model has two layers
of dim 16, and reads 16 windows of 64 tokens a step. All methods are fine-tuned alike, on 8 or 48
documents of 832 tokens, at a third of their rate, and stopped by 8 others.

Tuned, on another seed: the rate of each method, three tries or more, until the best one has a worse
neighbor on both sides, by the loss after fine-tuning on 8 documents. A training of 100 steps likes
another rate than one of 800, so resampled text was tuned for its eighth of the budget, too, rate
and warmup together: a rate four times as high, rising to the end, did best. For a mixture's experts
a shorter warmup did worse. 32 clusters to resample by and 4 for mixtures and projected networks
were not tuned, nor the rates of 200 steps.

A mixture's experts share the steps, as in the paper's comparison at equal cost. After 800 steps in
all, an expert has not learned the language when its share ends. So mixtures and projected networks
are judged after 3,200, with rates tuned at that budget, three tries each, and on seeds that had not
been seen. Resampled text and the large model were not trained for 3,200 steps: their claims need
no larger budget. The large model has as many steps as the small one: it costs more to train as
well as to use.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from lablib.data import Batches
from lablib.data.corpora import load
from lablib.data.mixtures import DOMAINS, mixture
from lablib.evidence import grid, paired
from lablib.experts import specialized_lms as sl
from lablib.experts.clusters import TextEmbedding, fit_embedding, kmeans, nearest
from lablib.experts.domain_experts import parts_of, pieces
from lablib.experts.switch_transformers import reduced_init_
from lablib.models import GPT, GPTConfig
from lablib.training import evaluate, fit

LENGTH = 832  # tokens of a document, about 2 KB
HISTORIES = ("henry_", "richard_", "john")
LETTERS = {"Romans", "Hebrews", "James", "Jude", "Galatians", "Ephesians", "Philippians", "Titus"}
LETTERS |= {"Colossians", "Philemon", "1 John", "2 John", "3 John"}
LETTERS |= {f"{n} {name}" for n in (1, 2) for name in ("Corinthians", "Timothy", "Peter")}
LETTERS |= {"1 Thessalonians", "2 Thessalonians"}
SPECIAL = {"histories": "shakespeare", "letters": "bible", "releases": "django-docs"}
FEW, MANY = 8, 48  # documents to specialize on
FINE = 32  # clusters to resample by
ROWS = 16  # windows of 64 tokens a step
COARSE = 4  # clusters, and small models, of mixtures and projected networks


def run(
    seed: int,
    method: str = "small",
    steps: int = 800,
    lr: float = 1e-2,
    dim: int = 16,
    capacity: int = 4,
    domains: int = 3,
    limit: int = 0,
    test: int = 32,
    rounds: int = 6,
    warmup: int = 100,
) -> dict:
    """Train by one method, specialize to each domain; mean test losses over domains, nats a token.

    method: "small", on generic text; "importance", on generic text resampled for each domain;
        "none", on nothing; "mixture", a small model for each of 4 clusters, each with a quarter of
        the steps;
        "projected", a projected network of as many; "large", of twice the width and depth, which
        costs more to train and to use.
    steps: of 16 windows of 64 tokens. rounds: of fine-tuning, 10 steps each, at most. warmup: steps
        of pretraining in which the rate rises, of each small model where there are several.
    limit: as in `shelves`.
    """
    shelf = shelves(limit)
    losses: dict[str, list[float]] = {}
    chosen = []
    for name in list(SPECIAL)[:domains]:
        model, expert = pretrained(shelf, method, name, seed, steps, lr, dim, capacity, warmup)
        chosen.append(expert)
        for data, documents in (("few", FEW), ("many", MANY)):
            special = domain(shelf, name, documents, test)
            tuned = sl.specialize(model, special, lr=lr / 3, rounds=rounds, seed=seed)
            losses.setdefault(data, []).append(evaluate(tuned, special.test))
        losses.setdefault("none", []).append(evaluate(model, special.test))
    made = {key: float(np.mean(row)) for key, row in losses.items()}
    return made | {f"{key}_each": [round(v, 4) for v in row] for key, row in losses.items()}


def pretrained(shelf, method, name, seed, steps, lr, dim, capacity, warmup) -> tuple[GPT, int]:
    """The small model that fine-tuning begins with, and which expert it is."""
    if method == "none":
        return build(seed, dim), 0
    if method == "importance":
        weights = sl.importance_weights(shelf["fine"], shelf["special_fine"][name], FINE)
        n = -(-steps * ROWS * 64 // LENGTH)
        tokens = sl.resampled(shelf["generic"], weights, min(n, 8000), seed)
        data = Batches(tokens, ROWS, 64, seed)
        return trained(build(seed, dim), data, steps, lr, seed, warmup), 0
    expert = int(np.bincount(shelf["special_coarse"][name], minlength=COARSE).argmax())
    if method == "mixture":
        return one_of_a_mixture(expert, seed, steps, lr, dim, shelf["limit"], warmup), expert
    if method == "projected":
        network = projected(seed, steps, lr, dim, capacity, shelf["limit"], warmup)
        return network.instance(expert), expert
    return generic(method, seed, steps, lr, dim, shelf["limit"], warmup), 0


@lru_cache(maxsize=2)
def generic(method, seed, steps, lr, dim, limit, warmup=100) -> GPT:
    """A model of all generic text, small or large."""
    model = build(seed, dim) if method == "small" else build(seed, 2 * dim, 4)
    tokens = shelves(limit)["generic"].reshape(-1)
    return trained(model, Batches(tokens, ROWS, 64, seed), steps, lr, seed, warmup)


@lru_cache(maxsize=4)
def one_of_a_mixture(expert, seed, steps, lr, dim, limit, warmup=100) -> GPT:
    """A small model of one cluster, with its share of the steps."""
    shelf = shelves(limit)
    tokens = parts_of(shelf["generic"], shelf["coarse"], COARSE)[expert]
    data = Batches(tokens, ROWS, 64, seed)
    return trained(build(seed, dim), data, steps // COARSE, lr, seed, warmup)


@lru_cache(maxsize=2)
def projected(seed, steps, lr, dim, capacity, limit, warmup=100) -> sl.ProjectedNetwork:
    """A projected network of all generic text, 8 windows of each cluster a step."""
    shelf = shelves(limit)
    parts = parts_of(shelf["generic"], shelf["coarse"], COARSE)
    network = sl.ProjectedNetwork(build(seed, dim), COARSE, capacity)
    return trained(network, sl.by_cluster(parts, ROWS // COARSE, 64, seed), steps, lr, seed, warmup)


def build(seed: int, dim: int, n_layers: int = 2) -> GPT:
    """A small model, as the house's other studies of experts start it."""
    torch.manual_seed(seed)
    sizes = {"dim": dim, "n_layers": n_layers, "n_heads": 2, "qk_norm": True}
    return reduced_init_(GPT(GPTConfig(vocab_size=1024, max_length=64, **sizes)), 0.1)


def trained(model, data, steps, lr, seed, warmup):
    """Pretraining: the rate falls with one over the root of the step, after its warmup."""
    options = {"schedule": "inverse-sqrt", "warmup": min(warmup, steps), "progress": False}
    fit(model, data, steps=steps, lr=lr, seed=seed, **options)
    return model


@lru_cache(maxsize=2)
def shelves(limit: int = 0) -> dict[str, Any]:
    """Generic documents, those of each special domain, and the clusters of all.

    The special domains are histories, letters and release notes; none of them is in the generic
    text, which holds the other plays, books and documents of their kind. limit: about so many
    generic documents, for a canary; 0 takes all.
    """
    tokenizer = mixture().tokenizer
    texts: dict[str, list[str]] = {"generic": [], **{name: [] for name in SPECIAL}}
    for source in DOMAINS:
        for document in load(source):
            texts[kind(source, document.name)].append(document.text)
    if limit:
        texts = {name: part[:12] for name, part in texts.items()} | {
            "generic": [text[:4000] for text in texts["generic"][:: max(1, 1000 // limit)]]
        }
    cut = {name: pieces(encoded(part, tokenizer), LENGTH) for name, part in texts.items()}
    embedding, vectors = embedded(cut, tokenizer, 20 if limit else 100)
    shelf: dict[str, Any] = {"tokenizer": tokenizer, "embedding": embedding, "limit": limit} | cut
    for size, clusters, balanced in (("fine", FINE, False), ("coarse", COARSE, True)):
        centers, shelf[size] = kmeans(vectors["generic"], clusters, 0, balanced)
        shelf[f"centers_{size}"] = centers
        near = {name: nearest(vectors[name][:FEW], centers) for name in SPECIAL}
        shelf[f"special_{size}"] = near
    return shelf


def kind(source: str, name: str) -> str:
    """Which of the special domains a document is of, or "generic"."""
    if source == "shakespeare" and name.startswith(HISTORIES):
        return "histories"
    if source == "bible" and name in LETTERS:
        return "letters"
    if source == "django-docs" and name.startswith("releases/"):
        return "releases"
    return "generic"


def encoded(texts: list[str], tokenizer) -> np.ndarray:
    """Ids of texts, end to end, at most 40,000 characters of each."""
    rows = tokenizer.encode_batch([text[:40_000] for text in texts])
    return np.array([token for row in rows for token in [*row, tokenizer.eos]], dtype=np.int64)


def embedded(cut: dict, tokenizer, dim: int) -> tuple[TextEmbedding, dict]:
    """The embedding, learned on generic documents alone, and all documents' vectors."""
    told = {name: [tokenizer.decode(row) for row in part] for name, part in cut.items()}
    embedding = fit_embedding(told["generic"][::3], dim)
    return embedding, {name: embedding(part) for name, part in told.items()}


def domain(shelf: dict, name: str, documents: int, test: int) -> sl.Special:
    """A domain's first documents to train on, 8 to stop by, and `test` others to be judged on."""
    rows = shelf[name]
    order = np.random.default_rng(0).permutation(np.arange(MANY, len(rows)))
    valid, judged = order[:8], order[8 : 8 + test]
    return sl.Special(rows[:documents].reshape(-1), windows(rows[valid]), windows(rows[judged]))


def windows(documents: np.ndarray) -> list[torch.Tensor]:
    """Every third window of 64 tokens of each document, in batches."""
    ids = torch.from_numpy(documents).long()
    rows = [ids[:, start : start + 65] for start in range(0, LENGTH - 65, 192)]
    return list(torch.cat(rows).split(64))


AMPLE, LONG, SHORT, EIGHTH = 3200, 800, 200, 100
SEEDS = range(5)
FRESH = range(10, 15)  # of AMPLE steps: the verdicts of LONG were known on the others
TUNED = {"small": 1e-2, "importance": 2e-2, "projected": 1e-2, "mixture": 2e-2, "large": 2e-2}
BRIEF = 8e-2  # the rate of EIGHTH steps; the others' are in TUNED
PAIRS = [(name, n) for name in ("small", "projected", "mixture", "large") for n in (LONG, SHORT)]
PAIRS += [("importance", LONG), ("importance", EIGHTH), ("none", 0)]
KINDS = [
    {"method": name, "steps": n, "lr": BRIEF if n == EIGHTH else TUNED.get(name, 1e-2)}
    for name, n in PAIRS
]
POINTS = [kind | {"seed": seed} for seed in SEEDS for kind in KINDS]
POINTS += grid(method=("small", "mixture", "projected"), steps=AMPLE, lr=1e-2, seed=FRESH)
TUNING = [
    *grid(
        method=("small", "importance", "projected", "mixture"),
        steps=LONG,
        lr=(1e-2, 2e-2),
        seed=100,
    ),
    *grid(method=("small", "projected"), steps=LONG, lr=5e-3, seed=100),
    *grid(method=("importance", "mixture"), steps=LONG, lr=4e-2, seed=100),
    *grid(method="mixture", steps=LONG, lr=(2e-2, 4e-2), warmup=LONG // COARSE // 5, seed=100),
    *grid(method="importance", steps=EIGHTH, lr=(1e-2, 2e-2, 4e-2, 8e-2), warmup=20, seed=100),
    *grid(
        method="importance", steps=EIGHTH, lr=(2e-2, 4e-2, 8e-2, 0.16), warmup=(50, 100), seed=100
    ),
    *grid(method="large", steps=LONG, lr=(5e-3, 1e-2, 2e-2, 4e-2), seed=100),
    *grid(method=("small", "mixture", "projected"), steps=AMPLE, lr=(5e-3, 1e-2, 2e-2), seed=100),
]
CANARY = {"seed": 200, "method": "projected", "steps": 4, "domains": 1, "limit": 200}
CANARY |= {"test": 4, "rounds": 1}

_SMALL = {"method": "small", "steps": LONG}
_PROJECTED = {"method": "projected", "steps": LONG}
_IMPORTANCE = {"method": "importance", "steps": LONG}
_MORE = {"method": "small", "steps": AMPLE}
_UNTRAINED = {"method": "none"}
# None: after AMPLE steps there is one model without clusters, the baseline; and no model has less
# than the untrained one. A generic small model in the place of `shared`'s projected network wins as
# well: what is credited there is that all domains share one training, which only the untrained one
# lacks.
ROLES = {
    "importance": {"method": _IMPORTANCE, "baseline": _SMALL, "control": _UNTRAINED},
    "projected": {
        "method": {"method": "projected", "steps": AMPLE},
        "baseline": _MORE,
        "control": None,
    },
    "mixture": {
        "method": {"method": "mixture", "steps": AMPLE},
        "baseline": _MORE,
        "control": None,
    },
    "turn": {"method": _IMPORTANCE, "baseline": _PROJECTED, "control": _SMALL},
    "shared": {
        "method": _PROJECTED,
        "baseline": {"method": "importance", "steps": EIGHTH},
        "control": _UNTRAINED,
    },
    "pretraining": {"method": _SMALL, "baseline": _UNTRAINED, "control": None},
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed, the loss after fine-tuning on few documents."""
    return {id: paired(runs, r["method"], r["baseline"], "few") for id, r in ROLES.items()}
