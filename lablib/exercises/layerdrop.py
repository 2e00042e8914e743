"""Exercises of lab 801."""

import math

import numpy as np

from lablib.exercises import Exercise, expect


def _stays(n_layers, rate):
    period = math.floor(1 / rate)
    return [depth - 1 for depth in range(1, n_layers + 1) if depth % period != 0]


def _test_stays(candidate) -> None:
    for n_layers, rate in ((8, 0.5), (8, 0.25), (int(np.random.randint(9, 24)), 0.4)):
        period, places = math.floor(1 / rate), range(n_layers)
        gone = [place for place in places if (place + 1) % period == 0]
        from_zero = [place for place in places if place % period]
        nearest = [place for place in places if (place + 1) % max(2, round(1 / rate))]
        known = [
            (gone, "these are the blocks that go; give the ones that stay"),
            (
                from_zero,
                "depths count from 1, places from 0: the first block has depth 1 and stays",
            ),
            ([place + 1 for place in _stays(n_layers, rate)], "give places, which count from 0"),
            (nearest, "floor, not round: at a rate of 0.4 every second block goes"),
        ]
        hint = f"of {n_layers} blocks at rate {rate:g}, depths that {period} divides go"
        expect(candidate(n_layers, rate), _stays(n_layers, rate), hint, known=known)


stays = Exercise(
    reference=_stays,
    test=_test_stays,
    question="At which rates does the formula remove every block there is?",
    hint="Is depth 1 divisible by floor(1 / p)? Depth 2? A block at depth d has place d - 1.",
    minutes=8,
    difficulty="easy",
)


def _steps_with(k, n_layers, rate, steps):
    chance = math.comb(n_layers, k) * (1 - rate) ** k * rate ** (n_layers - k)
    return steps * chance


def _test_steps_with(candidate) -> None:
    why = "of two blocks at rate 0.5 exactly one runs in half of the steps: first or second"
    expect(candidate(1, 2, 0.5, 100), 50.0, why)
    for _ in range(2):  # a rounded answer passes one draw by chance
        n, steps = int(np.random.randint(5, 12)), int(np.random.randint(100, 900))
        k, rate = int(np.random.randint(n // 2 + 1, n)), float(np.random.choice([0.1, 0.2, 0.3]))
        known = [
            (
                _steps_with(k, n, 1 - rate, steps),
                "the rate is the chance to be left out, not to stay",
            ),
            (
                steps * (1 - rate) ** k * rate ** (n - k),
                "which k of the blocks? There are several ways",
            ),
            (_steps_with(k, n, rate, 1), "that is the chance of one step; there are more of them"),
            (steps * n * (1 - rate), "that counts updates of blocks; count steps with exactly k"),
        ]
        hint = (
            "each block stays with 1 - p, goes with p, and any k of them may be the ones that stay"
        )
        expect(candidate(k, n, rate, steps), _steps_with(k, n, rate, steps), hint, known=known)


steps_with = Exercise(
    reference=_steps_with,
    test=_test_steps_with,
    question="For k of n blocks, which rate makes such steps most frequent: is it section 3.2.2's "
    "p = 1 - k / n?",
    hint="A coin for each block: the binomial distribution. math.comb counts the ways.",
    minutes=8,
    difficulty="easy",
)


def _rising(n_layers, rate):
    return [2 * rate * place / (n_layers - 1) for place in range(n_layers)]


def _test_rising(candidate) -> None:
    expect(candidate(3, 0.2), [0.0, 0.2, 0.4], "the mean of 0, 0.2 and 0.4 is 0.2")
    n, rate = int(np.random.randint(4, 12)), float(np.random.uniform(0.05, 0.45))
    known = [
        ([rate * i / (n - 1) for i in range(n)], "the mean is half of what it should be"),
        ([2 * rate * i / n for i in range(n)], "the mean is a little too low: the last is 2 p"),
        ([2 * rate * (i + 1) / n for i in range(n)], "the first block should always run"),
        (_rising(n, rate)[::-1], "the other way round: deep blocks go more often"),
    ]
    hint = "equal steps from 0, and the mean over blocks is the rate"
    expect(candidate(n, rate), _rising(n, rate), hint, known=known)


rising = Exercise(
    reference=_rising,
    test=_test_rising,
    question="Figure 5 of the paper finds the first and the last layers the most important. What "
    "rates would you give them?",
    hint="A straight line from 0 to twice the mean.",
    minutes=8,
    difficulty="medium",
)
