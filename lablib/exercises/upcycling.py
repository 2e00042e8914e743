"""Exercises of lab 305."""

import torch
from torch import Tensor

from lablib.exercises import Exercise, expect


def _shards(up: Tensor, expansion: int, granularity: int) -> Tensor:
    width, dim = up.shape
    cut = up.reshape(granularity, width // granularity, dim)  # (G, width / G, dim)
    return cut.repeat(expansion, 1, 1)  # (E G, width / G, dim): all shards, then all again


def _test_shards(candidate) -> None:
    up = torch.arange(4.0)[:, None]
    wanted = torch.tensor([[[0.0], [1]], [[2], [3]], [[0], [1]], [[2], [3]]])
    known = [
        (
            wanted[[0, 2, 1, 3]],
            "the copies of one shard stand side by side; the whole row of shards must be repeated, "
            "so that experts 0 to G - 1 make one dense layer",
        )
    ]
    expect(candidate(up, 2, 2), wanted, "Hidden features 0 1 | 2 3, twice", known=known)
    up = torch.randn(12, 5)
    known = [
        (
            torch.stack([up[start::3] for start in (0, 1, 2)]).repeat(2, 1, 1),
            "shards are runs of neighboring hidden features, not every third one",
        )
    ]
    expect(candidate(up, 2, 3), _shards(up, 2, 3), "E G experts of width / G rows", known=known)


shards = Exercise(
    reference=_shards,
    test=_test_shards,
    question="Which cut does the down matrix, (dim, width), need?",
    hint="`reshape` cuts the first axis into (G, width / G); `repeat(E, 1, 1)` copies the whole.",
    minutes=6,
    difficulty="easy",
)


def _too_small(weights: Tensor, granularity: int) -> Tensor:
    return granularity / weights.sum(1)


def _test_too_small(candidate) -> None:
    whole = torch.tensor([[0.5, 0.25], [0.125, 0.125]])
    why = "Whole experts (G = 1): output is the weights' sum times the dense one, {}"
    expect(candidate(whole, 1), torch.tensor([4 / 3, 4.0]), why.format("0.75 and 0.25 here"))
    even = torch.full((1, 4), 1 / 32)
    expect(
        candidate(even, 4),
        torch.tensor([32.0]),
        "Four shards that weigh 1/32 each add up to one dense output times 1/32",
        known=[(torch.tensor([8.0]), "the weights' sum, 1/8, is spread over G = 4 shards")],
    )
    weights = torch.rand(6, 3)
    weights = weights.repeat_interleave(2, 1)  # three copies, two shards each
    known = [
        (1 / weights.sum(1), "a shard is only a part of the dense output: G of them make one"),
        (weights.sum(1) / 2, "that is how small the output is; asked is what makes up for it"),
        (
            (2 / weights.sum(1)) ** (1 / 3),
            "that is the scale of one of three matrices; asked is their product",
        ),
    ]
    hint = "Each copy r gives p_r times the dense output, and its G shards weigh p_r each"
    expect(candidate(weights, 2), _too_small(weights, 2), hint, known=known, atol=1e-5)


too_small = Exercise(
    reference=_too_small,
    test=_test_too_small,
    question="With all weights at 1 / (E G), what does your answer become, and where does T enter?",
    hint="Add up the weights: each copy's p_r is counted G times in the sum. What must the output "
    "be multiplied with to be the dense one?",
    minutes=10,
    difficulty="medium",
)


def _virtual_router(rows: Tensor, granularity: int, order: Tensor) -> Tensor:
    copies = order // granularity  # (experts,): which copy each place's expert belongs to
    return rows[copies]  # (experts, dim)


def _test_virtual_router(candidate) -> None:
    rows = torch.tensor([[1.0], [2.0]])
    why = "Two copies of two shards: experts 0 and 1 are copy 0, experts 2 and 3 are copy 1"
    expect(candidate(rows, 2, torch.arange(4)), torch.tensor([[1.0], [1], [2], [2]]), why)
    rows, order = torch.randn(3, 4), torch.randperm(12)
    known = [
        (
            rows[order % 3],
            "an expert's number is copy * G + shard: divide by G to find the copy",
        ),
        (
            rows.repeat_interleave(4, 0),
            "`order` says which expert stands at each place of the router; follow it",
        ),
    ]
    hint = "All shards of one copy must have one row, wherever they stand"
    expect(candidate(rows, 4, order), _virtual_router(rows, 4, order), hint, known=known)


virtual_router = Exercise(
    reference=_virtual_router,
    test=_test_virtual_router,
    question="After a few steps of training the G rows of a copy differ. What may a token choose?",
    hint="`order // granularity` is the copy of each expert; index rows with it.",
    minutes=8,
    difficulty="medium",
)
