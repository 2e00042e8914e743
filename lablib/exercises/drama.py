"""Exercises of lab 1005."""

import random

import numpy as np

from lablib.exercises import Exercise, expect


def _hard_negative(scores, own, margin):
    trusted = scores <= scores[own] - margin
    trusted[own] = False
    return int(np.where(trusted, scores, -np.inf).argmax())


def _test_hard_negative(candidate) -> None:
    why = "Own text at 0.8: with a margin of 0.1 the one at 0.75 may be right too, 0.6 is taken"
    expect(candidate(np.array([0.6, 0.8, 0.75, 0.2]), 1, 0.1), 0, why)
    for _ in range(4):
        n, margin = random.randint(9, 14), random.choice([0.05, 0.1])
        scores = np.random.permutation(n) / n * 0.6
        own = int(np.random.choice(n))
        scores[own] = 0.9
        near, above = np.random.choice(np.delete(np.arange(n), own), 2, replace=False)
        scores[near], scores[above] = 0.9 - margin / 2, 0.95
        others = np.delete(np.arange(n), own)
        wanted = _hard_negative(scores.copy(), own, margin)
        known = [
            (int(others[scores[others].argmax()]), "a text above the own one is no sure negative"),
            (int(near), "that one is within the margin of the own text's score"),
            (int(scores.argmin()), "the nearest of those left is hard, not the farthest"),
            (int(own), "the own text is the right answer"),
        ]
        expect(candidate(scores.copy(), own, margin), wanted, why, known=known)


hard_negative = Exercise(
    reference=_hard_negative,
    test=_test_hard_negative,
    question="What does a student learn from a negative that is a right answer nobody marked?",
    hint="Keep the texts with `scores <= scores[own] - margin`, without own; of them the highest.",
    minutes=8,
    difficulty="easy",
)


def _unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _nested_loss(q, d, dims, t):
    total = 0.0
    for dim in dims:
        scores = _unit(q[:, :dim]) @ _unit(d[:, :dim]).T / t  # (n, n)
        log_sum = np.log(np.exp(scores).sum(1))
        total += (log_sum - np.diag(scores)).mean()
    return total


def _test_nested_loss(candidate) -> None:
    why = "Two queries, each equal to its text and at a right angle to the other one, at t = 1: "
    why += "log(e + 1) - 1 for the first two numbers"
    expect(candidate(np.eye(2), np.eye(2), [2], 1.0), np.log(np.e + 1) - 1, why)
    for _ in range(3):
        n, dim = random.randint(4, 6), random.randint(7, 9)
        q, d = np.random.randn(n, dim), np.random.randn(n, dim)
        dims, t = [dim, 4, 2], random.choice([0.3, 0.5])
        wanted = _nested_loss(q, d, dims, t)
        cut = sum(
            np.mean(np.log(np.exp(s).sum(1)) - np.diag(s))
            for s in ((_unit(q)[:, :k] @ _unit(d)[:, :k].T) / t for k in dims)
        )
        known = [
            (_nested_loss(q, d, [dim], t), "that is the loss of whole vectors alone"),
            (wanted / 3, "a sum over the sizes, not a mean"),
            (cut, "cut first, then divide by the length that is left"),
            (_nested_loss(d, q, dims, t), "each query looks among the texts, not the other way"),
        ]
        expect(candidate(q.copy(), d.copy(), dims, t), wanted, why, known=known)


nested_loss = Exercise(
    reference=_nested_loss,
    test=_test_nested_loss,
    question="The first two numbers are in all three losses. What will they be used for?",
    hint="For each size: cut both, divide each row by its length, scores q d^T / t, then the mean "
    "of log(sum of exp over a row) minus the diagonal.",
    minutes=12,
    difficulty="medium",
)


def _units_for(budget, dim, blocks, heads, kv_heads):
    attention = 2 * dim * 64 * (heads + kv_heads)
    return (budget // blocks - attention) // (3 * dim)


def _test_units_for(candidate) -> None:
    why = "Width 64 and one block with one head of each kind: 4 * 64 * 64 = 16,384 for attention; "
    why += "of a budget of 20,000 the other 3,616 give 18 units of 3 * 64"
    expect(candidate(20_000, 64, 1, 1, 1), 18, why)
    for _ in range(4):
        kv = random.choice([2, 3])
        heads, blocks = kv * random.choice([2, 4]), random.randint(5, 13)
        dim = 64 * random.randint(6, 9)
        units = random.randint(700, 1900)
        attention = 2 * dim * 64 * (heads + kv)
        budget = blocks * (attention + 3 * dim * units) + random.randint(3, 3 * dim - 1)
        wanted = _units_for(budget, dim, blocks, heads, kv)
        equal = (budget // blocks - 4 * dim * 64 * heads) // (3 * dim)
        two = (budget // blocks - attention) // (2 * dim)
        known = [
            (equal, "keys and values have kv_heads heads, which may be fewer"),
            (two, "the MLP has three matrices: gate, up and down"),
            ((budget - attention) // (3 * dim), "each of the blocks takes its part of the budget"),
            (wanted + 1, "one unit more is over the budget: round down"),
        ]
        expect(candidate(budget, dim, blocks, heads, kv), wanted, why, known=known)


units_for = Exercise(
    reference=_units_for,
    test=_test_units_for,
    question="Twice the blocks, or twice the units: which one costs more attention?",
    hint="A block has W_q and W_o (dim x 64 heads), W_k and W_v (dim x 64 kv_heads) and three "
    "matrices (dim x units); norms are left out. `//` rounds down.",
    minutes=8,
    difficulty="medium",
)
