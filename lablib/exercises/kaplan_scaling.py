"""Exercises of lab 401."""

import numpy as np

from lablib.exercises import Exercise, expect


def _size_and_flops(d_model: int, n_layer: int, n_ctx: int) -> tuple[int, int]:
    attention = 4 * d_model**2  # query, key, value and output
    feed_forward = 2 * d_model * 4 * d_model  # to four times the width, and back
    N = n_layer * (attention + feed_forward)
    return N, 2 * N + 2 * n_layer * n_ctx * d_model


def _test_size_and_flops(candidate) -> None:
    why = "One layer of width 10: attention has 4 matrices of 10 x 10, the feed-forward layer two "
    why += "of 10 x 40. With no context, 2 FLOPs a parameter"
    expect(candidate(10, 1, 0), (1200, 2400), why)
    d, n, length = (int(v) for v in np.random.default_rng().integers((8, 2, 16), (64, 9, 99)))
    N, C = _size_and_flops(d, n, length)
    known = [
        ((N, 2 * N), "queries meet keys, too: 2 n_ctx d_model FLOPs a layer, with no parameters"),
        ((N, 6 * N + 6 * n * length * d), "that is forward and backward; here forward alone"),
        ((N, 2 * N + 4 * n * length * d), "a token sees half of the context on average"),
        ((N // n, C // n), "all n_layer layers"),
        ((N, N + n * length * d), "a multiplication and an addition are 2 FLOPs"),
    ]
    expect(candidate(d, n, length), (N, C), "N = 12 n_layer d_model^2", known=known)


size_and_flops = Exercise(
    reference=_size_and_flops,
    test=_test_size_and_flops,
    question="From which context length on do the scores cost as much as the parameters?",
    hint="Each parameter is used once for a token: one multiplication, one addition.",
    minutes=8,
    difficulty="easy",
)


def _two_minima(N: float, B: float, S: float, B_crit: float) -> tuple[float, float]:
    S_min = S / (1 + B_crit / B)
    C_min = 6 * N * B * S / (1 + B / B_crit)
    return S_min, C_min


def _test_two_minima(candidate) -> None:
    why = "At the critical batch both factors are 2: half of the 10 steps, and half of the 6 * 2 * "
    why += "3 * 10 FLOPs"
    expect(candidate(2.0, 3.0, 10.0, 3.0), (5.0, 180.0), why)
    N, B, S, B_crit = np.random.default_rng().uniform(1, 9, 4).tolist()
    steps, compute = _two_minima(N, B, S, B_crit)
    known = [
        ((S / (1 + B / B_crit), 6 * N * B * S / (1 + B_crit / B)), "the other way round: very "
         "large batches save steps, very small ones save compute"),
        ((steps, compute / 6), "training takes 6 FLOPs for each parameter and token"),
        ((steps, 6 * N * B * steps), "C_min is not the compute of S_min steps at this batch"),
        ((S, 6 * N * B * S), "that is what the run took, not what it could have taken"),
    ]  # fmt: skip
    expect(candidate(N, B, S, B_crit), (steps, compute), "C = 6 N B S", known=known)


two_minima = Exercise(
    reference=_two_minima,
    test=_test_two_minima,
    question="At which batch are both twice their minimum, and why is it a good choice?",
    hint="S_min = S / (1 + B_crit/B) and C_min = C / (1 + B/B_crit), with C = 6 N B S.",
    minutes=6,
    difficulty="easy",
)


def _predict_largest(N: np.ndarray, loss: np.ndarray) -> float:
    slope, height = np.polyfit(np.log(N[:-1]), np.log(loss[:-1]), 1)
    return float(np.exp(height + slope * np.log(N[-1])))


def _test_predict_largest(candidate) -> None:
    sizes = np.array([1e3, 1e4, 1e5, 1e6])
    why = "An exact power law, 8 N^-0.1: the prediction is on it"
    expect(candidate(sizes, 8 * sizes**-0.1), 8 * 1e6**-0.1, why)
    random = np.random.default_rng()
    loss = 9 * sizes ** -random.uniform(0.05, 0.2) * np.exp(random.normal(0, 0.05, 4))
    wanted = _predict_largest(sizes, loss)
    cheat = np.exp(np.polyval(np.polyfit(np.log(sizes), np.log(loss), 1), np.log(1e6)))
    plain = np.polyval(np.polyfit(np.log(sizes[:-1]), loss[:-1], 1), np.log(1e6))
    ends = loss[2] * (loss[2] / loss[0]) ** (np.log(1e6 / 1e5) / np.log(1e5 / 1e3))
    known = [
        (cheat, "the largest model's loss was used in the fit: it must be left out"),
        (plain, "a power law is a line in the logarithms of both N and the loss"),
        (loss[-1], "that is the measured loss, not a prediction"),
        (ends, "that is the line through the first and the last point: use all by least squares"),
    ]
    expect(candidate(sizes, loss), wanted, "np.polyfit(x, y, 1) gives slope, height", known=known)


predict_largest = Exercise(
    reference=_predict_largest,
    test=_test_predict_largest,
    question="A power law has no floor. What do you predict for a model of 10^30 parameters?",
    hint="log L = height + slope log N: fit a line to all points but the last, and read it there.",
    minutes=10,
    difficulty="open",
)
