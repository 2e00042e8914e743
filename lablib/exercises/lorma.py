"""Exercises of lab 703."""

import numpy as np
import torch

from lablib.exercises import Exercise, Wrong, expect, same_kind


def _rotated(m):
    return torch.stack([row.roll(i) for i, row in enumerate(m)])


def _test_rotated(candidate) -> None:
    m = torch.tensor([[1.0, 2.0, 3.0]] * 3)
    why = "rows of 1, 2, 3 become 1, 2, 3 and 3, 1, 2 and 2, 3, 1: the first stays, the second "
    why += "moves one place to the right, and what falls out on the right comes in on the left"
    expect(candidate(m), torch.tensor([[1.0, 2, 3], [3, 1, 2], [2, 3, 1]]), why)
    for n in (4, 7):
        m = torch.randn(n, n)
        known = [
            (torch.stack([r.roll(-i) for i, r in enumerate(m)]), "to the right, not to the left"),
            (_rotated(m.T).T, "rows move, not columns"),
            (torch.stack([r.roll(i + 1) for i, r in enumerate(m)]), "row 0 stays where it is"),
            (torch.stack([r.roll(1) for r in m]), "row i moves by i places, not all by one"),
            (m, "nothing has moved"),
        ]
        expect(candidate(m), _rotated(m), why, known=known)


rotated = Exercise(
    reference=_rotated,
    test=_test_rotated,
    question="Rotated, a matrix whose rows are all the same has one number on all of a diagonal. "
    "What operation on a vector is it then?",
    hint="`row.roll(i)` moves a row; `torch.stack` makes a matrix of rows.",
    minutes=8,
    difficulty="easy",
)


def _start(n, rank, factor):
    up, down = torch.randn(n, rank), torch.zeros(n, rank)
    up[:, 0], down[0, 0] = 1.0, 1.0 / factor
    return torch.stack([up, down])


def _test_start(candidate) -> None:
    for n, rank in ((5, 1), (6, 3), (7, 2)):
        factor = float(np.random.uniform(1.5, 4.0))
        both = candidate(n, rank, factor)
        same_kind(both, torch.zeros(2, n, rank))
        up, down = both[0], both[1].T
        made, wanted = factor * _rotated(up @ down), torch.eye(n)
        why = f"factor * I(B A) is to be the identity of size {n}, for a factor of {factor:.3f}"
        expect(made, wanted, why, known=[(factor * wanted, "divide by the factor")])
        for r in range(rank):
            if not up[:, r].any() and not down[r].any():
                raise Wrong(
                    f"column {r} of B and row {r} of A are both zero: the gradient of each is a "
                    "product with the other, so neither ever learns; draw one of them"
                )


start = Exercise(
    reference=_start,
    test=_test_start,
    question="LoRA draws A and sets B to zero. Why can't the rotated form do that?",
    hint="Rotate a matrix whose first column is all ones, and whose other numbers are zero.",
    minutes=12,
    difficulty="medium",
)


def _multiplications(n, rank, tokens):
    base = tokens * n * n
    return rank * n * n + n**3 + base, base + 2 * rank * n * tokens


def _test_multiplications(candidate) -> None:
    why = "of a 2 by 2 weight, rank 1 and one token: B A costs 4, times W0 8, times x 4; the other "
    why += "way W0 x costs 4, A times that 2, B times that 2"
    expect(candidate(2, 1, 1), (16, 8), why)
    for _ in range(3):
        n, rank, tokens = (int(np.random.randint(low, 60)) for low in (20, 2, 30))
        first, last = _multiplications(n, rank, tokens)
        known = [
            ((last, first), "the matrix first, then the other order"),
            ((n**3 + tokens * n * n, last), "B A is not free: rank * n * n"),
            ((first, 2 * rank * n * tokens), "W0 x has to be computed, too"),
            ((first, last - rank * n * tokens), "A and B: two thin products a token"),
            ((2 * first, 2 * last), "multiplications alone, without additions"),
        ]
        expect(candidate(n, rank, tokens), (first, last), why, known=known)


multiplications = Exercise(
    reference=_multiplications,
    test=_test_multiplications,
    question="Once training is over, which of the two orders is used only once?",
    hint="(a, b) times (b, c) takes a * b * c multiplications. Count one product after another.",
    minutes=10,
    difficulty="easy",
)
