"""Exercises of lab 306."""

import math

import numpy as np

from lablib.exercises import Exercise, expect


def _shrinks_to(d1: float, alpha2: float, alpha3: float) -> float:
    return 2 ** -(alpha2 - alpha3 * math.log(d1))


def _test_shrinks_to(candidate) -> None:
    why = "Without interaction twice the tokens leave 2^-alpha2 of it, whatever d1 is"
    expect(candidate(1e9, 0.5, 0.0), 2**-0.5, why)
    d1, a2, a3 = math.exp(10), float(np.random.default_rng().uniform(0.3, 0.6)), 0.02
    known = [
        (2 ** -(a2 + a3 * 10), "the interaction takes from the exponent: alpha2 - alpha3 log d1"),
        (2 ** -(a2 - a3 * math.log10(d1)), "log is the natural logarithm"),
        (a2 - a3 * 10, "that is the exponent; what is left of the loss is 2 to its negative"),
    ]
    hint = f"log d1 is 10 here, so the exponent is alpha2 - 10 alpha3 = {a2 - 0.2:.3f}"
    expect(candidate(d1, a2, a3), _shrinks_to(d1, a2, a3), hint, known=known)


shrinks_to = Exercise(
    reference=_shrinks_to,
    test=_test_shrinks_to,
    question="At which d1 would further training do nothing at all, by Table 2's coefficients?",
    hint="Divide the law's first term at 2 d2 by that at d2: all but the power of d2 cancels.",
    minutes=6,
    difficulty="easy",
)


def _interaction(losses: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    logs = np.log(losses)  # (2, 2)
    twist = logs[0, 0] - logs[0, 1] - logs[1, 0] + logs[1, 1]
    return twist / (math.log(a[1] / a[0]) * math.log(b[1] / b[0]))


def _test_interaction(candidate) -> None:
    random = np.random.default_rng()
    a, b = np.array([1e2, 1e3]), np.array([50.0, 800.0])
    for a3, why in (
        (0.0, "A product of a power of a and one of b has no interaction"),
        (0.0317, "Four corners of coefficient a^-alpha b^-(beta - 0.0317 log a)"),
    ):
        alpha, beta = random.uniform(0.1, 0.4, 2)
        power = np.log(b)[None] * (a3 * np.log(a)[:, None] - beta)
        losses = 7 * a[:, None] ** -alpha * np.exp(power)
        logs = np.log(losses)
        twist = logs[0, 0] - logs[0, 1] - logs[1, 0] + logs[1, 1]
        known = []
        if a3:
            known = [
                (-a3, "the sign: above 0 when the second row falls less from left to right"),
                (twist, "divide by log(a1 / a0) log(b1 / b0)"),
                (
                    losses[0, 0] - losses[0, 1] - losses[1, 0] + losses[1, 1],
                    "powers multiply: take logarithms of the losses first",
                ),
            ]
        expect(candidate(losses, a, b), _interaction(losses, a, b), why, known=known)


interaction = Exercise(
    reference=_interaction,
    test=_test_interaction,
    question="What would you subtract from the losses first, if they fall to a floor and not to 0?",
    hint="Take logarithms: everything is a sum then. Which combination of the four cancels all but "
    "alpha3 log a log b?",
    minutes=12,
    difficulty="medium",
)


def _catches_up(steps: np.ndarray, upcycled: np.ndarray, scratch: np.ndarray) -> float:
    gap = scratch - upcycled  # above 0: scratch is behind
    for at in range(len(steps)):
        if gap[at] <= 0:
            if at == 0:
                return float(steps[0])
            share = gap[at - 1] / (gap[at - 1] - gap[at])
            return float(steps[at - 1] * (steps[at] / steps[at - 1]) ** share)
    return math.inf


def _test_catches_up(candidate) -> None:
    steps = np.array([100.0, 200, 400, 800])
    level = np.full(4, 3.0)
    why = "Scratch is behind at every step, so it never catches up here"
    expect(candidate(steps, level, level + 1), math.inf, why)
    expect(candidate(steps, level, level - 1), 100.0, "Scratch is ahead from the start")
    scratch = np.array([3.6, 3.3, 3.1, 2.9])
    known = [
        (800.0, "that is the first point where it is ahead; it caught up between two points"),
        (600.0, "half way in the logarithm of the steps, not in the steps"),
    ]
    hint = "The gap is +0.1 at 400 and -0.1 at 800: half way in log steps, 400 * 2^0.5"
    expect(candidate(steps, level, scratch), 400 * 2**0.5, hint, known=known, atol=1e-4)
    gap = np.random.default_rng().uniform(0.1, 1.0, 4) * [1, 1, -1, -1]
    wanted = _catches_up(steps, level, level + gap)
    hint = "The first change of sign counts, on a line in the logarithm of the steps"
    expect(candidate(steps, level, level + gap), wanted, hint, atol=1e-4)


catches_up = Exercise(
    reference=_catches_up,
    test=_test_catches_up,
    question="Does the dense training's price belong into this comparison? For whom?",
    hint="Find the first point at which scratch - upcycled is 0 or less; between it and the one "
    "before, go along the line in log steps to where the gap is 0.",
    minutes=15,
    difficulty="medium",
)
