"""Exercises of lab 711."""

import random

import numpy as np
import torch

from lablib.exercises import Exercise, Wrong, expect


def _sample_pairs(labels, n, draw):
    rows = []
    for number in range(n):
        same = number % 2 == 0
        while True:
            i, j = draw.sample(range(len(labels)), 2)
            if (labels[i] == labels[j]) == same:
                break
        rows.append((i, j, int(same)))
    return rows


def _test_sample_pairs(candidate) -> None:
    for n in (40, 6):
        labels = [0] * random.randint(3, 9) + [1] * random.randint(2, 4) + [2] * 2
        random.shuffle(labels)
        rows = candidate(labels, n, random.Random(random.random()))
        _check_rows(rows, labels, n)
    other = candidate(labels, 40, random.Random(1)), candidate(labels, 40, random.Random(2))
    if list(other[0]) == list(other[1]):
        raise Wrong("two draws gave the same pairs: let `draw` choose them")


def _check_rows(rows, labels, n) -> None:
    if not isinstance(rows, (list, tuple)) or len(rows) != n:
        raise Wrong(f"expected a list of {n} pairs")
    for row in rows:
        if not isinstance(row, (list, tuple)) or len(row) != 3:
            raise Wrong(f"a pair is (first, second, same); one of yours is {row!r}")
        i, j, same = row
        if not (0 <= i < len(labels) and 0 <= j < len(labels)):
            raise Wrong(f"({i}, {j}): places run from 0 to {len(labels) - 1}")
        if i == j:
            raise Wrong(f"({i}, {j}): a text beside itself has cosine 1 and teaches nothing")
        if same != (labels[i] == labels[j]):
            raise Wrong(
                f"({i}, {j}) have labels {labels[i]} and {labels[j]}, so same is not {same}"
            )
    equal = sum(row[2] for row in rows)
    if equal != n // 2:
        raise Wrong(f"{equal} of {n} pairs have equal labels; half of them should")


sample_pairs = Exercise(
    reference=_sample_pairs,
    test=_test_sample_pairs,
    question="From 16 texts of two labels one can make 120 pairs. Are these 120 pieces of "
    "evidence, or 16?",
    hint="Draw two different places until their labels agree, or differ, as this pair needs.",
    minutes=8,
    difficulty="easy",
)


def _adversary(gradient, epsilon):
    norm = gradient.flatten(1).norm(dim=1)[:, None, None]
    return epsilon * gradient / norm


def _test_adversary(candidate) -> None:
    for _ in range(2):
        gradient = torch.randn(3, 5, 4) * torch.tensor([1.0, 7.3, 0.02])[:, None, None]
        epsilon = float(torch.rand(())) + 0.3
        known = [
            (epsilon * gradient / gradient.norm(), "that is the norm of the whole batch: one text "
             "with a large slope leaves the others nearly where they were"),
            (epsilon * gradient / gradient.norm(dim=2, keepdim=True), "that moves each token by "
             "epsilon; the budget is the whole text's"),
            (epsilon * gradient.sign(), "the sign bounds each number; here the length is bounded"),
            (-_adversary(gradient, epsilon), "uphill: an adversary wants the loss to grow"),
            (epsilon * gradient, "divide by the length of the text's gradient"),
        ]  # fmt: skip
        hint = "one length a text, over tokens and dimensions"
        expect(candidate(gradient, epsilon), _adversary(gradient, epsilon), hint, known=known)


adversary = Exercise(
    reference=_adversary,
    test=_test_adversary,
    question="The step is found at the states before the upper block. What would change if it were "
    "found at word embeddings, below all blocks?",
    hint="Flatten a text's tokens and dimensions, take the norm, shape it to (n, 1, 1).",
    minutes=8,
    difficulty="medium",
)


def _cross(counts, mean):
    x = np.log2(counts)
    for k in range(len(x) - 1):
        if mean[k] * mean[k + 1] < 0:
            share = mean[k] / (mean[k] - mean[k + 1])
            return 2 ** (x[k] + share * (x[k + 1] - x[k]))
    return float("nan")


def _crossing(counts, gaps):
    every = _cross(counts, gaps.mean(0))
    without = [_cross(counts, np.delete(gaps, s, axis=0).mean(0)) for s in range(len(gaps))]
    return every, min(without), max(without)


def _test_crossing(candidate) -> None:
    expect(
        candidate(np.array([4.0, 16.0]), np.array([[-1.0, 1.0], [-1.0, 1.0]])),
        (8.0, 8.0, 8.0),
        "half way from 4 to 16 on a logarithmic axis is 8",
        atol=1e-4,
    )
    for _ in range(2):
        counts = np.array([8.0, 16.0, 64.0, 256.0, 1000.0])
        slope = np.random.uniform(0.8, 1.4)
        line = slope * (np.log2(counts) - np.random.uniform(4.5, 6.5))
        gaps = line + np.random.uniform(-0.3, 0.3, (5, 5))
        every, low, high = _crossing(counts, gaps)
        single = [_cross(counts, row) for row in gaps]
        straight = float(np.interp(0, gaps.mean(0), counts))
        known = [
            ((every, min(single), max(single)), "leave one seed out at a time, and average the "
             "others; you took each seed alone"),
            ((float(np.mean(single)), low, high), "average the curves first, then look for zero"),
        ]  # fmt: skip
        hint = "linear between two counts on log2 of the counts"
        if abs(straight - every) > 1e-3:
            known.append(((straight, low, high), "the axis of counts is logarithmic"))
        expect(candidate(counts, gaps), (every, low, high), hint, atol=1e-3, known=known)


crossing = Exercise(
    reference=_crossing,
    test=_test_crossing,
    question="What should the function answer when, without one of the seeds, the curve no longer "
    "crosses zero at all?",
    hint="Look for two neighbors of different sign; where between them is a straight line zero?",
    minutes=15,
    difficulty="open",
)
