"""Exercises of lab 714."""

import numpy as np
import torch

from lablib.exercises import Exercise, expect


def _kron_times(a, b, x):
    laid = x.reshape(a.shape[1], b.shape[1])
    return (a @ laid @ b.T).flatten()


def _test_kron_times(candidate) -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    why = (
        "A = (1 2) and B = (3 4) on its side: the product's rows are 3, 6 and 4, 8; of x = (1, 1) "
    )
    why += "it makes 9 and 12"
    expect(candidate(a, b, torch.ones(2)), torch.tensor([9.0, 12.0]), why)
    for m, n, p, q in ((2, 3, 4, 5), (3, 2, 2, 3)):
        a, b, x = torch.randn(m, n), torch.randn(p, q), torch.randn(n * q)
        wanted = torch.kron(a, b) @ x
        known = [
            (torch.kron(b, a) @ x, "that is (B ⊗ A) x: x is laid out row by row, A's columns down"),
            ((a @ x.reshape(n, q) @ b.T).T.flatten(), "read the result row by row: no transpose"),
        ]
        expect(candidate(a, b, x), wanted, why, known=known, atol=1e-4)
    _stays_small(candidate)


def _stays_small(candidate) -> None:
    """A product of 4096 by 4096 would take 67 MB, and a tenth of a second: it is not to be made."""
    seen = []

    class Watched(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if torch.is_tensor(result):
                seen.append(result.numel())
            return result

    side = 24
    with Watched():
        candidate(torch.randn(side, side), torch.randn(side, side), torch.randn(side * side))
    expect(
        max(seen, default=0) < side**4,
        True,
        f"a matrix of {side**4:,} numbers was made; with A, B and x alone none has more than "
        f"{side**3:,}",
    )


kron_times = Exercise(
    reference=_kron_times,
    test=_test_kron_times,
    question="LoRA of rank r writes a weight of rank r at most. What rank can A ⊗ B have, from as "
    "many numbers?",
    hint="Lay x out as a matrix X of as many rows as A has columns. Row i of the result is then "
    "the sum of A's row i with the rows of X, times B.",
    minutes=12,
    difficulty="medium",
)


def _step_gb(model, trained, bits, saved):
    frozen = model - trained
    return (frozen * bits / 8 + 16 * trained) / 1e9 + saved


def _test_step_gb(candidate) -> None:
    why = "of a million numbers in 16 bits that all train, each holds 16 bytes: 0.016 GB"
    expect(candidate(1e6, 1e6, 16, 0.0), 0.016, why)
    for _ in range(3):
        model, bits = float(np.random.uniform(1e9, 9e9)), int(np.random.choice([4, 8, 16]))
        trained, saved = float(np.random.uniform(1e8, 9e8)), float(np.random.uniform(0.3, 9))
        wanted = _step_gb(model, trained, bits, saved)
        frozen = (model - trained) * bits
        known = [
            (wanted - saved, "what is saved for the backward pass is held, too"),
            (wanted + trained * bits / 8e9, "what trains is not frozen: count it once"),
            ((frozen + 16 * trained) / 1e9 + saved, "bits are not bytes"),
            ((frozen / 8 + 12 * trained) / 1e9 + saved, "weight, gradient, copy, two moments: 16"),
            (16 * model / 1e9 + saved, "frozen numbers have no gradient, copy or moments"),
        ]
        expect(candidate(model, trained, bits, saved), wanted, why, known=known)


step_gb = Exercise(
    reference=_step_gb,
    test=_test_step_gb,
    question="By which of the four arguments does LoRA lower the sum, by which QLoRA, and by which "
    "ladder side tuning?",
    hint="A frozen number takes its bits and nothing else. Add 2 + 2 + 4 + 4 + 4 bytes for one "
    "that trains, divide by a thousand million, then add what is saved.",
    minutes=8,
    difficulty="easy",
)


def _ia3_as_delta(weight, scale):
    return (scale - 1)[:, None] * weight


def _test_ia3_as_delta(candidate) -> None:
    weight, scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 10.0])
    why = "a factor of 1 for the first output and 10 for the second: the first row doesn't change, "
    why += "to the second nine times itself is added, 27 and 36"
    expect(candidate(weight, scale), torch.tensor([[0.0, 0.0], [27.0, 36.0]]), why)
    for n in (3, 5):  # square, so that a wrong side is wrong by its values
        weight, scale = torch.randn(n, n), torch.randn(n)
        wanted = _ia3_as_delta(weight, scale)
        known = [
            (scale[:, None] * weight, "that is the new weight: W has to be taken off"),
            ((scale - 1) * weight, "outputs are rows of W; columns are its inputs"),
            (scale[:, None] * torch.ones_like(weight), "the factors multiply W's rows"),
        ]
        expect(candidate(weight, scale), wanted, why, known=known)


ia3_as_delta = Exercise(
    reference=_ia3_as_delta,
    test=_test_ia3_as_delta,
    question="The guide counts (IA)3 among additions. You have just written it as a change of "
    "weights: where on the map would you put it, and what would you say to someone who disagrees?",
    hint="The layer computes l * (W x), one factor an output. Which W' gives the same from x "
    "alone? Its difference to W is what is asked for.",
    minutes=8,
    difficulty="open",
)
