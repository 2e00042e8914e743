"""Exercises of lab 405."""

import numpy as np

from lablib.exercises import Exercise, expect


def _best_batch(batch: np.ndarray, loss: np.ndarray) -> float:
    a, b, _ = np.polyfit(np.log(batch), loss, 2)
    return float(np.exp(-b / (2 * a)))


def _test_best_batch(candidate) -> None:
    batch = np.array([64.0, 128.0, 256.0])
    why = "Losses 2.1, 2.0, 2.1 lie evenly around the middle: the bottom is there"
    expect(candidate(batch, np.array([2.1, 2.0, 2.1])), 128.0, why)
    random = np.random.default_rng()
    batch = 2.0 ** random.permutation(np.arange(5, 12))
    place, depth, width = (
        random.uniform(200, 900),
        random.uniform(1.5, 2.5),
        random.uniform(0.01, 0.1),
    )
    loss = depth + width * np.log(batch / place) ** 2
    a, b, _ = np.polyfit(batch, loss, 2)
    known = [
        (float(-b / (2 * a)), "the valley is a parabola over ln B, not over B"),
        (float(np.log(place)), "that is ln B: take the exponential"),
        (float(np.log2(place)), "that is the logarithm of B: undo it"),
        (float(batch[loss.argmin()]), "that is the best one tried: the bottom lies between two"),
        (float(1 / place), "the vertex of a u^2 + b u + c is at -b / 2a: mind the sign"),
    ]
    expect(
        candidate(batch, loss),
        place,
        "a u^2 + b u + c over u = ln B, then exp(-b / 2a)",
        known=known,
    )


best_batch = Exercise(
    reference=_best_batch,
    test=_test_best_batch,
    question="Double every batch, and leave the losses: what happens to the vertex, and why?",
    hint="np.polyfit(np.log(batch), loss, 2) gives a, b and c.",
    minutes=8,
    difficulty="easy",
)


def _rate_for(new: float, batch: np.ndarray, rate: np.ndarray) -> float:
    gamma, log_c = np.polyfit(np.log(batch), np.log(rate), 1)
    return float(np.exp(log_c + gamma * np.log(new)))


def _test_rate_for(candidate) -> None:
    batch = np.array([100.0, 400.0])
    why = (
        "Rates 0.01 and 0.02 at batches 100 and 400, gamma 1/2: four times the batch again is 0.04"
    )
    expect(candidate(1600.0, batch, np.array([0.01, 0.02])), 0.04, why)
    random = np.random.default_rng()
    batch = 2.0 ** random.permutation(np.arange(6, 13))
    rate = 0.001 * batch ** random.uniform(0.25, 0.45) * np.exp(random.normal(0, 0.1, len(batch)))
    new = float(random.uniform(1e5, 1e6))
    slope, start = np.polyfit(batch, rate, 1)
    near = rate[batch.argmax()]
    known = [
        (float(start + slope * new), "fit ln rate over ln batch: a power is straight only there"),
        (
            float(near * (new / batch.max()) ** 0.5),
            "that is the square-root rule: fit gamma instead",
        ),
        (float(near * new / batch.max()), "that is the linear rule: fit gamma instead"),
        (float(np.log(_rate_for(new, batch, rate))), "that is the logarithm of the rate: undo it"),
        (float(np.polyfit(np.log(batch), np.log(rate), 1)[0]), "that is gamma: use it on `new`"),
    ]
    right = _rate_for(new, batch, rate)
    expect(candidate(new, batch, rate), right, "ln rate = ln c + gamma ln batch", known=known)


rate_for = Exercise(
    reference=_rate_for,
    test=_test_rate_for,
    question="How far off is the rate for four times the batch, if you are wrong by 0.25 in gamma?",
    hint="A line through the logarithms: np.polyfit(np.log(batch), np.log(rate), 1).",
    minutes=8,
    difficulty="medium",
)


def _expected_loss(batch: int, samples: int, rate: float, noise: float) -> float:
    square = 1.0
    for _ in range(samples // batch):
        square = (1 - rate) ** 2 * square + rate**2 * noise**2 / batch
    return square / 2


def _test_expected_loss(candidate) -> None:
    why = "One step, no noise, rate 0.5: x goes from 1 to 0.5, and x^2/2 is 0.125"
    expect(candidate(4, 4, 0.5, 0.0), 0.125, why)
    random = np.random.default_rng()
    rate, noise = float(random.uniform(0.05, 0.4)), float(random.uniform(0.5, 3))
    batch = int(random.integers(2, 9))
    samples = batch * int(random.integers(3, 12))

    def other(steps, variance, factor=0.5, shrink=(1 - rate) ** 2):
        square = 1.0
        for _ in range(steps):
            square = shrink * square + rate**2 * variance
        return factor * square

    steps, variance = samples // batch, noise**2 / batch
    known = [
        (
            other(samples, variance),
            "a step reads `batch` samples: there are samples // batch steps",
        ),
        (other(steps, noise**2), "a mean of `batch` samples has a variance of noise^2 / batch"),
        (other(steps, noise / batch), "noise is the standard deviation: square it"),
        (other(steps, variance, shrink=1 - rate), "x^2 shrinks by (1 - rate)^2"),
        (other(steps, variance, factor=1.0), "the loss is x^2 / 2"),
        (other(steps, 0.0), "the noise adds rate^2 noise^2 / batch at each step"),
    ]
    right = _expected_loss(batch, samples, rate, noise)
    hint = "E[x^2] becomes (1 - rate)^2 E[x^2] + rate^2 noise^2 / batch"
    expect(candidate(batch, samples, rate, noise), right, hint, known=known)


expected_loss = Exercise(
    reference=_expected_loss,
    test=_test_expected_loss,
    question="For each batch find the best rate: which batch wins, and why does it hardly matter?",
    hint="Follow E[x^2] from step to step: of noises it is the squares that add up.",
    minutes=12,
    difficulty="open",
)
