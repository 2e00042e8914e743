"""Exercises of lab 712."""

import numpy as np
import torch

from lablib.exercises import Exercise, expect


def _step_flops(n_out, n_in, tokens, trains):
    return (6 if trains else 4) * n_out * n_in * tokens


def _test_step_flops(candidate) -> None:
    why = "forward and back to the input cost 2 operations a weight and token each, the weight's "
    why += "own gradient 2 more: of a 2 by 3 matrix and 5 tokens 120 frozen, 180 where it trains"
    for trains in (False, True):
        expect(candidate(2, 3, 5, trains), _step_flops(2, 3, 5, trains), why)
        n_out, n_in, tokens = (int(n) for n in np.random.randint(11, 60, 3))
        right = _step_flops(n_out, n_in, tokens, trains)
        known = [
            (right // 2, "a multiplication and an addition are two operations"),
            (_step_flops(n_out, n_in, tokens, not trains), "it is the other way round"),
            (2 * n_out * n_in * tokens, "there is a backward pass, too"),
        ]
        expect(candidate(n_out, n_in, tokens, trains), right, why, known=known)


step_flops = Exercise(
    reference=_step_flops,
    test=_test_step_flops,
    question="If LoRA saves a third of the operations, and time by less, what does it save most?",
    hint="Count matrix products: Y = X W^T, then dX = dY W, then dW = dY^T X.",
    minutes=6,
    difficulty="easy",
)


def _average_change(pairs):
    return sum(up @ down for up, down in pairs) / len(pairs)


def _test_average_change(candidate) -> None:
    why = "the server wants the mean of the clients' changes B A: multiply first, then average"
    for clients, rank in ((2, 1), (3, 2), (4, 3)):
        pairs = [(torch.randn(6, rank), torch.randn(rank, 5)) for _ in range(clients)]
        ups, downs = (torch.stack(part) for part in zip(*pairs))
        right = _average_change(pairs)
        apart = "that is the mean of B times the mean of A, which mixes one client's B with "
        apart += "another's A"
        known = [(ups.mean(0) @ downs.mean(0), apart), (clients * right, "divide by the clients")]
        expect(candidate(pairs), right, why, known=known)


average_change = Exercise(
    reference=_average_change,
    test=_test_average_change,
    question="The right mean of many changes has a rank above r. What would it cost to send it?",
    hint="`up @ down` is one client's change.",
    minutes=7,
    difficulty="easy",
)


def _round_bytes(shapes, rank, clients, size):
    return 2 * clients * size * sum(rank * (n_out + n_in) for n_out, n_in in shapes)


def _test_round_bytes(candidate) -> None:
    why = "one 2 by 3 matrix, rank 1, one client, 4 bytes a number: B has 2 numbers, A 3, so 20 "
    why += "bytes there and 20 back"
    expect(candidate([(2, 3)], 1, 1, 4), 40, why)
    for n in (1, 3):
        shapes = [tuple(int(s) for s in np.random.randint(20, 90, 2)) for _ in range(n)]
        rank, clients = (int(v) for v in np.random.randint(2, 9, 2))
        right = _round_bytes(shapes, rank, clients, 2)
        whole = 2 * clients * 2 * sum(a * b for a, b in shapes)
        known = [
            (right // 2, "what is sent comes back, too"),
            (right // clients, "every client sends and receives"),
            (whole, "B and A travel, not the matrix"),
            (right // 2 * 4, "numbers have the size that is given"),
        ]
        expect(candidate(shapes, rank, clients, 2), right, why, known=known)


round_bytes = Exercise(
    reference=_round_bytes,
    test=_test_round_bytes,
    question="How many rounds until sending all weights once would have been cheaper?",
    hint="For a matrix of n_out rows and n_in columns, B has n_out rows of r, A r rows of n_in.",
    minutes=8,
    difficulty="medium",
)
