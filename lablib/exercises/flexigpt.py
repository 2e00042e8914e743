"""Exercises of lab 804."""

import numpy as np
import torch
from torch.nn import functional as F

from lablib.exercises import Exercise, expect


def _block_influence(x, y):
    return 1 - F.cosine_similarity(x, y, dim=-1).mean()


def _test_block_influence(candidate) -> None:
    x = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    y = torch.tensor([[6.0, 8.0], [0.0, 1.0], [0.0, -2.0]])
    why = "cosines are 1 (only longer), 0 (a right angle) and -1 (turned round): 1 minus their mean"
    expect(candidate(x, y), torch.tensor(1.0), why, atol=1e-5)
    for _ in range(2):  # a rounded answer passes one draw by chance
        x, y = torch.randn(2, 7, 5), torch.randn(2, 7, 5)
        cosines = F.cosine_similarity(x, y, dim=-1)
        flat = F.cosine_similarity(x.flatten(), y.flatten(), dim=0)
        known = [
            (cosines.mean(), "that is how little it turns: take it from 1"),
            ((1 - cosines).sum(), "more tokens would mean more influence: take the mean"),
            (1 - flat, "a cosine a token, then the mean; not one of all numbers in a row"),
            (1 - (x * y).sum(-1).mean(), "divide by both lengths"),
            (1 - F.cosine_similarity(x, y, dim=-2).mean(), "along features, the last axis"),
            ((y - x).norm(dim=-1).mean(), "lengths don't count, angles do"),
        ]
        expect(candidate(x, y), _block_influence(x, y), why, known=known, atol=1e-5)


block_influence = Exercise(
    reference=_block_influence,
    test=_test_block_influence,
    question="A block adds the same large vector to every token. Is its influence high or low, and "
    "what would be lost without it?",
    hint="`F.cosine_similarity(x, y, dim=-1)` gives one cosine a token.",
    minutes=8,
    difficulty="easy",
)


def _stand_in(removed, base, rank):
    u, s, v = torch.linalg.svd(removed - base, full_matrices=False)
    a, b = (u * s)[:, :rank], v[:rank]
    return base + a @ b


def _test_stand_in(candidate) -> None:
    removed, base = torch.diag(torch.tensor([5.0, 1.0, 2.0])), torch.eye(3)
    why = "the difference is diag(4, 0, 1), its nearest matrix of rank 1 diag(4, 0, 0), plus base"
    expect(candidate(removed, base, 1), torch.diag(torch.tensor([5.0, 1.0, 1.0])), why, atol=1e-4)
    removed, base, rank = torch.randn(7, 5), torch.randn(7, 5), int(np.random.randint(2, 4))
    u, s, v = torch.linalg.svd(removed - base, full_matrices=False)
    u_i, s_i, v_i = torch.linalg.svd(removed, full_matrices=False)
    known = [
        ((u * s)[:, :rank] @ v[:rank], "that is A B alone: the base's weight comes on top"),
        (base + u[:, :rank] @ v[:rank], "singular values are missing: A = U S"),
        (base - (u * s)[:, :rank] @ v[:rank], "removed minus base, not base minus removed"),
        ((u_i * s_i)[:, :rank] @ v_i[:rank], "take the difference apart, not the removed weight"),
        (base + (u * s)[:, -rank:] @ v[-rank:], "the first singular values are the large ones"),
        (base + (u * s.square())[:, :rank] @ v[:rank], "singular values count once, in A or in B"),
        (removed, "keep `rank` singular values, no more"),
    ]
    expect(
        candidate(removed, base, rank), _stand_in(removed, base, rank), why, known=known, atol=1e-4
    )


stand_in = Exercise(
    reference=_stand_in,
    test=_test_stand_in,
    question="Singular values could go to B, or their roots to both. Does the layer then compute "
    "something else, and does it learn in the same way?",
    hint="`u, s, v = torch.linalg.svd(removed - base, full_matrices=False)`; v comes transposed.",
    minutes=12,
    difficulty="medium",
)


def _rank_that_saves_nothing(shapes):
    whole = sum(out * size for out, size in shapes)
    return -(-whole // sum(out + size for out, size in shapes))


def _test_rank(candidate) -> None:
    why = "one square of 4 by 4 has 16 weights, and 8 of each rank: at rank 2 nothing is saved"
    expect(candidate([(4, 4)]), 2, why)
    expect(candidate([(3, 4)]), 2, "12 weights, 7 of each rank: at rank 1 five are still saved")
    shapes = [tuple(int(x) for x in np.random.randint(20, 90, 2)) for _ in range(4)]
    whole, each = sum(o * i for o, i in shapes), sum(o + i for o, i in shapes)
    right = _rank_that_saves_nothing(shapes)
    known = [
        (whole // each if whole % each else -1, "at that rank a little is still saved"),
        (-(-whole // sum(max(shape) for shape in shapes)), "both thin matrices are stored"),
        (min(min(shape) for shape in shapes), "full rank comes later: two thin matrices are more "
         "than one square one long before"),
        (-(-2 * whole // each), "the base's weights are stored anyway"),
    ]  # fmt: skip
    known = [(value, told) for value, told in known if value != right]
    expect(candidate(shapes), right, why, known=known)


rank_that_saves_nothing = Exercise(
    reference=_rank_that_saves_nothing,
    test=_test_rank,
    question="For a square matrix it is half of the full rank. Would a long, thin one have it "
    "earlier or later, as a share of its full rank?",
    hint="A rank costs out + in weights in each matrix. How often does that go into all of them?",
    minutes=10,
    difficulty="easy",
)
