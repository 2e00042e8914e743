"""Exercises of lab 706."""

from itertools import pairwise

import numpy as np
import torch
from torch.nn import functional as F

from lablib.exercises import Exercise, expect


def _norm_share(dim, blocks, ffn_dim, vocab):
    inner = 4 * dim * dim + 3 * dim * ffn_dim  # attention, feed-forward layer
    norms = 2 * dim * blocks
    total = 2 * vocab * dim + blocks * inner + norms + dim  # dim: the norm before the head
    return 100 * norms / total


def _test_norm_share(candidate) -> None:
    why = "2 gains of 2 features in 1 block are 4; words take 24, matrices 16 and 18, norms 6"
    expect(candidate(2, 1, 3, 6), 100 * 4 / (24 + 16 + 18 + 6), why, atol=1e-4)
    for _ in range(2):
        dim, blocks, ffn_dim = (int(x) for x in np.random.randint((5, 2, 20), (17, 6, 50)))
        vocab = int(np.random.randint(50, 90))
        right, inner = _norm_share(dim, blocks, ffn_dim, vocab), 4 * dim**2 + 3 * dim * ffn_dim
        norms, words = 2 * dim * blocks, 2 * vocab * dim
        known = [
            (right / 100, "per cent are asked for"),
            (right / 2, "there are two norms a block"),
            (100 * (norms + dim) / (words + blocks * inner + norms + dim), "count the norms of "
             "blocks alone; the one before the head belongs to the total"),
            (100 * norms / (words / 2 + blocks * inner + norms + dim), "embedding and head are two "
             "matrices"),
            (100 * norms / (words + blocks * inner), "norms belong to the total, too"),
            (100 * norms / (words + blocks * inner + norms), "a last norm stands before the head"),
        ]  # fmt: skip
        why = "norms are 2 * dim * blocks of all parameters"
        expect(candidate(dim, blocks, ffn_dim, vocab), right, why, known=known, atol=1e-5)


norm_share = Exercise(
    reference=_norm_share,
    test=_test_norm_share,
    question="A model twice as wide has some four times the parameters. What becomes of the share?",
    hint="Query, key, value and output are (dim, dim) each; gate, up and down (dim, ffn_dim).",
    minutes=10,
    difficulty="easy",
)


def _gain_gradient(x, upstream, eps):
    normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return (upstream * normed).flatten(0, -2).sum(0)


def _test_gain_gradient(candidate) -> None:
    x, upstream = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[1.0, 10.0]]])
    why = "rms of (3, 4) is the root of 12.5, about 3.54: 1 * 3 / 3.54 and 10 * 4 / 3.54"
    expect(candidate(x, upstream, 0.0), torch.tensor([3.0, 40.0]) / 12.5**0.5, why, atol=1e-4)
    for _ in range(2):
        x, upstream, eps = torch.randn(3, 5, 4), torch.randn(3, 5, 4), 0.1
        right = _gain_gradient(x, upstream, eps)
        normed = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        known = [
            (right / 15, "a sum over tokens, not a mean"),
            ((upstream * x).flatten(0, 1).sum(0), "the gain multiplies x / rms(x), not x"),
            (upstream.flatten(0, 1).sum(0), "that is the gradient of a bias"),
            ((upstream * normed).sum((0, 1, 2)), "each feature has a gain of its own"),
            ((upstream * F.normalize(x, dim=-1)).flatten(0, 1).sum(0), "rms is the root of the "
             "mean of squares, not of their sum"),
            (_gain_gradient(x, upstream, 0.0), "eps goes to the mean of squares, below the root"),
            ((upstream * normed).sum(0), "texts and tokens are summed over, both"),
        ]  # fmt: skip
        why = "upstream times x / rms(x), summed over texts and tokens"
        expect(candidate(x, upstream, eps), right, why, known=known, atol=1e-4)


gain_gradient = Exercise(
    reference=_gain_gradient,
    test=_test_gain_gradient,
    question="Does the gradient need the gains themselves, or the weights of the layer above?",
    hint="y = g * x / rms(x), feature by feature; rms(x) = sqrt(mean of squares + eps).",
    minutes=10,
    difficulty="medium",
)


def _neighbor_similarity(states):
    pairs = pairwise(states)
    return torch.stack([F.cosine_similarity(a, b, dim=-1).mean() for a, b in pairs]).mean()


def _test_neighbor_similarity(candidate) -> None:
    one = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    two, three = (
        torch.tensor([[[3.0, 0.0], [0.0, -1.0]]]),
        torch.tensor([[[0.0, 1.0], [0.0, -7.0]]]),
    )
    why = "cosines are 1 and -1 between the first two, 0 and 1 between the others: mean 0.25"
    expect(candidate([one, two, three]), torch.tensor(0.25), why, atol=1e-5)
    for _ in range(2):
        base = torch.randn(2, 4, 6)
        states = [base + 0.5 * k * torch.randn(2, 4, 6) for k in range(4)]
        right = _neighbor_similarity(states)
        flat = [F.cosine_similarity(a.flatten(), b.flatten(), dim=0)
                for a, b in pairwise(states)]  # fmt: skip
        every = [F.cosine_similarity(a, b, dim=-1).mean() for i, a in enumerate(states)
                 for b in states[i + 1:]]  # fmt: skip
        known = [
            (1 - right, "a similarity is 1 where two are alike"),
            (3 * right, "a mean over pairs, not a sum"),
            (torch.stack(flat).mean(), "a cosine a token, then the mean"),
            (torch.stack(every).mean(), "neighbors alone, not all pairs"),
            (F.cosine_similarity(states[0], states[-1], dim=-1).mean(), "neighbors, not the ends"),
        ]
        why = "the mean over tokens and pairs of neighbors"
        expect(candidate(states), right, why, known=known, atol=1e-5)


neighbor_similarity = Exercise(
    reference=_neighbor_similarity,
    test=_test_neighbor_similarity,
    question="Each block adds to what it reads. What would blocks have to do for a value near 0?",
    hint="`itertools.pairwise(states)` gives the pairs; `F.cosine_similarity(a, b, dim=-1)`.",
    minutes=8,
    difficulty="easy",
)


def _most_moved(before, after):
    far = [(new - old).square().mean() for old, new in zip(before, after)]
    return int(torch.stack(far).argmax())


def _test_most_moved(candidate) -> None:
    before = [torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0])]
    after = [torch.tensor([1.5, 1.5]), torch.tensor([2.0, 0.0])]
    why = "gains that all move by 1/2 moved less than gains that move by 1, one up and one down"
    expect(candidate(before, after), 1, why)
    for _ in range(3):
        scale = 0.5 + float(torch.rand(()))
        moves = {  # farthest is the second; each other one is, by another measure
            "that norm is wide: take a mean over its gains, not a sum": torch.full((12,), 0.4),
            "": torch.tensor([0.6, -0.6, 0.6]),
            "there one gain moved alone: take a mean over all": F.one_hot(torch.arange(1), 6)[0],
            "differences, not ratios": torch.full((4,), 0.2),
            "how far gains went, not how large they are": torch.full((5,), 0.1),
        }
        size = [1.0, 1.0, 1.0, 0.05, 9.0]  # before
        order = torch.randperm(5).tolist()
        steps, words = list(moves.values()), list(moves)
        before = [torch.full((len(steps[i]),), scale * size[i]) for i in order]
        after = [old + scale * steps[i] for old, i in zip(before, order, strict=True)]
        known = [(place, words[i]) for place, i in enumerate(order) if words[i]]
        why = "the largest root mean square of differences"
        expect(candidate(before, after), order.index(1), why, known=known)


most_moved = Exercise(
    reference=_most_moved,
    test=_test_most_moved,
    question="One gain goes from 0.1 to 0.2, another from 2 to 2.1. Is that the same change to "
    "what the next matrix reads?",
    hint="Differences, squared, their mean; `zip` walks through both lists; `torch.stack` makes a "
    "tensor of numbers, which has `argmax`.",
    minutes=6,
    difficulty="easy",
)
