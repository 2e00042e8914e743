"""Exercises of lab 311."""

from collections.abc import Callable

import torch
from torch import Tensor

from lablib.exercises import Exercise, expect


def _importance_loss(gates: Tensor) -> Tensor:
    importance = gates.sum(0)  # (n_experts,)
    return importance.var(correction=0) / importance.mean() ** 2


def _test_importance_loss(candidate) -> None:
    even = torch.full((6, 3), 1 / 3)
    expect(candidate(even), torch.tensor(0.0), "Equal sums vary by nothing")
    one = torch.zeros(5, 4)
    one[:, 2] = 1.0
    why = "One of 4 experts has all of 5: mean 5/4, squared deviation (3 * 25/16 + 225/16) / 4 = "
    expect(candidate(one), torch.tensor(3.0), why + "75/16, over the mean squared, 25/16")
    gates = torch.rand(9, 5).softmax(-1)
    right = _importance_loss(gates)
    importance = gates.sum(0)
    known = [
        (right.sqrt(), "the coefficient of variation is squared"),
        (importance.var() / importance.mean() ** 2, "the deviation of all experts, not of a "
         "sample: divide by n, not n - 1"),
        (importance.var(correction=0), "divide by the mean squared, so that twice the tokens "
         "have no larger loss"),
        (gates.var(0, correction=0).mean(), "sum over tokens first: it compares experts"),
    ]  # fmt: skip
    expect(candidate(gates), right, "Variance of the sums over their mean squared", known=known)


importance_loss = Exercise(
    reference=_importance_loss,
    test=_test_importance_loss,
    question="Can it be 0 while one expert gets most of the tokens?",
    hint="Sum the gates over tokens: one number an expert. Then variance (`correction=0`) over the "
    "mean squared.",
    minutes=6,
    difficulty="easy",
)


def _first_moved(logits: Callable[[Tensor], Tensor], tokens: Tensor, at: int, instead: int) -> int:
    other = tokens.clone()
    other[at] = instead
    moved = (logits(tokens) - logits(other)).abs().amax(-1) > 1e-6  # (length,)
    return int(moved.nonzero()[0]) if moved.any() else -1


def _looking(table: Tensor, ahead: int) -> Callable[[Tensor], Tensor]:
    """Logits that depend on all earlier tokens, and on as many later ones as ahead says."""

    def logits(tokens: Tensor) -> Tensor:
        rows = table[tokens]  # (length, vocab)
        sums = rows.cumsum(0)
        return sums[[min(len(rows) - 1, place + ahead) for place in range(len(rows))]]

    return logits


def _test_first_moved(candidate) -> None:
    table = torch.randn(20, 20)
    tokens = torch.randperm(20)[:12]
    instead = int((tokens[7] + 1) % 20)
    causal = _looking(table, 0)
    found = candidate(causal, tokens.clone(), 7, instead)
    expect(found, 7, "A model that looks back alone moves from the changed token on")
    for ahead in (1, 3):
        wanted = max(0, 7 - ahead)
        found = candidate(_looking(table, ahead), tokens.clone(), 7, instead)
        known = [(7, "compare the logits of all places, those before the change, too")]
        expect(found, wanted, f"This model looks {ahead} ahead: place {wanted} moves", known=known)
    expect(candidate(causal, tokens.clone(), 7, int(tokens[7])), -1, "Nothing moved: -1")


first_moved = Exercise(
    reference=_first_moved,
    test=_test_first_moved,
    question="Would dropout, or a router that draws at random, pass this test of causality?",
    hint="Copy the tokens, change one, take the logits of both. `(a - b).abs().amax(-1)` has one "
    "number a place; 1e-6 is far more than rounding.",
    minutes=8,
    difficulty="medium",
)


def _left_out(probs: Tensor, places: int) -> int:
    chosen = probs.topk(places, dim=0).indices  # (places, n_experts): tokens
    return len(probs) - len(chosen.unique())


def _test_left_out(candidate) -> None:
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6]])
    expect(candidate(probs, 2), 0, "Expert 0 takes tokens 0 and 1, expert 1 takes 2 and 3")
    expect(candidate(probs, 1), 2, "One place each: token 0 and token 2 are taken")
    alike = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.1, 0.3], [0.2, 0.35]])
    expect(candidate(alike, 2), 2, "Both experts want tokens 0 and 1 most: 2 and 3 have none")
    probs = torch.randn(30, 5).softmax(-1)
    probs[:6] = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.2]) * torch.linspace(2, 4, 6)[:, None]
    right = _left_out(probs, 6)
    rows = probs.topk(1).indices
    known = [
        (30 - 5 * 6, "a token that two experts take leaves another with none"),
        (5 - len(rows.unique()), "experts choose here: the best of each column"),
    ]
    expect(candidate(probs, 6), right, "Tokens that are in no expert's best", known=known)


left_out = Exercise(
    reference=_left_out,
    test=_test_left_out,
    question="What does the layer make of a token that no expert wants?",
    hint="`topk(places, dim=0)` takes the best of each column. How many different tokens are among "
    "them?",
    minutes=8,
    difficulty="medium",
)
