"""Exercises of lab 309."""

import math

import numpy as np
import torch
from torch import Tensor

from lablib.exercises import Exercise, expect


def _effective_size(weights: np.ndarray) -> float:
    return float(weights.sum() ** 2 / (weights**2).sum())


def _test_effective_size(candidate) -> None:
    expect(candidate(np.ones(7)), 7.0, "Equal weights: all 7 documents count")
    why = "Only 2 of 5 documents have weight, and equally much"
    expect(candidate(np.array([0.0, 3.0, 0.0, 3.0, 0.0])), 2.0, why)
    weights = np.random.default_rng().exponential(1.0, 30)
    known = [
        (float((weights > 0).sum()), "a document of tiny weight is hardly a document"),
        (float(weights.sum()), "the weights' sum changes when all are doubled, their use does not"),
        (float(1 / (weights**2).sum()), "divide by the sum first, or square it: the weights need "
         "not sum to 1"),
    ]  # fmt: skip
    hint = "The square of the sum, over the sum of the squares"
    expect(candidate(weights), _effective_size(weights), hint, known=known, atol=1e-8)
    expect(candidate(5 * weights), _effective_size(weights), "5 times all weights: no change")


effective_size = Exercise(
    reference=_effective_size,
    test=_test_effective_size,
    question="More clusters make sharper weights. What happens to this number?",
    hint="It must be n for n equal weights, and must not change when all are doubled.",
    minutes=5,
    difficulty="easy",
)


def _between(experts: Tensor, pages: Tensor) -> Tensor:
    return pages.float() / pages.sum() @ experts  # W is linear in E: so is a mean of W's


def _test_between(candidate) -> None:
    experts = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    why = "3 of 4 pages are in cluster 0 and 1 in cluster 1: three quarters of E_0, one of E_1"
    expect(candidate(experts, torch.tensor([3, 1, 0])), torch.tensor([0.75, 0.25]), why)
    experts, pages = torch.randn(4, 6), torch.randint(1, 9, (4,))
    right = _between(experts, pages)
    known = [
        (
            experts[pages.argmax()],
            "that is the most frequent cluster's expert; here all have a part",
        ),
        (experts.mean(0), "each cluster counts as often as it has pages"),
        (pages.float() @ experts, "shares must sum to 1, or the matrices grow with the pages"),
    ]
    hint = "The matrices are linear in E: the mean of matrices is the matrix of the mean"
    expect(candidate(experts, pages), right, hint, known=known, atol=1e-5)


between = Exercise(
    reference=_between,
    test=_test_between,
    question="Are the small model's answers the mean of the four models' answers, too?",
    hint="Turn `pages` into shares that sum to 1, and take that mean of the rows of `experts`.",
    minutes=6,
    difficulty="medium",
)


def _break_even(generic: float, special: float, special_alone: float) -> float:
    if special >= special_alone:
        return math.inf
    return math.floor(generic / (special_alone - special)) + 1


def _test_break_even(candidate) -> None:
    why = "A costs 100 + 1 N, B costs 21 N: they are equal at N = 5, so A is cheaper from 6 on"
    expect(candidate(100.0, 1.0, 21.0), 6, why)
    why = "A costs 90 + 1 N, B costs 21 N: equal at 4.5, so from 5 on"
    expect(candidate(90.0, 1.0, 21.0), 5, why)
    expect(candidate(100.0, 5.0, 5.0), math.inf, "A costs 100 + 5 N, B 5 N: A is never cheaper")
    draw = np.random.default_rng()
    generic, special = float(draw.integers(50, 500)), float(draw.integers(1, 5))
    alone = special + float(draw.integers(3, 40)) + 0.5
    right = _break_even(generic, special, alone)
    known = [
        (generic / (alone - special), "a number of domains is whole, and at equality nobody wins"),
        (math.floor(generic / alone) + 1, "A has a cost for each domain, too"),
    ]
    hint = "generic + special N < special_alone N"
    expect(candidate(generic, special, alone), right, hint, known=known)


break_even = Exercise(
    reference=_break_even,
    test=_test_break_even,
    question="And if nobody knows how many domains will come?",
    hint="Solve generic + special * N = special_alone * N; `math.floor(...) + 1` is the next whole "
    "number above.",
    minutes=7,
    difficulty="easy",
)
