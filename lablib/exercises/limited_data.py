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


def _crossing(counts, gaps, draws):
    every = [_cross(counts, gaps[places].mean(0)) for places in draws]
    there = [x for x in every if x == x]
    low, high = np.quantile(there, [0.025, 0.975])
    return _cross(counts, gaps.mean(0)), low, high, len(there) / len(every)


def _test_crossing(candidate) -> None:
    counts = np.array([4.0, 16.0])
    same = np.array([[-1.0, 1.0], [-1.0, 1.0]])
    hint = "half way from 4 to 16 on a logarithmic axis is 8"
    expect(candidate(counts, same, np.array([[0, 1], [1, 1]])), (8.0, 8.0, 8.0, 1.0), hint)
    for _ in range(2):
        counts = np.array([8.0, 16.0, 64.0, 256.0, 1000.0])
        slope = np.random.uniform(0.8, 1.4)
        line = slope * (np.log2(counts) - np.random.uniform(4.5, 6.5))
        gaps = line + np.random.uniform(-0.3, 0.3, (5, 5))
        draws = np.random.randint(5, size=(60, 5))
        wanted = _crossing(counts, gaps, draws)
        hint = "a draw is a list of seeds: average their curves, find its zero"
        known = _known(counts, gaps, draws, wanted)
        expect(candidate(counts, gaps, draws), wanted, hint, atol=1e-3, known=known)
    _test_without_a_crossing(candidate)


def _known(counts, gaps, draws, wanted):
    every, low, high, share = wanted
    drawn = [_cross(counts, gaps[places].mean(0)) for places in draws]
    single = [_cross(counts, row) for row in gaps]
    without = [_cross(counts, np.delete(gaps, s, axis=0).mean(0)) for s in range(len(gaps))]
    sets = [_cross(counts, gaps[np.unique(places)].mean(0)) for places in draws]
    straight = float(np.interp(0, gaps.mean(0), counts))
    known = [
        ((every, min(without), max(without), share), "that leaves one seed out at a time, which "
         "moves the mean by far less than new seeds would"),
        ((every, min(single), max(single), share), "each seed alone spreads more than their mean "
         "does; average the curves of a draw"),
        ((every, min(drawn), max(drawn), share), "smallest and largest grow with the number of "
         "draws; the interval leaves 2.5 % out on each side"),
        ((every, *np.quantile(drawn, [0.05, 0.95]), share), "5 % on each side leave 90 % inside"),
        ((every, *np.quantile(sets, [0.025, 0.975]), share), "a seed that is drawn twice counts "
         "twice"),
        ((float(np.mean(single)), low, high, share), "average the curves first, then look for "
         "zero"),
        ((float(np.mean(drawn)), low, high, share), "the first number is of the seeds as they "
         "are, without a draw"),
    ]  # fmt: skip
    if abs(straight - every) > 1e-3:
        known.append(((straight, low, high, share), "the axis of counts is logarithmic"))
    return known


def _test_without_a_crossing(candidate) -> None:
    counts, gaps = np.array([4.0, 16.0]), np.array([[-3.0, 1.0], [1.0, 3.0]])
    draws = np.array([[0, 0], [0, 1], [1, 1], [1, 0]])  # those of seed 1 alone never cross
    hint = "a draw that never crosses has no place in the interval, and lowers the share"
    try:
        made = candidate(counts, gaps, draws)
    except Exception as error:
        raise Wrong(f"where a draw never crosses zero it fails: {error}") from error
    expect(made, _crossing(counts, gaps, draws), hint, atol=1e-4)


crossing = Exercise(
    reference=_crossing,
    test=_test_crossing,
    question="When half of all draws never cross, what does an interval of the other half say? "
    "What would you write into a report instead?",
    hint="A function for one curve: two neighbors of different sign, and where a straight line "
    "between them is zero. Call it for the mean of `gaps[places]`, for every draw.",
    minutes=20,
    difficulty="open",
)
