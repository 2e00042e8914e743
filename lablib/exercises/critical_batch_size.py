"""Exercises of lab 406."""

import math

import numpy as np

from lablib.exercises import Exercise, expect
from lablib.scaling.critical_batch_size import critical_batch, noise_scale


def _test_critical(candidate) -> None:
    why = "S(B) B is 1000 B + 1e6 here: at 250 that is 1.25e6, a fifth more is 1.5e6, so B* is 500"
    expect(candidate(1000.0, 1e6, 250.0, 0.2), 500.0, why)
    a, b, optimal, overhead = np.random.uniform((200, 1e5, 16, 0.05), (2000, 1e7, 512, 0.5))
    right = critical_batch(a, b, optimal, overhead)
    known = [
        (b / a, "that is where half of the data is wasted: no overhead is in it"),
        (overhead * b / a, "overhead is counted from B_opt, which is not 0"),
        ((1 + overhead) * optimal + b / (5 * a), "a fifth is only one price: use `overhead`"),
        (b / ((1 + overhead) * steps(a, b, optimal) - a), "overhead is counted in data, not "
         "in steps"),
    ]  # fmt: skip
    hint = "write S(B*) B* = (1 + overhead) S(B_opt) B_opt out, with S(B) B = a B + b"
    expect(candidate(a, b, optimal, overhead), right, hint, known=known)


def steps(a: float, b: float, batch: float) -> float:
    """S(B)."""
    return a + b / batch


critical = Exercise(
    reference=critical_batch,
    test=_test_critical,
    question="With B_opt near 0, what does b / a mean for somebody who buys machines?",
    hint="Both sides are straight lines in B.",
    minutes=8,
    difficulty="easy",
)


def _test_noise(candidate) -> None:
    why = "|g|^2 + S = 10 for one row, |g|^2 + S/4 = 4 for four: S is 8, |g|^2 is 2, the scale is 4"
    expect(candidate(10.0, 4.0, 1, 4), 4.0, why)
    signal, noise = np.random.uniform((0.5, 5), (2, 50))
    few, many = 2, 16
    small, large = signal + noise / few, signal + noise / many
    known = [
        (small / large, "both norms hold noise; two equations give two unknowns"),
        (
            noise / (signal + noise / many),
            "the large batch's norm has noise left in it, too",
        ),
        (noise, "noise alone has the unit of a squared gradient: divide by |g|^2"),
        (signal / noise, "that is signal over noise"),
    ]
    hint = "subtract the two equations to get rid of |g|^2; then put S into one of them"
    expect(candidate(small, large, few, many), noise / signal, hint, known=known)


noise = Exercise(
    reference=noise_scale,
    test=_test_noise,
    question="At the end of training |g| shrinks. What does a good batch do then?",
    hint="E|G_B|^2 = |g|^2 + S/B for both batches.",
    minutes=10,
    difficulty="medium",
)


def _cheapest(a: float, b: float, wait: float, token: float) -> float:
    return math.sqrt(wait * b / (token * a))


def _test_cheapest(candidate) -> None:
    why = (
        "4 (100 + 10,000/B) + 1 (100 B + 10,000) is least where -4 * 10,000 / B^2 + 100 = 0: at 20"
    )
    expect(candidate(100.0, 1e4, 4.0, 1.0), 20.0, why)
    a, b, wait, token = np.random.uniform((200, 1e5, 0.1, 1e-4), (2000, 1e7, 10, 1e-2))
    known = [
        (b / a, "prices decide: waiting for a step and paying for a token"),
        (math.sqrt(token * b / (wait * a)), "dearer waiting asks for larger batches"),
        (wait * b / (token * a), "the derivative of b/B is -b/B^2: a root is missing"),
    ]
    hint = "set the derivative of wait S(B) + token S(B) B to zero"
    expect(candidate(a, b, wait, token), _cheapest(a, b, wait, token), hint, known=known)


cheapest = Exercise(
    reference=_cheapest,
    test=_test_cheapest,
    question="At which price of waiting is the cheapest batch the critical one?",
    hint="The bill is wait * S(B) + token * S(B) * B.",
    minutes=12,
    difficulty="open",
)
