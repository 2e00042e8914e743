"""Exercises of lab 1001."""

import random

import numpy as np

from lablib.exercises import Exercise, expect


def _hard_loss(anchor, positive, negative, temperature):
    others = np.concatenate([positive, negative])  # (2 n, dim)
    weights = np.exp(anchor @ others.T / temperature)  # (n, 2 n)
    own = weights.diagonal()  # e(h_i, h_i+): the first n columns are the positives
    return float(-np.log(own / weights.sum(1)).mean())


def _units(*shape):
    drawn = np.random.default_rng(random.randrange(10**9)).normal(size=shape)
    return drawn / np.linalg.norm(drawn, axis=-1, keepdims=True)


def _test_hard_loss(candidate) -> None:
    e = np.eye(2)
    why = (
        "With two texts whose partners are themselves and whose negatives are each other's, at "
        "temperature 1, each text has weights e, 1, 1, e and loses -log(e / (2 e + 2))"
    )
    expect(candidate(e, e, e[::-1], 1.0), float(-np.log(np.e / (2 * np.e + 2))), why)
    for _ in range(3):
        n, dim = random.randint(3, 7), random.randint(3, 9)
        anchor, positive, negative = _units(3, n, dim)
        temperature = random.uniform(0.2, 0.9)
        a, p, c = anchor, positive, negative
        own = (a * p).sum(1) / temperature
        near = np.exp(a @ p.T / temperature)
        beside = np.exp((a * c).sum(1) / temperature)
        without = (np.log(near.sum(1)) - own).mean()
        single = (np.log(near.sum(1) + beside) - own).mean()
        known = [
            (float(without), "the hard negatives stand below the line, too"),
            (float(single), "each text has all hard negatives of the batch below it, not its own"),
            (_hard_loss(a, p, c, 1 / temperature), "divide by the temperature"),
            (_hard_loss(a, p, c, temperature) * n, "a mean over the texts, not their sum"),
            (-_hard_loss(a, p, c, temperature), "minus the logarithm: a loss is above zero"),
        ]
        found = candidate(anchor.copy(), positive.copy(), negative.copy(), temperature)
        expect(found, _hard_loss(a, p, c, temperature), "Compare with the sum", known=known)


hard_loss = Exercise(
    reference=_hard_loss,
    test=_test_hard_loss,
    question="What happens to the loss if a hard negative is in truth a second translation?",
    hint="Put positives and negatives below each other: one product then gives all cosines, and "
    "the right ones are on its diagonal.",
    minutes=10,
    difficulty="medium",
)


def _t5_numbers(vocabulary, dim, layers, heads, inner):
    attention = 4 * dim * 64 * heads  # queries, keys, values, output
    gated = 3 * dim * inner  # gate, up, down
    block = attention + gated + 2 * dim  # two norms
    return vocabulary * dim + layers * block + 32 * heads + dim  # a table of places, a last norm


def _test_t5_numbers(candidate) -> None:
    why = (
        "A vocabulary of 10, width 1, one layer, one head, inner width 1: 10, then 4 * 64, 3 and 2 "
        "in the layer, 32 for places and 1 for the last norm"
    )
    expect(candidate(10, 1, 1, 1, 1), 304, why)
    for _ in range(3):
        v, d, n = random.randint(900, 9000), 8 * random.randint(5, 60), random.randint(3, 30)
        h, f = random.randint(2, 40), random.randint(50, 900)
        right = _t5_numbers(v, d, n, h, f)
        known = [
            (right - n * d * f, "the gate is a third matrix of the feed-forward layer"),
            (right + n * (4 * d * d - 4 * d * 64 * h), "attention is heads * 64 wide, not dim"),
            (right + (n - 1) * 32 * h, "all layers share one table of places"),
            (right - v * d, "the embeddings count, too"),
            (right - 2 * n * d - d, "each layer has two norms, and one comes at the end"),
            (right - d, "one more norm comes after the last layer"),
            (right - 32 * h, "the table of places has 32 rows, a number for each head"),
            (right + v * d, "an encoder has one table of embeddings, and no head"),
        ]
        expect(candidate(v, d, n, h, f), right, "Count matrix by matrix", known=known)


t5_numbers = Exercise(
    reference=_t5_numbers,
    test=_test_t5_numbers,
    question="A product needs three languages only. Which of these numbers can it do without?",
    hint="Four matrices of attention, three of the feed-forward layer, two norms. Then what is "
    "there once: the vocabulary, the table of places, the last norm.",
    minutes=8,
    difficulty="easy",
)


def _ratio_margin(cosine, k):
    from_row = np.sort(cosine, axis=1)[:, -k:].mean(1, keepdims=True)  # (n, 1)
    from_column = np.sort(cosine, axis=0)[-k:].mean(0, keepdims=True)  # (1, m)
    return cosine / ((from_row + from_column) / 2)  # (n, m)


def _test_ratio_margin(candidate) -> None:
    small = np.array([[0.8, 0.6], [0.8, 0.4]])
    why = (
        "For [[0.8, 0.6], [0.8, 0.4]] and k = 1: the first row's nearest has 0.8, the second "
        "column's 0.6, so their cosine 0.6 becomes 0.6 / 0.7"
    )
    expect(candidate(small.copy(), 1), small / [[0.8, 0.7], [0.8, 0.7]], why)
    for _ in range(3):
        n, m, k = random.randint(5, 8), random.randint(5, 8), random.randint(2, 4)
        cosine = np.random.default_rng(random.randrange(10**9)).uniform(0.2, 0.95, (n, m))
        right = _ratio_margin(cosine, k)
        rows = np.sort(cosine, axis=1)[:, -k:].mean(1, keepdims=True)
        columns = np.sort(cosine, axis=0)[-k:].mean(0, keepdims=True)
        low = np.sort(cosine, axis=1)[:, :k].mean(1, keepdims=True)
        low = (low + np.sort(cosine, axis=0)[:k].mean(0, keepdims=True)) / 2
        known = [
            (cosine / rows, "look from the column, too: how near is it to its own nearest?"),
            (cosine / columns, "look from the row, too: how near is it to its own nearest?"),
            (cosine / (rows + columns), "a mean of the two, not their sum"),
            (cosine - (rows + columns) / 2, "a ratio, not a difference"),
            (cosine / low, "the nearest are those of the largest cosines"),
            (
                _ratio_margin(cosine, min(n, m)),
                "the mean over the k nearest alone, not over all of them",
            ),
        ]
        expect(candidate(cosine.copy(), k), right, "Sort, and take the last k", known=known)


ratio_margin = Exercise(
    reference=_ratio_margin,
    test=_test_ratio_margin,
    question="One sentence is near to everything, such as the shortest. What does the margin make "
    "of it?",
    hint="Sort each row and take the mean of its k largest; do the same with each column. Shapes "
    "(n, 1) and (1, m) add up to (n, m).",
    minutes=10,
    difficulty="medium",
)
