"""Exercises of lab 807."""

import math

import numpy as np
import torch

from lablib.exercises import Exercise, expect


def _impacts(gradients):
    return gradients.square().mean(0)


def _test_impacts(candidate) -> None:
    by_hand = torch.tensor([[[2.0, 0.3]], [[-2.0, 0.3]], [[1.0, 0.4]]])
    why = "(4 + 4 + 1) / 3 is 3 for the first weight, though its gradients nearly cancel out"
    expect(candidate(by_hand), _impacts(by_hand), why)
    gradients = torch.randn(8, 5, 3)
    batches = gradients.unflatten(0, (2, 4)).mean(1)
    known = [
        (gradients.mean(0).square(), "at a minimum the mean is 0: square before you average"),
        (batches.square().mean(0), "texts of one batch cancel out: square each text's gradient"),
        (gradients.square().sum(0), "more texts would mean more impact: take the mean"),
        (gradients.abs().mean(0), "the second order needs squares, not absolute values"),
        (gradients.var(0), "a variance takes the mean off first"),
    ]
    expect(
        candidate(gradients), _impacts(gradients), "square, then average over texts", known=known
    )


impacts = Exercise(
    reference=_impacts,
    test=_test_impacts,
    question="With batches of four texts, by what factor would impacts shrink if texts had nothing "
    "in common?",
    hint="One number a weight is left: the axis of texts goes.",
    minutes=8,
    difficulty="easy",
)


def _bits(size, kept, bits, group):
    codes, whole = bits * (size - kept), (16 + 16) * kept
    return (codes + whole + 16 * math.ceil(size / group)) / size


def _test_bits(candidate) -> None:
    why = (
        "of 256 weights one is kept, at 16 bits and 16 for its place; 255 take 3 bits each; "
        "2 groups of 128 have steps of 16 bits: (32 + 765 + 32) / 256"
    )
    expect(candidate(256, 1, 3, 128), (32 + 765 + 32) / 256, why)
    size, kept, bits = (int(np.random.randint(*ends)) for ends in ((300, 900), (2, 40), (2, 5)))
    group = int(np.random.choice([32, 64, 128]))
    steps = math.ceil(size / group)
    known = [
        ((bits * size + 32 * kept + 16 * steps) / size, "a kept weight has no code"),
        ((bits * (size - kept) + 16 * kept + 16 * steps) / size, "where are the kept ones? Their "
         "places take 16 bits each, too"),
        ((bits * (size - kept) + 32 * kept) / size, "each group's step takes 16 bits"),
        ((bits * (size - kept) + 32 * kept + 16 * size / group) / size, "a row's last group may be "
         "short, but its step is as long as the others'"),
    ]  # fmt: skip
    expect(candidate(size, kept, bits, group), _bits(size, kept, bits, group), why, known=known)


bits = Exercise(
    reference=_bits,
    test=_test_bits,
    question="At how many kept weights is it cheaper to give every weight one more bit?",
    hint="Add up one row: codes, kept weights and their places, steps. Then divide.",
    minutes=10,
    difficulty="easy",
)


def _weight_gradient(x, upstream, kept):
    return upstream.t() @ x


def _test_weight_gradient(candidate) -> None:
    x, upstream = (
        torch.tensor([[1.0, 2.0]]),
        torch.tensor(
            [
                [3.0],
            ]
        )
        * torch.ones(1, 2),
    )
    kept = torch.tensor([[True, False], [False, False]])
    why = "dL/dw_ij is upstream_i x_j for kept and rounded weights alike: 3 times 1, 3 times 2"
    expect(candidate(x, upstream, kept), _weight_gradient(x, upstream, kept), why)
    x, upstream = torch.randn(7, 3), torch.randn(7, 3)
    kept = torch.rand(3, 3) < 0.3
    kept[0, 0], kept[0, 1] = True, False
    right = _weight_gradient(x, upstream, kept)
    known = [
        (right * kept, "the rest would never learn: rounding is passed as if it were not there"),
        (torch.zeros_like(right), "that is rounding's true slope, and nothing would learn"),
        (right * ~kept, "kept weights learn as well"),
        (right.t(), "rows are outputs: (out, in)"),
        (right / len(x), "upstream already holds the mean over tokens"),
    ]
    expect(candidate(x, upstream, kept), right, why, known=known, atol=1e-5)


weight_gradient = Exercise(
    reference=_weight_gradient,
    test=_test_weight_gradient,
    question="A weight in the middle between two levels is pushed to and fro. What does the layer "
    "compute with meanwhile?",
    hint="y = x W^T, so forget the rounding and differentiate that.",
    minutes=12,
    difficulty="medium",
)
