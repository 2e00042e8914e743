"""Exercises of lab 1006."""

import math
import random

import torch
from torch.nn import functional as F

from lablib.exercises import Exercise, expect


def _longest_prefix(said, wanted):
    count = 0
    for one, other in zip(said, wanted):
        if one != other:
            break
        count += 1
    return count


def _test_longest_prefix(candidate) -> None:
    why = "count from the front, and stop at the first token that differs"
    expect(candidate([5, 7, 9, 4], [5, 7, 8, 4]), 2, why)
    expect(candidate([3, 1], [3, 1, 2]), 2, "what is said may end before what is wanted")
    expect(candidate([6, 2, 8], [6, 2, 8]), 3, "all three are right")
    for _ in range(3):
        wanted = [random.randint(1, 30) for _ in range(random.randint(9, 15))]
        at = random.randint(0, 6)
        said = [*wanted[:at], wanted[at] + 40, *wanted[at + 1 :]]
        known = [(len(wanted) - 1, "tokens after the first wrong one don't count any more")]
        expect(candidate(list(said), list(wanted)), at, why, known=known)


longest_prefix = Exercise(
    reference=_longest_prefix,
    test=_test_longest_prefix,
    question="Why does one wrong token near the front cost more than one at the end?",
    hint="zip walks along both lists at once and ends with the shorter one.",
    minutes=4,
    difficulty="easy",
)


def _shift_gradient(hidden, head, wanted, z):
    logits = (hidden + z) @ head.T
    errors = logits.softmax(-1) - F.one_hot(wanted, len(head))
    return (errors @ head).sum(0)


def _test_shift_gradient(candidate) -> None:
    for _ in range(3):
        length, vocab, dim = (random.randint(low, low + 5) for low in (4, 11, 3))
        hidden, head = torch.randn(length, dim), torch.randn(vocab, dim)
        wanted, z = torch.randint(vocab, (length,)), torch.randn(dim)
        right = _shift_gradient(hidden, head, wanted, z)
        why = "for each position, probabilities minus one at the token wanted, times the head"
        known = [
            (right / length, "that is the mean over positions; the surprise is their sum"),
            (-right, "the sign is that of more likely, and we go down the surprise"),
            (_shift_gradient(hidden, head, wanted, 0 * z), "z is added before the head reads"),
        ]
        found = candidate(hidden.clone(), head.clone(), wanted.clone(), z.clone())
        expect(found, right, why, known=known, atol=1e-4)


shift_gradient = Exercise(
    reference=_shift_gradient,
    test=_test_shift_gradient,
    question="One z serves all positions. What does that forbid this place to say, whatever z is?",
    hint="Of one position, the gradient for the logits is softmax(logits) minus the one-hot vector "
    "of the token wanted. The logits are head times (state + z).",
    minutes=12,
    difficulty="medium",
)


def _bits(dim, nats):
    return 32 * dim, nats / math.log(2)


def _test_bits(candidate) -> None:
    expect(candidate(2, math.log(8)), (64, 3.0), "two numbers of 32 bits; log 8 nats are 3 bits")
    for _ in range(3):
        dim, nats = random.randint(50, 900), random.uniform(15, 90)
        kept, needed = _bits(dim, nats)
        known = [
            ((needed, kept), "the vector's bits come first"),
            ((4 * dim, needed), "a number of float32 has 4 bytes: bits are wanted"),
            ((kept, nats), "the model's surprise is in nats; a bit is log 2 of them"),
            ((kept, nats * math.log(2)), "a nat is more than a bit, so there are more bits"),
        ]
        expect(candidate(dim, nats), (kept, needed), "count both in bits", known=known)


bits = Exercise(
    reference=_bits,
    test=_test_bits,
    question="Steps of Adam, not bits, are scarce here. What could you do to a found z to see how "
    "many of its bits count?",
    hint="float32 has 32 bits a number. A token of probability 1/2 costs one bit, or log 2 nats.",
    minutes=5,
    difficulty="easy",
)


def _to_z(vectors, z, new, strength):
    center, middle = vectors.mean(0), z.mean(0)
    v = vectors - center
    gram = v.T @ v + strength * torch.eye(v.shape[1])
    weights = torch.linalg.solve(gram, v.T @ (z - middle))
    return middle + (new - center) @ weights


def _test_to_z(candidate) -> None:
    for _ in range(3):
        n, dim, width = random.randint(5, 7), random.randint(9, 12), random.randint(3, 5)
        m, strength = random.randint(2, 4), random.choice([0.4, 0.6, 2.0, 3.0])
        vectors, new = torch.randn(n, dim) + 0.5, torch.randn(m, dim) + 0.5
        z = vectors @ torch.randn(dim, width) + 0.5 * torch.randn(n, width) + 2
        right, center, middle = _to_z(vectors, z, new, strength), vectors.mean(0), z.mean(0)
        plain = middle + (new - center) @ torch.linalg.pinv(vectors - center) @ (z - middle)
        known = [
            (middle.expand(m, -1), "that is the mean z for all: the map has to read the vectors"),
            (right - middle, "the mean z, which was taken off before the fit, is missing"),
            (_without_constant(vectors, z, new, strength), "the map lacks a constant: take the "
             "mean off the vectors and off z before the fit"),
            (_with_ones(vectors, z, new, strength), "strength holds back the constant, too: take "
             "the means off, in place of a column of ones"),
            (plain, "strength is left out; with fewer pairs than numbers the map then follows the "
             "noise of z"),
            (_to_z(vectors, z, new, n * strength), "strength stands beside the sum of squared "
             "errors, not beside their mean"),
            (_to_z(vectors, z, new, strength**2), "strength is not squared"),
            (_to_z(vectors, z, new - new.mean(0) + center, strength), "take the mean of the "
             "fitted vectors off the new ones, not their own: a sentence's z depends on no other"),
        ]  # fmt: skip
        given = (part.clone() for part in (vectors, z, new))
        hint = "means off, (V^T V + strength I) W = V^T Z, the mean z back on"
        expect(candidate(*given, strength), right, hint, known=known, atol=1e-3)


def _without_constant(vectors, z, new, strength):
    gram = vectors.T @ vectors + strength * torch.eye(vectors.shape[1])
    return new @ torch.linalg.solve(gram, vectors.T @ z)


def _with_ones(vectors, z, new, strength):
    longer = [torch.cat([part, torch.ones(len(part), 1)], 1) for part in (vectors, new)]
    return _without_constant(longer[0], z, longer[1], strength)


to_z = Exercise(
    reference=_to_z,
    test=_test_to_z,
    question="How much of what your map gains is told by the book that a verse is from, and how "
    "would you find out?",
    hint="Take both means off first. Then the weights W solve (V^T V + strength I) W = V^T Z. At "
    "the end the mean z comes back on.",
    minutes=15,
    difficulty="open",
)
