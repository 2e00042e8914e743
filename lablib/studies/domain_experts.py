"""The study of c-BTM (2023): experts of clusters against a dense model of equal training compute.

Four sources in documents of 832 tokens (2 KB), their labels hidden. A seed model of two layers and
dim 32 reads all of it for 600 steps; then the same number of further steps goes to one copy, or is
shared by as many copies as there are clusters. Each phase has its own cosine schedule. A held-out
window of 64 tokens is predicted by the experts that its document's text before it asks for. Other
corpora that the package has would put held-out text into training in other words: two more English
Bibles hold the same verses, and Python's source holds the texts of its documentation.

Tuned, on another seed, for the dense model, for two experts and for eight alike: the rate of the
second phase. Temperature 0.1, the default of the paper's code, was the best of those tried there,
too. Not tuned: the seed model's length. Tried and left out: 16 clusters, which need more steps than
this study has; on the tuning seed they came near the dense model and not below eight.

Two experts for a text came within a hair of what is allowed on the first five seeds, known when
twelve were declared; that claim is judged on twelve others, of which no other claim has runs.
"""

from functools import lru_cache

import numpy as np
import torch

from lablib.data import Batches
from lablib.data.mixtures import mixture
from lablib.evidence import Pair, grid, paired
from lablib.experts import domain_experts as de
from lablib.experts.clusters import kmeans, means, squared_distances
from lablib.experts.switch_transformers import reduced_init_
from lablib.models import GPT, GPTConfig
from lablib.training import fit

LENGTH = 832  # tokens of a document, 13 windows of 64
PLACES = (1, 3, 6, 11)  # the windows of a document that losses are taken on
TEMPERATURES = (0.01, 0.03, 0.1, 0.3, 1.0, 10.0)
TOP_K = (1, 2, 4)


def run(
    seed: int,
    clusters: int = 8,
    by: str = "content",
    steps: int = 800,
    start: int = 600,
    lr: float = 2e-2,
    temperature: float = 0.1,
    documents: int = 0,
    held_out: int = 80,
) -> dict:
    """Branch from a seed model, train an expert a cluster; the ensemble's held-out loss, nats.

    clusters: 1 is the dense model. by: "content", or "chance", the control: documents in equally
    many clusters at random. steps: of all experts together, so that each has steps / clusters.
    start: steps of the seed model before. documents: of training, 0 for all; held_out: documents.
    """
    shelves = books(documents)
    centers, labels = divided(shelves, clusters, by, seed)
    model = seed_model(seed, start, documents)
    parts = de.parts_of(shelves.train, labels, clusters)
    experts = de.train_experts(model, parts, steps // clusters, lr=lr, seed=seed)
    rows, contexts = windows(shelves, held_out)
    distances = torch.from_numpy(squared_distances(shelves.embed(contexts), centers)).float()
    log_probs = de.target_log_probs([*experts, model], rows)
    made = judged(log_probs[:-1], distances, temperature)
    return made | {
        "seed_loss": -log_probs[-1].mean().item(),
        "purity": de.purity(labels, shelves.domain),
    }


@lru_cache(maxsize=2)
def books(documents: int = 0) -> de.Library:
    """The mixture's documents, embedded; kept in the process."""
    return de.library(mixture(), LENGTH, documents or None, 100 if documents == 0 else 20)


def divided(shelves: de.Library, clusters: int, by: str, seed: int) -> tuple:
    """Centers (clusters, dim) and each document's cluster (documents,)."""
    if by == "content":
        return kmeans(shelves.vectors, clusters, seed)
    labels = np.random.default_rng(seed).permutation(np.arange(len(shelves.train)) % clusters)
    empty = np.zeros((clusters, shelves.vectors.shape[1]))
    return means(shelves.vectors, labels, empty), labels


@lru_cache(maxsize=2)
def seed_model(seed: int, start: int, documents: int = 0) -> GPT:
    """What every expert begins as: a model of the whole corpus."""
    torch.manual_seed(seed)
    config = GPTConfig(vocab_size=1024, dim=32, n_layers=2, n_heads=2, qk_norm=True, max_length=64)
    model = reduced_init_(GPT(config), 0.1)
    data = Batches(books(documents).train.reshape(-1), 32, 64, seed)
    fit(model, data, steps=start, lr=1e-2, seed=seed, progress=False)
    return model


def windows(shelves: de.Library, documents: int) -> tuple:
    """Held-out windows of as many documents, spread evenly, and what comes before each."""
    chosen = np.linspace(0, len(shelves.held_out) - 1, documents).round().astype(int)
    return de.inside(shelves.held_out[chosen], PLACES)


def judged(log_probs: torch.Tensor, distances: torch.Tensor, temperature: float) -> dict:
    """Losses of the ensemble: all experts, the nearest few, other temperatures."""

    def loss(temperature: float, top_k: int | None = None) -> float:
        weights = de.expert_weights(distances, temperature, top_k)
        return de.ensemble_loss(log_probs, weights).mean().item()

    made = {"loss": loss(temperature)}
    made |= {f"top_{k}": loss(temperature, k) for k in TOP_K}
    made["excess"] = float(np.expm1(made["top_2"] - made["loss"]))
    made["allowed"] = 0.01
    made["by_temperature"] = [round(loss(t), 4) for t in TEMPERATURES]
    return made


LONG, SHORT, SEEDS = 800, 200, range(5)
FRESH = range(10, 22)  # of the claim that two experts for a text are enough
TUNED = {1: 2e-2, 2: 4e-2, 8: 2e-2}  # the rate, by the number of clusters
KINDS = [
    *grid(clusters=1, by="content", steps=(LONG, SHORT), lr=TUNED[1]),
    *grid(clusters=2, by="content", steps=(LONG, SHORT), lr=TUNED[2]),
    *grid(clusters=8, by="content", steps=(LONG, SHORT), lr=TUNED[8]),
    *grid(clusters=8, by="chance", steps=LONG, lr=TUNED[8]),
]
# Seed by seed, since runs of one seed share their seed model.
POINTS = [kind | {"seed": seed} for seed in SEEDS for kind in KINDS]
POINTS += grid(clusters=8, by="content", steps=LONG, lr=TUNED[8], seed=FRESH)
RATES = (1e-2, 2e-2, 4e-2, 8e-2)
TUNING = grid(clusters=(1, 2, 8), by="content", steps=LONG, lr=RATES, seed=100)
CANARY = {"seed": 200, "clusters": 2, "steps": 8, "start": 4, "documents": 300, "held_out": 4}

_DENSE = {"clusters": 1, "by": "content"}
_EIGHT = {"clusters": 8, "by": "content"}
_CHANCE = {"clusters": 8, "by": "chance"}
# Chance was trained for the long budget alone: no control is stored of what compares two budgets.
ROLES = {
    "dense": {
        "method": _EIGHT | {"steps": LONG},
        "baseline": _DENSE | {"steps": LONG},
        "control": _CHANCE,
    },
    "chance": {"method": _EIGHT | {"steps": LONG}, "baseline": _CHANCE, "control": None},
    "two-experts": {"method": "excess", "baseline": "allowed", "control": None},
    "growth": {"method": _EIGHT, "baseline": _DENSE, "control": None},
    "more-experts": {
        "method": _EIGHT | {"steps": LONG},
        "baseline": {"clusters": 2, "by": "content", "steps": LONG},
        "control": _CHANCE,
    },
    "optimum": {
        "method": _EIGHT,
        "baseline": {"clusters": 2, "by": "content"},
        "control": None,
    },
}


def values(runs: list) -> dict:
    """What each claim is judged on: a pair a seed."""
    made = {id: paired(runs, *_sides(id), "loss") for id in ("dense", "chance", "more-experts")}
    made |= {id: gains(runs, *_sides(id)) for id in ("growth", "optimum")}
    method, baseline = _sides("two-experts")
    fresh = [run for run in runs if run["seed"] in FRESH]
    return made | {"two-experts": [Pair(r["seed"], r[method], r[baseline]) for r in fresh]}


def gains(runs: list, method: dict, baseline: dict) -> list:
    """By how much each side's loss falls from the short budget to the long one."""
    short, long = (
        paired(runs, method | {"steps": n}, baseline | {"steps": n}, "loss") for n in (SHORT, LONG)
    )
    return [
        Pair(now.seed, before.method - now.method, before.baseline - now.baseline)
        for before, now in zip(short, long)
    ]


def _sides(id: str) -> tuple:
    return ROLES[id]["method"], ROLES[id]["baseline"]
