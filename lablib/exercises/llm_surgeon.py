"""Exercises of lab 802."""

import torch

from lablib.exercises import Exercise, expect


def _factor(size):
    """A symmetric positive matrix with correlations."""
    mix = torch.randn(size, size)
    return mix @ mix.t() / size + 0.3 * torch.eye(size)


def _weight_cost(weight, row, column, A, G):
    free = torch.linalg.inv(G)[row, row] * torch.linalg.inv(A)[column, column]
    return weight[row, column] ** 2 / (2 * free)


def _test_weight_cost(candidate) -> None:
    A = torch.tensor([[1.0, 0.6], [0.6, 1.0]])
    weight, one = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0]])
    why = "(A^-1)_11 is 1 / (1 - 0.36) = 1.5625, so a weight of 2 costs 4 / (2 * 1.5625) = 1.28"
    expect(candidate(weight, 0, 1, A, one), torch.tensor(1.28), why, atol=1e-5)
    for _ in range(2):  # a rounded answer passes one draw by chance
        A, G, weight = _factor(4), _factor(3), torch.randn(3, 4)
        row, column = (int(torch.randint(size, ())) for size in (3, 4))
        squared = weight[row, column] ** 2
        inputs, outputs = torch.linalg.inv(A)[column, column], torch.linalg.inv(G)[row, row]
        known = [
            (squared * G[row, row] * A[column, column] / 2, "the cost if nothing else moves"),
            (squared / (inputs * outputs), "half the curvature: where is the half?"),
            (squared / (2 * inputs), "rows can make up for each other, too: G counts"),
            (squared / 2 * inputs * outputs, "inverse curvature is how freely the others move: the "
             "freer, the cheaper"),
            (squared * (1 / G[row, row]) * (1 / A[column, column]) / 2, "invert the matrices, not "
             "their entries"),
        ]  # fmt: skip
        right = _weight_cost(weight, row, column, A, G)
        expect(candidate(weight, row, column, A, G), right, why, known=known, atol=1e-5)


weight_cost = Exercise(
    reference=_weight_cost,
    test=_test_weight_cost,
    question="Can a weight cost more than half its square times G_ii A_jj?",
    hint="The same as for a row, with both inverses: w^2 over twice a product of two numbers.",
    minutes=8,
    difficulty="easy",
)


def _without_two(weight, first, second, A):
    pair = [first, second]
    inverse = torch.linalg.inv(A)
    pull = weight[:, pair] @ torch.linalg.inv(inverse[pair][:, pair])
    new = weight - pull @ inverse[pair]
    new[:, pair] = 0.0
    return new


def _one_by_one(weight, pair, inverse):
    """Each column as if it went alone, moves added up."""
    new = weight.clone()
    for column in pair:
        new -= torch.outer(weight[:, column] / inverse[column, column], inverse[column])
    return new.index_fill(1, torch.tensor(pair), 0.0)


def _test_without_two(candidate) -> None:
    A = torch.tensor([[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]])
    weight = torch.tensor([[1.0, 1.0, 1.0]])
    why = "the column that stays takes over A_01 / A_00 = 0.5 of each: 1 + 0.5 + 0.5 = 2"
    known = [(_one_by_one(weight, [1, 2], torch.linalg.inv(A)), "that is each column as if it went "
              "alone: invert the 2 x 2 part for both at once")]  # fmt: skip
    expect(candidate(weight.clone(), 1, 2, A), torch.tensor([[2.0, 0, 0]]), why, known=known,
           atol=1e-5)  # fmt: skip
    A, weight = _factor(5), torch.randn(3, 5)
    pair = torch.randperm(5)[:2].tolist()
    inverse, right = torch.linalg.inv(A), _without_two(weight, *pair, A)
    bare = weight.index_fill(1, torch.tensor(pair), 0.0)
    known = [
        (_one_by_one(weight, pair, inverse), "that is each column as if it went alone: invert the "
         "2 x 2 part of A^-1 for both at once"),
        (bare, "both are gone, and no other column has moved"),
        (right + weight - bare, "set the two columns to zero in the end"),
    ]  # fmt: skip
    expect(candidate(weight.clone(), *pair, A), right, why, known=known, atol=1e-4)


without_two = Exercise(
    reference=_without_two,
    test=_test_without_two,
    question="Two columns read the same feature twice. What does one of them cost, what do both?",
    hint="dW = -W[:, C] (A^-1[C, C])^-1 A^-1[C, :], with C the two places.",
    minutes=12,
    difficulty="medium",
)


def _kept_still(weight, A, G):
    return ((weight @ A) * weight).sum(1) * G.diagonal() / 2


def _test_kept_still(candidate) -> None:
    weight, A = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    why = "(1, 1) A (1, 1)^T = 3 and (1, -1) A (1, -1)^T = 1, times 2 and 4, halved: 3 and 2"
    G = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    expect(candidate(weight, A, G), torch.tensor([3.0, 2.0]), why)
    weight, A, G = torch.randn(4, 6), _factor(6), _factor(4)
    form = ((weight @ A) * weight).sum(1)
    known = [
        (form / (2 * torch.linalg.inv(G).diagonal()), "that is the Surgeon's, whose other rows "
         "move; here they stay: G_ii"),
        ((weight.square() * A.diagonal()).sum(1) * G.diagonal() / 2, "a row's own weights go "
         "together: all of A counts, not its diagonal alone"),
        (form * G.diagonal(), "half the curvature: where is the half?"),
        (form / 2, "how much does the loss lean on this output? G_ii says"),
    ]  # fmt: skip
    expect(candidate(weight, A, G), _kept_still(weight, A, G), why, known=known, atol=1e-4)
    one, alone = torch.eye(4), torch.diag(A.diagonal())
    inputs_alone = (weight.square() * A.diagonal()).sum(1) / 2
    expect(candidate(weight, alone, one), inputs_alone, "G = 1 and a diagonal A: L-OBD", atol=1e-4)


kept_still = Exercise(
    reference=_kept_still,
    test=_test_kept_still,
    question="Put 1 for G and a diagonal for A, and this is L-OBD. What is it with 1 for A, too?",
    hint="Put d = minus the row into half of d^T F d: what is left of G is one number.",
    minutes=8,
    difficulty="medium",
)
