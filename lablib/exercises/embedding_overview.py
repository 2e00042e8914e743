"""Exercises of lab 1008."""

import random

import numpy as np

from lablib.exercises import Exercise, Wrong, expect, same_kind


def _echo_pool(states, offsets, length):
    second = np.array([end > length for start, end in offsets])
    return states[second].mean(0)


def _told_twice(special):
    sizes = [random.randint(1, 6) for _ in range(random.randint(3, 6))]
    offsets, place = ([(0, 0)] if special else []), 0
    length = sum(sizes)
    for copy in (0, 1):
        for first, size in enumerate(sizes):
            space = copy == 1 and first == 0
            offsets.append((place, place + size + space))
            place += size + space
    return offsets + ([(0, 0)] if special else []), length


def _test_echo_pool(candidate) -> None:
    for special in (False, True, True):
        offsets, length = _told_twice(special)
        states = np.random.randn(len(offsets), 5)
        first = np.array([0 < end <= length for start, end in offsets])
        half = len(offsets) // 2
        after = np.array([start > length for start, end in offsets])
        known = [
            (states.mean(0), "that is the mean over everything, both copies"),
            (states[first].mean(0), "that is the first copy, which has not seen the second"),
        ]
        if special:
            known.append(
                (states[half:].mean(0), "the last token here is a mark of offsets (0, 0), no text")
            )
        if after.any():
            why = "the second copy's first token starts at the space, which is at `length`"
            known.append((states[after].mean(0), why))
        why = "A token is of the second copy when it ends after the first `length` letters"
        wanted = _echo_pool(states, offsets, length)
        expect(candidate(states.copy(), list(offsets), length), wanted, why, known=known)


echo_pool = Exercise(
    reference=_echo_pool,
    test=_test_echo_pool,
    question="An encoder such as MiniLM sees both ways. What would telling it twice change?",
    hint="An offset is (first letter, one past the last) in the doubled text. Where does each end?",
    minutes=6,
    difficulty="easy",
)


def _sparse(logits, mask):
    weights = np.log1p(np.maximum(logits, 0))
    weights[~mask] = 0
    return weights.max(1)


def _test_sparse(candidate) -> None:
    for _ in range(3):
        n, length, words = random.randint(2, 4), random.randint(4, 6), random.randint(5, 9)
        logits = 3 * np.random.randn(n, length, words)
        mask = np.arange(length) < np.random.randint(2, length, (n, 1))
        logits[~mask] = 9.0
        wanted = _sparse(logits.copy(), mask)
        all_of_it = np.log1p(np.maximum(logits, 0))
        kept = all_of_it * mask[..., None]
        known = [
            (all_of_it.max(1), "padding counts: only tokens where mask is True may speak"),
            (kept.sum(1), "that is the sum over tokens; take the largest"),
            (kept.sum(1) / mask.sum(1)[:, None], "that is the mean over tokens; take the largest"),
            ((np.maximum(logits, 0) * mask[..., None]).max(1), "the logarithm is missing"),
        ]
        why = "First log(1 + relu(logit)), then the largest over each text's tokens"
        expect(candidate(logits.copy(), mask.copy()), wanted, why, known=known)


sparse = Exercise(
    reference=_sparse,
    test=_test_sparse,
    question="What does the logarithm do to a word that one token is very sure of?",
    hint="Numbers below zero become zero; what padding says must become zero before the maximum.",
    minutes=6,
    difficulty="medium",
)


def _own_weights(states, mask):
    place = mask * np.arange(1.0, mask.shape[1] + 1)
    return place / place.sum(1, keepdims=True)


def _test_own_weights(candidate) -> None:
    for _ in range(2):
        length, dim = random.randint(12, 15), random.randint(4, 7)
        lengths = np.array(random.sample(range(3, 12), 9))  # all: some weights, rounded, sum to 1
        states = np.random.randn(9, length, dim)
        mask = np.arange(length) < lengths[:, None]
        found = candidate(states.copy(), mask.copy())
        same_kind(found, mask.astype(float))  # one weight a token
        if not np.isfinite(found).all() or found.min() < 0:
            raise Wrong("weights are finite numbers, zero or more")
        if found[~mask].any():
            raise Wrong("padding has a weight: where mask is False it must be 0")
        sums = found.sum(1)
        if not np.allclose(sums, 1, atol=1e-6):
            raise Wrong(f"a text's weights sum to 1; yours to {sums[abs(sums - 1).argmax()]:.3f}")
        changed = np.where(mask[..., None], states, 50.0)
        if not np.allclose(found, candidate(changed, mask.copy()), atol=1e-8):
            raise Wrong("what stands in the padding changes your weights: use mask")
        if not np.allclose(found[:1], candidate(states[:1].copy(), mask[:1].copy()), atol=1e-8):
            raise Wrong("a text's weights must not change with the other texts of its batch")
        if np.allclose(found, mask / lengths[:, None]):
            raise Wrong("that is the plain mean, which has its row already: weigh the tokens")


own_weights = Exercise(
    reference=_own_weights,
    test=_test_own_weights,
    question="On which task does your row do best, and what in its texts may be why?",
    hint="Later tokens of a decoder have seen more. Weights that grow with the place are a start.",
    minutes=12,
    difficulty="open",
)
