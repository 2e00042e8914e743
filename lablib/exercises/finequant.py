"""Exercises of lab 806."""

import math

import numpy as np

from lablib.exercises import Exercise, expect


def _asymmetric(w: np.ndarray, bits: int) -> np.ndarray:
    low, high = w.min(), w.max()
    scale = (high - low) / (2**bits - 1)
    codes = np.round((w - low) / scale)
    return low + scale * codes


def _test_asymmetric(candidate) -> None:
    why = "levels at 0, 1, 2 and 3: two bits, from the smallest weight to the largest"
    expect(candidate(np.array([0.0, 0.9, 2.2, 3.0]), 2), np.array([0.0, 1.0, 2.0, 3.0]), why)
    random = np.random.default_rng()
    w, bits = random.normal(size=12) + 0.7, int(random.integers(2, 6))
    right = _asymmetric(w, bits)
    low, span = w.min(), w.max() - w.min()
    most = 2 ** (bits - 1) - 1
    scale = np.abs(w).max() / most
    step = span / 2**bits
    known = [
        (scale * np.round(w / scale), "these levels lie around 0; they should span min to max"),
        (low + step * np.round((w - low) / step), "2^b levels have 2^b - 1 steps between them"),
        (
            np.round((w - low) / (span / (2**bits - 1))),
            "these are codes: take them back to weights",
        ),
    ]
    why = "codes are whole numbers above the smallest weight"
    expect(candidate(w.copy(), bits), right, why, known=known)


asymmetric = Exercise(
    reference=_asymmetric,
    test=_test_asymmetric,
    question="A weight of exactly 0: does it stay 0? When would that matter?",
    hint="`(w - w.min()) / scale`, rounded, are the codes. How many steps are between 2^b levels?",
    minutes=8,
    difficulty="easy",
)


def _pack(codes: np.ndarray) -> np.ndarray:
    half = len(codes) // 2
    return codes[:half] | (codes[half:] << 4)


def _test_pack(candidate) -> None:
    why = "the first half lies in the low four bits: 1 + 16 * 3 and 2 + 16 * 4"
    right = np.array([49, 66], dtype=np.uint8)
    expect(candidate(np.array([1, 2, 3, 4], dtype=np.uint8)), right, why)
    random = np.random.default_rng()
    codes = random.integers(0, 16, 2 * int(random.integers(3, 9))).astype(np.uint8)
    codes[:2], codes[-2:] = (1, 2), (14, 15)
    half = len(codes) // 2
    known = [
        (
            codes[::2] | (codes[1::2] << 4),
            "neighbours share a byte here; code j should meet j + n/2",
        ),
        ((codes[:half] << 4) | codes[half:], "the first half should lie in the low four bits"),
    ]
    expect(candidate(codes.copy()), _pack(codes), "low | high << 4", known=known)


pack = Exercise(
    reference=_pack,
    test=_test_pack,
    question="Three bits: what do you do with the codes that don't fill a byte?",
    hint="`<< 4` moves a code to the high four bits; `|` puts both into one byte.",
    minutes=6,
    difficulty="easy",
)


def _footprint(weights: float, bits: int, group: int, zeros: bool) -> tuple[float, int]:
    each = bits + (32 if zeros else 16) / group
    return each, math.ceil(weights * each / 8 / 80e9)


def _test_footprint(candidate) -> None:
    why = "a 16-bit scale for 64 weights is a quarter of a bit for each"
    expect(candidate(175e9, 4, 64, False), (4.25, 2), why)
    expect(candidate(175e9, 16, 10**9, False), (16 + 1.6e-8, 5), "175e9 weights of two bytes")
    random = np.random.default_rng()
    group = int(random.choice([37, 48, 56, 72, 96, 144]))  # 32 / group has many decimals
    weights = float(random.integers(200, 900)) * 1e9
    right = _footprint(weights, 3, group, True)
    known = [
        (
            _footprint(weights, 3, group, False),
            "a zero is stored beside each scale, in 16 bits, too",
        ),
        ((right[0], math.ceil(weights * right[0] / 80e9)), "eight bits are a byte"),
        ((right[0], int(weights * right[0] / 8 / 80e9)), "what doesn't fit needs one GPU more"),
        ((3.0, math.ceil(weights * 3 / 8 / 80e9)), "scales and zeros are stored as well"),
    ]
    expect(
        candidate(weights, 3, group, True), right, "bits + what a group stores / group", known=known
    )


footprint = Exercise(
    reference=_footprint,
    test=_test_footprint,
    question="What else must lie in a GPU's memory when the model writes text?",
    hint="A group stores 16 bits for its scale; as many again for its zero, where there is one.",
    minutes=8,
    difficulty="medium",
)
