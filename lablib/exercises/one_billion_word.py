"""Exercises of lab 101: discounts, interpolation weights, and a cache."""

import numpy as np

from lablib.exercises import Exercise, Wrong, expect, same_kind


def _discounts(counts):
    n = [sum(count == k for count in counts) for k in range(5)]
    y = n[1] / (n[1] + 2 * n[2])
    return tuple(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))


def _test_discounts(candidate) -> None:
    random = np.random.default_rng()
    for _ in range(5):
        # Geometric counts have all of n1 to n4, falling as real counts of counts do.
        counts = random.geometric(random.uniform(0.35, 0.6), size=400).tolist() + [1, 2, 3, 4]
        n = [counts.count(k) for k in range(1, 5)]
        expect(
            candidate(counts),
            _discounts(counts),
            f"n1 to n4, how many n-grams have each count, are {n}; with Y = n1 / (n1 + 2 n2) = "
            f"{n[0] / (n[0] + 2 * n[1]):.4f}, Dk is k - (k + 1) Y n(k+1) / nk",
            atol=1e-9,
        )


discounts = Exercise(
    reference=_discounts,
    test=_test_discounts,
    question="Which discount grows when a text has fewer n-grams that occur just once, and why?",
    hint="First count how many of the counts are 1, 2, 3 and 4; the rest is the formula.",
    minutes=5,
    difficulty="easy",
)


def _em_step(logprobs, weights):
    owed = weights[:, None] * np.exp(logprobs)
    return (owed / owed.sum(0)).mean(1)


def _test_em_step(candidate) -> None:
    random = np.random.default_rng()
    for models, words in ((2, 40), (3, 200), (4, 7)):
        logprobs = np.log(random.uniform(1e-4, 0.5, (models, words)))
        weights = random.dirichlet(np.ones(models))
        found, wanted = candidate(logprobs, weights), _em_step(logprobs, weights)
        same_kind(found, wanted)
        if abs(found.sum() - 1) > 1e-9:
            raise Wrong(
                f"weights must sum to 1; yours sum to {found.sum():.4f}. Divide each word's shares "
                "by their own sum before you average over words"
            )
        expect(
            found,
            wanted,
            "A word's share for model i is weight_i p_i(word) over its sum over all models; the "
            "step is the mean share. Mind that logprobs are logarithms",
            known=[(weights, "those are the weights that came in")],
            atol=1e-9,
        )


em_step = Exercise(
    reference=_em_step,
    test=_test_em_step,
    question="What does a model's weight become if it starts at 0, and is that what you want?",
    hint="Weigh each model's probability of a word, normalize over models, average over words.",
    minutes=8,
    difficulty="medium",
)


def _cached(logprobs, words, weight=0.1, window=200, size=10_000):
    made = np.empty(len(words))
    for i, word in enumerate(words):
        recent = words[max(0, i - window) : i]
        cache = recent.count(word) / len(recent) if recent else 1 / size
        made[i] = np.log((1 - weight) * np.exp(logprobs[i]) + weight * cache)
    return made


def _test_cached(candidate) -> None:
    random = np.random.default_rng()
    words = [f"w{i}" for i in random.zipf(1.5, 60) % 9]
    logprobs = np.log(random.uniform(0.01, 0.4, len(words)))
    for weight, window in ((0.1, 10), (0.4, 5), (0.0, 7)):
        found = candidate(logprobs, words, weight, window, 9)
        wanted = _cached(logprobs, words, weight, window, 9)
        same_kind(found, wanted)
        setting = f"the first word (window {window}, weight {weight}): "
        start = "Nothing was said yet, so the cache is uniform, 1 / size"
        if abs(found[0] - wanted[0]) > 1e-9:
            raise Wrong(f"{setting}expected {wanted[0]:.4f}, yours {found[0]:.4f}. {start}")
        expect(
            found,
            wanted,
            f"With a window of {window} the cache for word i looks at words i - {window} to i - 1, "
            f"never at word i, and mixes in their shares with weight {weight}",
            atol=1e-9,
        )


cached = Exercise(
    reference=_cached,
    test=_test_cached,
    question="Why would a cache help less on sentences in shuffled order than on whole documents?",
    hint="Mix probabilities, not logarithms: log((1 - weight) * exp(logprob) + weight * share).",
    minutes=15,
    difficulty="open",
)
