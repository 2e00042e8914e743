"""Exercises of lab 704."""

import math

import numpy as np
import torch

from lablib.exercises import Exercise, expect


def _divergence(mean, deviation, prior):
    ratio = math.log(prior) - deviation.log()
    each = ratio + (deviation.square() + mean.square()) / (2 * prior**2) - 0.5
    return each.sum()


def _test_divergence(candidate) -> None:
    why = "an entry that is distributed as the prior is costs nothing"
    expect(candidate(torch.zeros(2, 3), torch.full((2, 3), 0.2), 0.2), torch.tensor(0.0), why)
    for _ in range(2):  # a rounded answer passes one draw by chance
        mean, deviation = torch.randn(4, 3), torch.rand(4, 3) + 0.05
        prior = float(np.random.uniform(0.3, 0.7))
        ratio = math.log(prior) - deviation.log()
        squares = (deviation.square() + mean.square()) / (2 * prior**2)
        known = [
            ((ratio + squares - 0.5).mean(), "sum over entries: each costs its own nats"),
            ((ratio + squares).sum(), "1/2 is missing: at the prior it must be zero"),
            ((squares - ratio - 0.5).sum(), "a narrow distribution is far away: ln(prior / dev)"),
            ((ratio + (deviation + mean.square()) / (2 * prior**2) - 0.5).sum(), "square the dev"),
            ((ratio + squares * prior - 0.5).sum(), "divide by the prior's variance, its square"),
            ((ratio + 2 * squares - 0.5).sum(), "divide by 2 sigma_p^2"),
        ]
        why = "sum of ln(prior / dev) + (dev^2 + mean^2) / (2 prior^2) - 1/2"
        expect(candidate(mean, deviation, prior), _divergence(mean, deviation, prior), why,
               known=known, atol=1e-4)  # fmt: skip


divergence = Exercise(
    reference=_divergence,
    test=_test_divergence,
    question="What would a deviation of zero cost, and what is LoRA, seen from here?",
    hint="`math.log(prior) - deviation.log()`, then the squares, then `.sum()`.",
    minutes=8,
    difficulty="easy",
)


def _calibration_error(confidence, right, bins):
    place = (confidence * bins).ceil().long() - 1
    total = 0.0
    for b in range(bins):
        inside = place == b
        if inside.any():
            gap = confidence[inside].mean() - right[inside].mean()
            total += inside.double().mean() * gap.abs()
    return total


def _test_calibration_error(candidate) -> None:
    confidence = torch.tensor([0.9, 0.9, 0.6, 0.6], dtype=torch.float64)
    right = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    why = "two bins of two: half times |0.9 - 0.5| plus half times |0.6 - 0.5|"
    expect(candidate(confidence, right, 5), torch.tensor(0.25, dtype=torch.float64), why)
    for _ in range(2):
        n, bins = int(np.random.randint(40, 60)), int(np.random.randint(5, 9))
        gaps = torch.zeros(1)
        while not gaps.min() < -0.02 < 0.02 < gaps.max():  # or a mean over all would be right
            confidence = torch.rand(n, dtype=torch.float64) / 2 + 0.499
            right = (torch.rand(n, dtype=torch.float64) < 0.6).double()
            gaps, shares = _gaps(confidence, right, bins)
        known = [
            ((confidence - right).abs().mean(), "average within a bin first, then take the gap"),
            ((confidence.mean() - right.mean()).abs(), "each bin has its own gap"),
            (gaps.abs().mean(), "a bin counts by the share of the answers in it"),
            ((shares * gaps).sum().abs(), "gaps of opposite sign must not cancel: |gap| a bin"),
            (gaps.abs().max(), "that is the largest gap; take the mean, weighted by shares"),
        ]
        expect(candidate(confidence, right, bins), _calibration_error(confidence, right, bins),
               "sum over bins of share * |mean confidence - share of right answers|",
               known=known, atol=1e-6)  # fmt: skip


def _gaps(confidence, right, bins):
    place = (confidence * bins).ceil().long() - 1
    used = place.unique()
    gaps = torch.stack([(confidence[place == b] - right[place == b]).mean() for b in used])
    return gaps, torch.stack([(place == b).double().mean() for b in used])


calibration_error = Exercise(
    reference=_calibration_error,
    test=_test_calibration_error,
    question="Which classifier has an error of zero and is of no use?",
    hint="The bin of a confidence is `(confidence * bins).ceil().long() - 1`; go through the bins.",
    minutes=12,
    difficulty="medium",
)


def _flipped_noise(x, noise, s, t):
    return t * ((s * x) @ noise.T)


def _test_flipped_noise(candidate) -> None:
    x, noise = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25], [3.0, 1.0]])
    s, t = torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, -1.0]])
    why = "signed noise is [[0.5, -0.25], [-3, 1]]; times x it is [0, -1]"
    expect(candidate(x, noise, s, t), torch.tensor([[0.0, -1.0]]), why, atol=1e-5)
    for _ in range(2):
        x, noise = torch.randn(5, 4), torch.randn(3, 4)
        s, t = torch.randint(2, (5, 4)) * 2.0 - 1, torch.randint(2, (5, 3)) * 2.0 - 1
        s[0], t[0], t[1] = torch.tensor([1.0, -1, 1, -1]), -1, 1
        known = [
            (x @ noise.T, "signs are missing: all rows would share one noise"),
            ((s * x) @ noise.T, "the outputs' signs t are missing"),
            (t * (x @ noise.T), "the inputs' signs s are missing"),
            ((x * s) @ noise.T + t, "multiply by the outputs' signs, don't add them"),
        ]
        why = "row n: (noise * outer(t_n, s_n)) @ x_n"
        expect(candidate(x, noise, s, t), _flipped_noise(x, noise, s, t), why,
               known=known, atol=1e-5)  # fmt: skip


flipped_noise = Exercise(
    reference=_flipped_noise,
    test=_test_flipped_noise,
    question="Each sign is +1 or -1 with equal odds. What is the mean of the noise over signs, and "
    "why would +1 and 0 not do?",
    hint="Signs of inputs can go to x before the product, those of outputs to what comes out.",
    minutes=12,
    difficulty="medium",
)
