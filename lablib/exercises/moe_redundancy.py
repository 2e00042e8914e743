"""Exercises of lab 310."""

import torch
from torch import Tensor

from lablib.exercises import Exercise, expect


def _partial(x: Tensor, new: Tensor, W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    update = (x @ A.T) @ B.T  # (tokens, out)
    return x @ W.T + new[:, None] * update


def _test_partial(candidate) -> None:
    x, W = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.eye(2)
    A, B = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [10.0]])
    wanted = torch.tensor([[1.0, 2.0], [1.0, 12.0]])
    why = "Both tokens are (1, 2); the second is new, and its update is B A x = (0, 10)"
    expect(candidate(x, torch.tensor([False, True]), W, A, B), wanted, why)
    x, W, A, B = torch.randn(7, 5), torch.randn(4, 5), torch.randn(2, 5), torch.randn(4, 2)
    new = torch.arange(7) % 3 == 0
    known = [
        (x @ (W + B @ A).T, "the update reached old tokens too: text would change"),
        (_partial(x, ~new, W, A, B), "the update reached the old tokens, not the new ones"),
    ]
    expect(candidate(x, new, W, A, B), _partial(x, new, W, A, B), known=known, atol=1e-5)


partial = Exercise(
    reference=_partial,
    test=_test_partial,
    question="B starts at zero. Why may A not start at zero, too?",
    hint="First through A, which has few rows, then through B; then choose by `new`.",
    minutes=8,
    difficulty="easy",
)


def _distortion(first: Tensor, second: Tensor, plan: Tensor) -> Tensor:
    apart = first[:, None, :, None] - second[None, :, None, :]  # (i, j, k, l)
    return torch.einsum("ijkl,ij,kl->", apart.square(), plan, plan)


def _test_distortion(candidate) -> None:
    near, far = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.0, 3.0], [3.0, 0.0]])
    plan = torch.tensor([[0.5, 0.0], [0.0, 0.5]])
    why = "Two of the four pairs of pairs count: each has (1 - 3)^2 = 4, and weight 1/4"
    expect(candidate(near, far, plan), torch.tensor(2.0), why)
    for _ in range(2):  # a rounded number can be right by chance once
        first, second = (x + x.T for x in (torch.rand(4, 4), torch.rand(6, 6)))
        plan = torch.rand(4, 6)
        plan /= plan.sum()
        apart = first[:, None, :, None] - second[None, :, None, :]
        squares = apart.square()
        known = [
            (torch.einsum("ijkl,ij->", squares, plan), "each term has two entries of the plan"),
            (torch.einsum("ijkl,ij,kl->", apart.abs(), plan, plan), "differences are squared"),
            (torch.einsum("ijkl,ij,kl->", apart, plan, plan).square(), "square before you add up"),
        ]
        right = _distortion(first, second, plan)
        expect(candidate(first, second, plan), right, known=known, atol=1e-5)


distortion = Exercise(
    reference=_distortion,
    test=_test_distortion,
    question="Multiply the square out. Which of its three terms depend only on the plan's sums?",
    hint="`first[:, None, :, None] - second[None, :, None, :]` has the indices i, j, k, l.",
    minutes=10,
    difficulty="medium",
)


def _start(plan: Tensor, text: Tensor) -> Tensor:
    return (plan / plan.sum(1, keepdim=True)) @ text


def _test_start(candidate) -> None:
    plan = torch.tensor([[0.25, 0.25, 0.0], [0.0, 0.0, 0.5]])
    text = torch.tensor([[0.0, 2.0], [2.0, 0.0], [5.0, 5.0]])
    wanted = torch.tensor([[1.0, 1.0], [5.0, 5.0]])
    known = [
        (plan @ text, "a row of the plan sums to 1/2 here; a mean needs weights that sum to 1")
    ]
    expect(candidate(plan, text), wanted, "Half of word 0, half of word 1", known=known)
    plan, text = torch.rand(4, 9), torch.randn(9, 3)
    plan /= plan.sum()
    known = [(text[plan.argmax(1)], "that is the nearest word alone; asked is the weighted mean")]
    expect(candidate(plan, text), _start(plan, text), known=known, atol=1e-5)


start = Exercise(
    reference=_start,
    test=_test_start,
    question="Means of many rows are short vectors. What does that do to the first logits?",
    hint="`plan / plan.sum(1, keepdim=True)` makes weights of a row.",
    minutes=6,
    difficulty="easy",
)
