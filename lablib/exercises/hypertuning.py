"""Exercises of lab 708."""

import numpy as np
import torch

from lablib.exercises import Exercise, expect


def _seen_by_h(text, a, b, c):
    return torch.cat([text[:a], text[a + b + c :]])


def _test_seen_by_h(candidate) -> None:
    for _ in range(3):
        a, b, c, d = np.random.permutation([2, 3, 4, 6]).tolist()
        text = torch.randperm(a + b + c + d) + 10
        why = f"of {len(text)} tokens A has {a}, B {b}, C {c}, and D is the rest"
        known = [
            (torch.cat([text[: a + b], text[a + b + c :]]), "B is what the frozen model reads"),
            (torch.cat([text[:a], text[a + b :]]), "C is what the frozen model has to predict"),
            (torch.cat([text[a + b + c :], text[:a]]), "A comes first, then D"),
            (text[a : a + b + c], "that is B and C, what H must not see"),
            (text[:a], "H sees the other end, too: D"),
            (text, "H must not see B and C"),
        ]
        expect(candidate(text, a, b, c), _seen_by_h(text, a, b, c), why, known=known)


seen_by_h = Exercise(
    reference=_seen_by_h,
    test=_test_seen_by_h,
    question="If D were left out, what could H still tell the frozen model that B does not?",
    hint="`text[i:j]` is a part, `torch.cat([x, y])` joins two.",
    minutes=5,
    difficulty="easy",
)


def _change_from(flat, rank, n_in, n_out):
    down = flat[: rank * n_in].view(rank, n_in)  # A
    up = flat[rank * n_in :].view(rank, n_out)  # B, a column in each row
    return up.T @ down


def _test_change_from(candidate) -> None:
    for rank, n_in, n_out in ((1, 2, 3), (2, 5, 3), (3, 4, 7)):
        flat = torch.randn(rank * (n_in + n_out))
        wanted = _change_from(flat, rank, n_in, n_out)
        down, up = flat.split([rank * n_in, rank * n_out])
        wrong = up.view(n_out, rank) @ down.view(rank, n_in)
        back = flat[: rank * n_out].view(rank, n_out).T @ flat[rank * n_out :].view(rank, n_in)
        why = f"A has {rank} rows of {n_in}, then come the {rank} columns of B, {n_out} each"
        known = (
            [
                (wanted.T, "the change has a row for each output: (n_out, n_in)"),
                (wrong, "B's numbers come column by column: view them as (rank, n_out), then turn"),
                (back, "A comes first"),
                (wanted / rank, "here the factor is 1"),
            ]
            if rank > 1
            else [(wanted.T, "the change has a row for each output: (n_out, n_in)")]
        )
        expect(candidate(flat, rank, n_in, n_out), wanted, why, known=known, atol=1e-5)


change_from = Exercise(
    reference=_change_from,
    test=_test_change_from,
    question="How many numbers does H write for a weight of 384 by 384 and rank 4, and how many "
    "does the weight have?",
    hint="`flat[:k].view(rows, columns)` fills row by row.",
    minutes=10,
    difficulty="medium",
)


def _share_of_the_task(phis):
    return (phis - phis.mean(0)).norm() / phis.norm()


def _test_share_of_the_task(candidate) -> None:
    same = torch.randn(1, 5).expand(4, 5)
    expect(candidate(same), torch.tensor(0.0), "of four equal rows, nothing differs", atol=1e-5)
    for n in (3, 6):
        phis = torch.randn(n, 7) + 1.5
        wanted, away = _share_of_the_task(phis), phis - phis.mean(0)
        known = [
            (wanted**2, "lengths, not their squares: take the root"),
            (away.norm() / phis.mean(0).norm(), "divide by the length of phi, not of the mean"),
            (
                (phis - phis.mean()).norm() / phis.norm(),
                "a mean of each number over tasks: mean(0)",
            ),
            (away.norm(), "a share: divide by the length of phi"),
            (1 - wanted, "that is not what differs"),
        ]
        why = "the length of what differs from the mean over tasks, by the length of all"
        expect(candidate(phis), wanted, why, known=known, atol=1e-5)


share_of_the_task = Exercise(
    reference=_share_of_the_task,
    test=_test_share_of_the_task,
    question="A hypermodel has learned to write the same phi for all tasks. What is its share, and "
    "which curve of this lab would it follow?",
    hint="`phis.mean(0)` is the mean over tasks; `.norm()` the length of all numbers together.",
    minutes=8,
    difficulty="medium",
)
