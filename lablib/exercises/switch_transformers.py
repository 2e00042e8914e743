"""Exercises of lab 302."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lablib.exercises import Exercise, expect


def _dropped(experts: Tensor, n_experts: int, capacity_factor: float) -> int:
    # Rounded first: 1.1 * 40 / 4 is 11.000000000000002 in binary.
    places = max(1, math.ceil(round(capacity_factor * len(experts) / n_experts, 6)))
    return int((experts.bincount(minlength=n_experts) - places).clamp(min=0).sum())


def _test_dropped(candidate) -> None:
    even, one = torch.arange(4).repeat(5), torch.zeros(20, dtype=torch.int64)
    expect(candidate(even, 4, 1.0), 0, "20 tokens spread evenly over 4 experts all find a place")
    why = "All 20 tokens ask for the first of 4 experts, which has {} places"
    expect(candidate(one, 4, 1.0), 15, why.format("1.0 * 20 / 4 = 5"))
    expect(candidate(one, 4, 2.0), 10, why.format("2.0 * 20 / 4 = 10"))
    for factor in (1.0, 1.25):
        _test_crowded(candidate, factor)


def _test_crowded(candidate, factor: float) -> None:
    """Unequal demand for 5 experts whose places are no whole number; two have too few."""
    n_tokens = int(np.random.default_rng().integers(12, 20)) * 5 + 2
    demand = [0.5, 0.3, 0.1, 0.05, 0.05]
    experts = torch.multinomial(torch.tensor(demand), n_tokens, replacement=True)
    experts[: n_tokens * 3 // 4] = torch.arange(2).repeat(n_tokens)[: n_tokens * 3 // 4]
    counts, places = experts.bincount(minlength=5), factor * n_tokens / 5
    rounded = (
        f"places are rounded up: {factor} * {n_tokens} / 5 = {places:g} are {math.ceil(places)}"
    )
    known = (counts - math.floor(places)).clamp(min=0).sum().item()
    expect(
        candidate(experts, 5, factor),
        _dropped(experts, 5, factor),
        f"Tokens ask for the experts {counts.tolist()} times, each has {math.ceil(places)} places, "
        "and free places of one expert don't help another",
        known=[(known, rounded)],
    )


dropped = Exercise(
    reference=_dropped,
    test=_test_dropped,
    question="What does a larger capacity factor cost when no token is dropped any more?",
    hint="An expert has capacity_factor * tokens / n_experts places, rounded up; "
    "`experts.bincount` says how many tokens ask for each.",
    minutes=5,
    difficulty="easy",
)


def _balance_gradient(probs: Tensor, experts: Tensor) -> Tensor:
    tokens, n_experts = probs.shape
    share = experts.bincount(minlength=n_experts) / tokens  # f: (n_experts,)
    expected = (probs * share).sum(1, keepdim=True)  # the share a token can expect: (tokens, 1)
    return n_experts / tokens * probs * (share - expected)  # (tokens, n_experts)


def _test_balance_gradient(candidate) -> None:
    even = torch.full((8, 4), 0.25)
    level = "When load is even, no logit is pushed"
    expect(candidate(even, torch.arange(4).repeat(2)), torch.zeros(8, 4), level)
    crowded = torch.tensor([[0.5, 0.5], [0.5, 0.5]])
    wanted = torch.tensor([[0.25, -0.25], [0.25, -0.25]])
    why = "2 tokens, 2 experts, both tokens at the first: f = (1, 0), and p (f - sum_j p_j f_j) = "
    why += "(0.5 * 0.5, -0.5 * 0.5), times N / T = 1"
    expect(candidate(crowded, torch.tensor([0, 0])), wanted, why)
    probs = (2 * torch.randn(11, 5)).softmax(-1)  # 11 tokens load no 5 experts evenly
    experts = probs.argmax(1)
    share = experts.bincount(minlength=5) / 11
    by_p = share.expand(11, 5) * 5 / 11  # N / T * f
    known = [
        (by_p, "that is the gradient by p; go on through the softmax to logits"),
        (probs * by_p, "a token's probabilities sum to 1, so what is pushed is p_j times the "
         "difference of f_j from the token's own mean of f"),
        (-_balance_gradient(probs, experts), "the sign: the loss grows with a crowded expert's "
         "logit, so the gradient is positive there"),
    ]  # fmt: skip
    hint = "It is N / T * p_j (f_j - sum_i p_i f_i) for each token, f a constant"
    expect(candidate(probs, experts), _balance_gradient(probs, experts), hint, known=known)


balance_gradient = Exercise(
    reference=_balance_gradient,
    test=_test_balance_gradient,
    question="For a token that is already sure of its expert (p near 1), how hard does it push?",
    hint="d loss / d p_j = N f_j / T for each token. Softmax turns a gradient g by p into "
    "p_j (g_j - sum_i p_i g_i) by its logits. `bincount` counts the tokens of each expert.",
    minutes=12,
    difficulty="medium",
)


def _second_choice(probs: Tensor, places: int) -> Tensor:
    choices = probs.topk(2, dim=1).indices  # (tokens, 2)
    free = [places] * probs.shape[1]
    expert = torch.full((len(probs),), -1)
    for choice in choices.t().tolist():  # all first choices, then all second ones
        for token, wanted in enumerate(choice):
            if expert[token] < 0 and free[wanted]:
                expert[token] = wanted
                free[wanted] -= 1
    return expert


def _in_turn(probs: Tensor, places: int) -> Tensor:
    """A short cut: each token in turn takes its first choice, else its second."""
    free = [places] * probs.shape[1]
    expert = torch.full((len(probs),), -1)
    for token, choices in enumerate(probs.topk(2, dim=1).indices.tolist()):
        for wanted in choices:
            if expert[token] < 0 and free[wanted]:
                expert[token] = wanted
                free[wanted] -= 1
    return expert


def _first_choice(probs: Tensor, places: int) -> Tensor:
    """The layer as the paper uses it: first choices alone."""
    expert = probs.argmax(1)
    rank = F.one_hot(expert, probs.shape[1]).cumsum(0).gather(1, expert[:, None])[:, 0]
    return torch.where(rank <= places, expert, -1)


def _test_second_choice(candidate) -> None:
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1]])
    why = "One place each: the first token takes expert 0, the third takes expert 1; the second "
    why += "and the last, turned away from 0, ask for 1 and find it taken"
    expect(candidate(probs, 1), torch.tensor([0, -1, 1, -1]), why)
    expect(candidate(probs, 2), torch.tensor([0, 0, 1, 1]), "Two places each: all find one")
    probs, places = _crowded()
    known = [
        (_first_choice(probs, places), "a token that its first choice turns away asks its second"),
        (_in_turn(probs, places), "all first choices are seated before any second one: a token "
         "must not lose its first choice to another's second"),
    ]  # fmt: skip
    hint = "Tokens in order, first choices before second ones; -1 for a token that both turn away"
    expect(candidate(probs, places), _second_choice(probs, places), hint, known=known)


def _crowded() -> tuple[Tensor, int]:
    """Probabilities (14, 5) and places for which every short cut is wrong, and some are dropped."""
    while True:
        probs = (torch.randn(14, 5) + torch.tensor([2.0, 1.5, 0.5, 0.0, -1.0])).softmax(-1)
        right = _second_choice(probs, 3)
        shortcuts = [cut(probs, 3) for cut in (_first_choice, _in_turn)]
        if (right < 0).any() and not any(torch.equal(right, other) for other in shortcuts):
            return probs, 3


second_choice = Exercise(
    reference=_second_choice,
    test=_test_second_choice,
    question="The paper found no benefit in it: what could an expert make of another's tokens?",
    hint="`probs.topk(2, dim=1).indices` are the two choices. Loop over choices, then over tokens, "
    "and count each expert's free places down.",
    minutes=15,
    difficulty="open",
)
