"""Exercises of lab 702."""

import torch

from lablib.exercises import Exercise, expect


def _batch_split(functions, sizes, x, h):
    parts = zip(functions, x.split(sizes), h.split(sizes))
    return torch.cat([f(*part) for f, *part in parts])


def _test_batch_split(candidate) -> None:
    def drawn():
        weight = torch.randn(3, 3)
        return lambda x, h: h + torch.tanh(x @ weight)

    for sizes in ([1, 2], [3, 1, 2], [2, 2]):
        functions = [drawn() for _ in sizes]
        x, h = torch.randn(2, sum(sizes), 4, 3)
        wanted = _batch_split(functions, sizes, x, h)
        swapped = _batch_split(functions[::-1], sizes, x, h)
        known = [
            (functions[0](x, h), "all texts went through the first adapter"),
            (swapped, "the first sizes[0] texts are for the first adapter"),
            (_batch_split(functions, sizes, h, h), "an adapter gets its part of x, and of h"),
        ]
        why = f"of {sum(sizes)} texts, {sizes} go to {len(sizes)} adapters; x and h are cut alike"
        expect(candidate(functions, sizes, x, h), wanted, why, known=known)


batch_split = Exercise(
    reference=_batch_split,
    test=_test_batch_split,
    question="A server gets texts for three tasks in one batch. What does it save, against three "
    "models, and what against three passes?",
    hint="`x.split([1, 2])` cuts the first axis into pieces of 1 and 2; `torch.cat` joins them.",
    minutes=8,
    difficulty="easy",
)


def _fused(query, keys, values):
    scores = (query * keys).sum(-1)  # (adapters, batch, length)
    return (scores.softmax(0)[..., None] * values).sum(0)


def _test_fused(candidate) -> None:
    for adapters, dim in ((2, 3), (3, 5), (4, 2)):
        query = torch.randn(2, 4, dim)
        keys, values = torch.randn(2, adapters, 2, 4, dim)
        scores = (query * keys).sum(-1)

        def mixed(shares, values=values):
            return (shares[..., None] * values).sum(0)

        known = [
            (mixed((scores / dim**0.5).softmax(0)), "the scores are not divided by sqrt(dim) here"),
            (mixed(scores.softmax(-1)), "shares sum to one over the adapters, not over positions"),
            (mixed(scores.softmax(1)), "shares sum to one over the adapters, not over texts"),
            (values.mean(0), "each token weighs the adapters by its scores"),
            (mixed(scores), "scores become shares by a softmax over the adapters"),
        ]
        why = f"each token has {adapters} scores, query times key summed over {dim} features"
        expect(candidate(query, keys, values), _fused(query, keys, values), why, known=known)


fused = Exercise(
    reference=_fused,
    test=_test_fused,
    question="In an ordinary attention a token looks at other tokens. What does it look at here?",
    hint="`(query * keys).sum(-1)` has shape (adapters, batch, length): which axis is shared out?",
    minutes=12,
    difficulty="medium",
)


def _compacter_size(dim, rank, n, blocks):
    down = n * (dim // n) + n * (rank // n) + rank  # t_i, s_i, bias
    up = n * (rank // n) + n * (dim // n) + dim
    return 2 * blocks * (down + up) + n**3


def _test_compacter_size(candidate) -> None:
    for dim, rank, n, blocks in ((768, 24, 4, 12), (384, 12, 4, 6), (60, 15, 3, 5)):
        wanted, shared = _compacter_size(dim, rank, n, blocks), n**3
        places = 2 * blocks
        known = [
            (
                wanted + (2 * places - 1) * shared,
                "the A_i are the same everywhere: n^3 numbers once",
            ),
            (wanted - shared, "the shared A_i train, too: n matrices of (n, n)"),
            (wanted - places * (dim + rank), "each of the two projections has a bias"),
            ((wanted - shared) // 2 + shared, "there is one behind attention, one behind the mlp"),
            (
                wanted + places * (2 * dim * rank),
                "W_down and W_up are not stored, only s_i and t_i",
            ),
        ]
        why = "W_down is the sum of n products A_i kron (s_i t_i^T), with s_i of rank / n numbers, "
        why += "t_i of dim / n, and a bias; W_up is the same with rank and dim exchanged"
        expect(candidate(dim, rank, n, blocks), wanted, why, known=known)


compacter_size = Exercise(
    reference=_compacter_size,
    test=_test_compacter_size,
    question="Most of these numbers are no factors of a product at all. Which are they?",
    hint="Per place: s and t of W_down, s and t of W_up, two biases. Then the A_i, once.",
    minutes=10,
    difficulty="medium",
)
