"""Exercises of lab 101: discounts, interpolation weights, and a cache that forgets nothing."""

import numpy as np

from lablib.exercises import Exercise


def _discounts(counts):
    n = [sum(count == k for count in counts) for k in range(5)]
    y = n[1] / (n[1] + 2 * n[2])
    return tuple(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))


def _test_discounts(candidate):
    rng = np.random.default_rng()
    for _ in range(5):
        # Geometric counts have all of n1 to n4, falling as real counts of counts do.
        counts = rng.geometric(rng.uniform(0.35, 0.6), size=400).tolist() + [1, 2, 3, 4]
        found, wanted = candidate(list(counts)), _discounts(counts)
        assert np.shape(found) == (3,), (
            f"return the three discounts (D1, D2, D3+); yours has shape {np.shape(found)}"
        )
        n = [counts.count(k) for k in range(1, 5)]
        for k, (yours, right) in enumerate(zip(found, wanted, strict=True), 1):
            assert abs(yours - right) < 1e-9, (
                f"for n1..n4 = {n}, D{k} is {right:.4f}, yours {yours:.4f}: n_k is how many "
                f"n-grams have the count k, and D{k} = {k} - {k + 1} Y n{k + 1} / n{k} with "
                f"Y = n1 / (n1 + 2 n2) = {n[0] / (n[0] + 2 * n[1]):.4f}"
            )


discounts = Exercise(_discounts, _test_discounts)


def _em_step(logprobs, weights):
    owed = weights[:, None] * np.exp(logprobs)
    return (owed / owed.sum(0)).mean(1)


def _test_em_step(candidate):
    rng = np.random.default_rng()
    for models, words in ((2, 40), (3, 200), (4, 7)):
        logprobs = np.log(rng.uniform(1e-4, 0.5, (models, words)))
        weights = rng.dirichlet(np.ones(models))
        found = np.asarray(candidate(logprobs.copy(), weights.copy()), dtype=float)
        assert found.shape == (models,), (
            f"one weight a model: {models} of them; yours has shape {found.shape}"
        )
        assert abs(found.sum() - 1) < 1e-9, (
            f"weights must sum to 1; yours sum to {found.sum():.4f}. Divide each word's shares by "
            "their own sum before you average over words"
        )
        wanted = _em_step(logprobs, weights)
        worst = int(np.abs(found - wanted).argmax())
        assert np.allclose(found, wanted, atol=1e-9), (
            f"model {worst} should get {wanted[worst]:.4f}, yours {found[worst]:.4f}: a word's "
            "share for model i is weight_i p_i(word) over its sum over all models; the step is the "
            "mean share. Mind that logprobs are logarithms"
        )


em_step = Exercise(_em_step, _test_em_step)


def _cached(logprobs, words, weight=0.1, window=200, size=10_000):
    made = np.empty(len(words))
    for i, word in enumerate(words):
        recent = words[max(0, i - window) : i]
        cache = recent.count(word) / len(recent) if recent else 1 / size
        made[i] = np.log((1 - weight) * np.exp(logprobs[i]) + weight * cache)
    return made


def _test_cached(candidate):
    rng = np.random.default_rng()
    words = [f"w{i}" for i in rng.zipf(1.5, 60) % 9]
    logprobs = np.log(rng.uniform(0.01, 0.4, len(words)))
    for weight, window in ((0.1, 10), (0.4, 5), (0.0, 7)):
        found = np.asarray(candidate(logprobs, list(words), weight, window, 9), dtype=float)
        assert found.shape == logprobs.shape, (
            f"one log-probability a word: {logprobs.shape}; yours has shape {found.shape}"
        )
        wanted = _cached(logprobs, words, weight, window, 9)
        off = np.flatnonzero(~np.isclose(found, wanted, atol=1e-9))
        at = int(off[0]) if len(off) else 0
        why = (
            "nothing was said yet, so the cache is uniform, 1 / size"
            if at == 0
            else f"the cache may look at words {max(0, at - window)} to {at - 1} only, never at "
            "the word it predicts, and gives each its share of them"
        )
        assert not len(off), (
            f"word {at} ({words[at]!r}, window {window}, weight {weight}) should get "
            f"{wanted[at]:.4f}, yours {found[at]:.4f}: {why}"
        )


cached = Exercise(_cached, _test_cached)
