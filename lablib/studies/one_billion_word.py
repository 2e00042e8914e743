"""Study of lab 101: counting, a recurrent network, and their combination on shuffled sentences.

Every point trains one model, or all five for the combination, on the benchmark's recipe applied to
the King James Bible, Shakespeare and Django's documentation; its seed draws the split and starts
the network. The combination's weights come from the tuning shard, perplexities from the test shard.

Tuned, on another seed, with three tries each: the order of Kneser-Ney and of Katz (3, 4, 5), the
factor of Stupid Backoff at order 5 (0.2, the usual 0.4, and 0.8), the rates of the network and of
the maximum-entropy model, and for the combination the rate of its network. The network's best rate
is the largest tried, and the next smaller was nearly as good. Longer contexts helped Kneser-Ney and
hurt Katz. Stupid Backoff's usual factor was found on trillions of words; on so
little text a context is often wrong to be sure of itself, and backing off must cost less.
Good-Turing discounts for counts up to 3 or 8 in place of 5, another decay in the maximum-entropy
model, and more dropout in the network changed little or did harm.

Controls: Kneser-Ney with three tenths of its discounts; a network that learned sentences whose
words stand in random order; a combination whose two learned members were never trained.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from lablib.data import load, sentences
from lablib.evidence import grid, matching, paired
from lablib.language_models import one_billion_word as lm
from lablib.language_models.backoff import Katz, StupidBackoff
from lablib.language_models.kneser_ney import KneserNey
from lablib.language_models.lstm import LSTM, SentenceBatches
from lablib.language_models.maxent import MaxEnt
from lablib.training import fit
from lablib.training.optimizers import adamw

CORPORA = ("bible", "shakespeare", "django-docs")
SINGLE = ("kneser-ney", "katz", "stupid-backoff", "maxent", "lstm")
CONTROLS = ("kneser-ney-0.3", "lstm-shuffled", "combination-untrained")


@lru_cache(maxsize=2)
def pool(documents: int | None = None) -> list[list[str]]:
    """Sentences of at most 60 words of the first `documents` documents of each corpus."""
    texts = [document.text for name in CORPORA for document in load(name)[:documents]]
    return [sentence for text in texts for sentence in sentences(text) if len(sentence) <= 60]


def run(
    model: str,
    seed: int,
    words: int = 220_000,
    documents: int | None = None,
    order: int | None = None,
    factor: float = 0.8,
    rate: float | None = None,
) -> dict[str, Any]:
    """Train `model` on the seed's split; its perplexities on the tuning and on the test shard.

    model: one of SINGLE or CONTROLS, or "combination". words: to train on. documents: of each
    corpus, all when None. order: of Kneser-Ney (5 when None) and Katz (3). factor: of Stupid
    Backoff. rate: of the network (0.024) and of the maximum-entropy model (0.18); the combination
    takes the network's.
    """
    torch.set_num_threads(1)
    data = lm.benchmark(pool(documents), train_words=words, seed=seed)
    if not model.startswith("combination"):
        tuning, test = scores([trained(model, data, seed, order, factor, rate)], data)
        return {"tuning_perplexity": lm.perplexity(tuning), "perplexity": lm.perplexity(test)}
    kind = "-untrained" if model.endswith("untrained") else ""
    members = [trained(name, data, seed) for name in (*SINGLE[:3], f"maxent{kind}")]
    members.append(trained(f"lstm{kind}", data, seed, rate=rate))
    tuning, test = scores(members, data)
    weights = lm.em_weights(tuning)
    return {
        "tuning_perplexity": lm.perplexity(lm.mixture(tuning, weights)),
        "perplexity": lm.perplexity(lm.mixture(test, weights)),
        "weights": weights.round(6).tolist(),
    }


def scores(models: Sequence[Any], data: lm.Benchmark) -> list[np.ndarray]:
    """Of each held-out shard, the log-probability of every word: (models, words)."""
    return [np.stack([m.word_logprobs(shard) for m in models]) for shard in data.held_out]


def trained(model: str, data: lm.Benchmark, seed: int, order=None, factor=0.8, rate=None) -> Any:
    """The model called so, trained on the data's training text."""
    if model.startswith("kneser-ney"):
        counts = KneserNey(order or 5).fit(data.train)
        scaled = [tuple(0.3 * d for d in row) for row in counts.discounts]
        return counts.with_discounts(scaled) if model.endswith("0.3") else counts
    if model == "katz":
        return Katz(order or 3).fit(data.train)
    if model == "stupid-backoff":
        return StupidBackoff(order or 5, factor).fit(data.train)
    if model.startswith("maxent"):
        epochs = 0 if model.endswith("untrained") else 2
        maxent = MaxEnt(data.vocabulary, bits=16, seed=seed)
        return maxent.fit(data.train, epochs=epochs, lr=rate or 0.18)
    text = shuffled(data.train, seed) if model.endswith("shuffled") else data.train
    epochs = 0 if model.endswith("untrained") else 3
    return network(data.vocabulary, text, seed, rate or 2.4e-2, epochs)


def network(
    vocabulary: Sequence[str], text: Sequence[Sequence[str]], seed: int, rate: float, epochs: int
) -> LSTM:
    """An LSTM of width 64, trained on `text`."""
    torch.manual_seed(seed)
    model = LSTM(vocabulary, 64, 64, dropout=0.1)
    batches = SentenceBatches(text, model.encode, size=768, seed=seed)
    steps = epochs * len(batches)
    how = {"loss": LSTM.loss, "optimizer": adamw(rate), "compile": False, "progress": False}
    if steps:
        fit(model, batches, steps=steps, seed=seed, **how)
    return model


def shuffled(text: Sequence[Sequence[str]], seed: int) -> list[list[str]]:
    """The sentences, the words of each in random order."""
    random = np.random.default_rng(seed)
    return [[sentence[i] for i in random.permutation(len(sentence))] for sentence in text]


RATE = 4.8e-2  # of the network, the best of TUNING; what else was tuned is run's default
POINTS = [
    *grid(model=[*SINGLE[:4], "kneser-ney-0.3", "combination-untrained"], seed=range(6)),
    *grid(model=["lstm", "lstm-shuffled", "combination"], rate=RATE, seed=range(6)),
]
TUNING = [
    *grid(model=["kneser-ney", "katz"], order=[3, 4, 5], seed=100),
    *grid(model="stupid-backoff", factor=[0.2, 0.4, 0.8], seed=100),
    *grid(model="maxent", rate=[0.09, 0.18, 0.36], seed=100),
    *grid(model=["lstm", "combination"], rate=[1.2e-2, 2.4e-2, 4.8e-2], seed=100),
]
CANARY = {"model": "combination", "seed": 0, "words": 4_000, "documents": 2}
ROLES = {
    "combination-wins": {
        "method": {"model": "combination"},
        "baseline": {"model": "lstm"},
        "control": {"model": "combination-untrained"},
    },
    "recurrent-best": {
        "method": {"model": "lstm"},
        "baseline": {"model": "kneser-ney"},
        "control": {"model": "lstm-shuffled"},
    },
    "kneser-ney-wins": {
        "method": {"model": "kneser-ney"},
        "baseline": {"model": "katz"},
        "control": {"model": "kneser-ney-0.3"},
    },
}


def values(runs: list[dict[str, Any]]) -> dict[str, list]:
    """Each claim's values: of a direction the method beside the best of its rivals, by seed."""
    rivals = {
        "combination-wins": SINGLE,
        "recurrent-best": [name for name in SINGLE if name != "lstm"],
        "kneser-ney-wins": ["katz", "stupid-backoff"],
    }
    methods = {id: roles["method"]["model"] for id, roles in ROLES.items()}
    made: dict[str, list] = {id: against(runs, methods[id], rivals[id]) for id in ROLES}
    both = paired(runs, {"model": "combination"}, {"model": "kneser-ney"}, "perplexity")
    made["reduction"] = [100 * (1 - pair.method / pair.baseline) for pair in both]
    return made


def against(runs: list[dict[str, Any]], method: str, rivals: Sequence[str]) -> list:
    """One pair a seed: the method's perplexity, and the lowest of its rivals'."""
    best = {
        run["seed"]: min(
            other["perplexity"]
            for name in rivals
            for other in matching(runs, model=name, seed=run["seed"])
        )
        for run in matching(runs, model=method)
    }
    pairs = paired(runs, {"model": method}, {"model": rivals[0]}, "perplexity")
    return [pair._replace(baseline=best[pair.seed]) for pair in pairs]
