"""Exercises of lab 403."""

import numpy as np

from lablib.exercises import Exercise, expect


def _effective_tokens(unique: float, epochs: float, star: float) -> float:
    repeats = epochs - 1
    return unique + unique * star * (1 - np.exp(-repeats / star))


def _test_effective_tokens(candidate) -> None:
    expect(candidate(100.0, 1.0, 15.0), 100.0, "One epoch: every token is fresh, nothing decays")
    why = "A thousand epochs: the exponential is gone, and 1 + R* = 16 times the text is all"
    expect(candidate(100.0, 1000.0, 15.0), 1600.0, why)
    random = np.random.default_rng()
    U, star = (float(v) for v in random.uniform(5, 20, 2))
    epochs = float(random.uniform(2, 9))
    known = [
        (U + U * star * (1 - np.exp(-epochs / star)), "of `epochs` passes the first is no repeat"),
        (U * star * (1 - np.exp(-(epochs - 1) / star)), "the first pass counts in full, too"),
        (U * epochs, "that counts every repeat in full"),
        (U * epochs * np.exp(-(epochs - 1) / star), "value falls from pass to pass: sum it up"),
    ]
    right = _effective_tokens(U, epochs, star)
    expect(candidate(U, epochs, star), right, "U + U R* (1 - exp(-R / R*))", known=known)


effective_tokens = Exercise(
    reference=_effective_tokens,
    test=_test_effective_tokens,
    question="After R* repeats, what share of fresh tokens' worth have the repeats had on average?",
    hint="R, the number of repeats, is one less than the number of epochs.",
    minutes=6,
    difficulty="easy",
)


def _best_epochs(compute, unique, epochs, loss):
    D = epochs * unique
    losses = [loss(compute / (6 * tokens), tokens, unique) for tokens in D]
    return epochs[int(np.argmin(losses))]


def _test_best_epochs(candidate) -> None:
    def near(N, D, U):  # least where D = 3 U
        return 1.0 + (np.log(D / U) - np.log(3.0)) ** 2

    grid = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    why = "A loss that is least at three epochs, whatever the size"
    expect(candidate(6e6, 1e3, grid, near), 3.0, why)
    random = np.random.default_rng()
    A, B = (float(v) for v in random.uniform(20, 60, 2))
    U, C = 1e4, float(random.uniform(2e9, 9e9))
    grid = np.geomspace(1.003, 12.1, 45)

    def law(N, D, U):
        return 1 + A / N**0.4 + B / _effective_tokens(U, D / U, 5.0) ** 0.4

    without_6 = grid[np.argmin([law(C / (e * U), e * U, U) for e in grid])]
    fresh = grid[np.argmin([1 + A / (C / (6 * e * U)) ** 0.4 + B / (e * U) ** 0.4 for e in grid])]
    right = _best_epochs(C, U, grid, law)
    known = [
        (without_6, "training takes 6 N D FLOPs: N = compute / (6 D)"),
        (fresh, "give the law U, too: it knows that repeats are worth less"),
        (float(np.argmin([law(C / (6 * e * U), e * U, U) for e in grid])), "return the number of "
         "epochs, not its place in the array"),
    ]  # fmt: skip
    known = [(value, text) for value, text in known if abs(value - right) > 1e-9]
    hint = "for each number of epochs: D = epochs * unique, N = compute / (6 D), loss(N, D, unique)"
    expect(candidate(C, U, grid, law), right, hint, known=known)


best_epochs = Exercise(
    reference=_best_epochs,
    test=_test_best_epochs,
    question="With ten times the compute, does the best model grow, or the number of epochs?",
    hint="At fixed compute more epochs mean a smaller model: N = compute / (6 D).",
    minutes=10,
    difficulty="medium",
)


def _longer_or_larger(N, U, epochs, loss):
    larger = loss(N, epochs * U, U)
    longer = loss(N / 2, 2 * epochs * U, U)
    return longer - larger


def _test_longer_or_larger(candidate) -> None:
    def flat(N, D, U):
        return 100 / N + 10 * U / D

    why = "Loss 100/N + 10 U/D, N = 10, one epoch: 100/5 + 10/2 - (100/10 + 10/1)"
    expect(candidate(10.0, 7.0, 1.0, flat), 5.0, why)
    random = np.random.default_rng()
    a, b = (float(v) for v in random.uniform(0.2, 0.6, 2))

    def law(N, D, U):
        return 50 / N**a + 90 * (U / D) ** b + 0.001 * U

    N, U, epochs = (float(v) for v in random.uniform(5, 50, 3))
    right = _longer_or_larger(N, U, epochs, law)
    known = [
        (-right, "longer minus larger: negative where the smaller model that reads more is better"),
        (law(N / 2, 2 * epochs * U, 2 * U) - law(N, epochs * U, U), "repeating adds no unique text:"
         " U stays"),
        (law(N / 2, epochs * U, U) - law(N, epochs * U, U), "half of the model can read twice as "
         "much for the same FLOPs"),
        (law(N, 2 * epochs * U, U) - law(N, epochs * U, U), "the budget is fixed: to read twice as "
         "much, halve the model"),
    ]  # fmt: skip
    hint = "loss(N / 2, 2 epochs U, U) - loss(N, epochs U, U)"
    expect(candidate(N, U, epochs, law), right, hint, known=known)


longer_or_larger = Exercise(
    reference=_longer_or_larger,
    test=_test_longer_or_larger,
    question="Try it on the paper's law: at how many epochs does the sign turn, for your N and U?",
    hint="Both choices cost the same: 6 N D FLOPs.",
    minutes=8,
    difficulty="open",
)
