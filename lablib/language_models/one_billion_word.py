"""One Billion Word Benchmark (Chelba et al., 2013): models that combine, and a recipe for data.

Lab 101. Section 2 of the paper is the recipe, section 3 the models, section 5 their combination.
All models predict the same events, the vocabulary with `<UNK>` and `</s>`, and give a natural
log-probability for each of the same words, so that they can be interpolated word by word.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from lablib.language_models.vocabulary import (
    UNKNOWN,
    Sentence,
    checked,
    map_unknown,
    vocabulary_by_count,
)


def mixture(logprobs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Log-probability of each word under the interpolated model.

    logprobs: (models, words), natural logarithms; weights: (models,), summing to 1.
    Returns (words,).
    Raises ValueError when there is not one weight a model, or they are no shares of a whole.
    Source: section 5.
    """
    logprobs, weights = np.asarray(logprobs), np.asarray(weights, dtype=float)
    if logprobs.ndim != 2 or weights.shape != logprobs.shape[:1]:
        raise ValueError(f"weights {weights.shape} do not fit log-probs {logprobs.shape}")
    if not (weights >= 0).all() or abs(weights.sum() - 1) > 1e-6:
        raise ValueError(f"weights must be at least 0 and sum to 1, not to {weights.sum():g}")
    top = logprobs.max(0)  # taken out and put back, lest exp gives 0: (words,)
    return top + np.log(weights @ np.exp(logprobs - top))  # log sum_m lambda_m P_m(w): (words,)


def em_step(probs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The next weights: each model's mean share in the probability that words got.

    probs: (models, words), in any unit that is one word's own; weights: (models,).
    Returns (models,), summing to 1. No step makes the words less probable.
    """
    owed = weights[:, None] * probs  # lambda_m P_m(w_i): (models, words)
    return (owed / owed.sum(0)).mean(1)  # over words, of its share in the sum over models


def em_weights(logprobs: np.ndarray, steps: int = 1000, tolerance: float = 1e-12) -> np.ndarray:
    """Interpolation weights that make held-out words most probable, by EM from equal weights.

    logprobs: (models, words). Returns (models,), non-negative, summing to 1. The likelihood is
    concave in the weights, so where EM settles is the best there is.
    Raises ValueError when a word is impossible under every model.
    """
    logprobs = np.asarray(logprobs, dtype=float)
    if logprobs.ndim != 2 or not logprobs.size:
        raise ValueError(f"logprobs must be (models, words), not of shape {logprobs.shape}")
    if not np.isfinite(logprobs.max(0)).all():
        raise ValueError("a held-out word has probability 0 under every model: smooth one of them")
    probs = np.exp(logprobs - logprobs.max(0))
    weights = np.full(len(probs), 1 / len(probs))
    for _ in range(steps):
        before, weights = weights, em_step(probs, weights)
        if np.abs(weights - before).max() < tolerance:
            break
    return weights


def perplexity(logprobs: np.ndarray) -> float:
    """exp of the mean negative log-probability: (words,) natural logarithms to one number."""
    return float(np.exp(-np.mean(logprobs)))


class Benchmark(NamedTuple):
    """Training text, held-out shards and vocabulary. Words outside it are `<UNK>` everywhere."""

    train: list[list[str]]
    held_out: list[list[list[str]]]
    vocabulary: list[str]  # by count, most frequent first, after `<UNK>` and `</s>`
    oov_rate: float  # share of held-out words, sentence ends included, that became `<UNK>`


def benchmark(
    sentences: Iterable[Sentence],
    *,
    min_count: int = 3,
    shards: int = 100,
    held_out_shards: int = 2,
    train_words: int | None = None,
    seed: int = 0,
) -> Benchmark:
    """The recipe: drop repeated sentences, shuffle, hold out one shard of `shards`, cut the rest.

    min_count: words that the training text holds less often become `<UNK>` (the paper's 3).
    held_out_shards: into how many parts the held-out shard is cut (50 in the paper).
    train_words: keep no more training words than this, sentence ends included.
    Raises ValueError when there are too few sentences to fill every shard.
    Source: section 2.
    """
    unique = list(dict.fromkeys(tuple(checked(sentence)) for sentence in sentences))
    order = np.random.default_rng(seed).permutation(len(unique))
    size = len(unique) // shards
    if size < held_out_shards:
        raise ValueError(
            f"{len(unique)} different sentences can't fill {shards} shards, one of them in "
            f"{held_out_shards} parts; give more text or ask for fewer shards"
        )
    held_out = [unique[i] for i in order[:size]]
    train = [unique[i] for i in order[size:]]
    if train_words is not None:
        lengths = np.cumsum([len(sentence) + 1 for sentence in train])
        train = train[: int(np.searchsorted(lengths, train_words, side="right"))]
    vocabulary = vocabulary_by_count(train, min_count)
    mapped = map_unknown(held_out, vocabulary)
    words = sum(len(sentence) + 1 for sentence in mapped)
    unknown = sum(sentence.count(UNKNOWN) for sentence in mapped)
    parts = [mapped[i::held_out_shards] for i in range(held_out_shards)]
    return Benchmark(map_unknown(train, vocabulary), parts, vocabulary, unknown / words)
