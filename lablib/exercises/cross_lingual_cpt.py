"""Exercises of lab 410."""

import math

import numpy as np

from lablib.exercises import Exercise, expect


def _tokens_saved(tokens, loss, from_scratch, losses):
    logs = np.interp(-loss, -np.asarray(losses), np.log(from_scratch))
    return math.exp(logs) - tokens


def _test_tokens_saved(candidate) -> None:
    scratch, losses = np.array([1.0, 4.0]), np.array([3.0, 2.0])
    why = "loss 2.5 is halfway from 3 to 2, so halfway from 1 to 4 in logarithms: at 2"
    expect(candidate(0.5, 2.5, scratch, losses), 1.5, why)
    random = np.random.default_rng()
    scratch = np.array([2.0, 4.0, 8.0, 16.0]) * random.uniform(0.5, 2)
    losses = 4 - np.cumsum(random.uniform(0.3, 0.6, 4))
    place = random.integers(3)
    loss = losses[place] + random.uniform(0.3, 0.7) * (losses[place + 1] - losses[place])
    right = _tokens_saved(0.9, loss, scratch, losses)
    known = [
        (right + 0.9, "that is what the fresh model reads; how much less did the other read?"),
        (-right, "what the fresh model reads minus what the other read"),
        (right / (right + 0.9), "that is the share; the amount is asked for"),
        (np.interp(-loss, -losses, scratch) - 0.9, "interpolate between logarithms of tokens"),
        (np.exp(np.interp(loss, losses, np.log(scratch))) - 0.9, "`np.interp` wants rising x"),
    ]
    why = "find where the fresh model has that loss, and subtract what the other read"
    expect(candidate(0.9, loss, scratch, losses), right, why, known=known)


tokens_saved = Exercise(
    reference=_tokens_saved,
    test=_test_tokens_saved,
    question="And if the loss lies below all that the fresh model has reached?",
    hint="`np.interp` wants rising x: interpolate `np.log(from_scratch)` over `-losses`.",
    minutes=10,
    difficulty="medium",
)


def _crossing(one, other):
    (c, a), (d, b) = one, other
    return (d / c) ** (1 / (a - b))


def _test_crossing(candidate) -> None:
    why = "2 C^0.5 and 8 C^0.3 are equal where C^0.2 = 4: at 1,024"
    expect(candidate((2.0, 0.5), (8.0, 0.3)), 1024.0, why)
    random = np.random.default_rng()
    c, d = random.uniform(1, 2), random.uniform(3, 6)
    a, b = random.uniform(0.8, 0.9), random.uniform(0.3, 0.4)
    right = _crossing((c, a), (d, b))
    known = [
        ((c / d) ** (1 / (a - b)), "below 1? one of the two quotients is upside down"),
        ((d / c) ** (a - b), "C^(a - b) = d / c: now take the root"),
        (math.log(right), "that is its logarithm"),
    ]
    why = "c C^a = d C^b, so C^(a - b) = d / c"
    expect(candidate((c, a), (d, b)), right, why, known=known)


crossing = Exercise(
    reference=_crossing,
    test=_test_crossing,
    question="How far does the crossing move when one exponent is wrong by 0.005?",
    hint="Divide both sides by C^b and by c.",
    minutes=6,
    difficulty="easy",
)


def _english_text(new, ratio):
    return new * ratio / (1 - ratio)


def _test_english_text(candidate) -> None:
    why = "9 KiB of Chichewa and 1 of English: a tenth of 10"
    expect(candidate(9.0, 0.1), 1.0, why)
    random = np.random.default_rng()
    new, ratio = random.uniform(2, 9), random.uniform(0.1, 0.4)
    right = _english_text(new, ratio)
    known = [
        (new * ratio, "the share is of all that is read, not of the Chichewa"),
        (new + right, "that is all that is read"),
        (new / (1 - ratio), "that is all that is read"),
    ]
    expect(candidate(new, ratio), right, "English / (English + new) = ratio", known=known)


english_text = Exercise(
    reference=_english_text,
    test=_test_english_text,
    question="Half of all is English: how much longer does the training take?",
    hint="Solve x / (x + new) = ratio for x.",
    minutes=5,
    difficulty="easy",
)
