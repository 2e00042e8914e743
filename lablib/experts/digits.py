"""Handwritten digits as short rows of tokens: the second kind of data of lab 310.

1,797 images of 8 x 8 pixels, 0 to 16, test part of "Optical Recognition of Handwritten Digits"
(Alpaydin and Kaynak, UCI, 1998; CC BY 4.0): the corpus "digits" of `lablib.data`.
An image is cut into 16 patches of 2 x 2 pixels, each named by the nearest of a codebook's patches:
the simplest form of what image tokenizers do.
"""

from __future__ import annotations

import numpy as np

from lablib.data import load

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIDE, PATCH = 8, 2


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) float64 from 0 to 1, and labels (1797,) int64.

    Fetched first when set-up has not; raises DataError when that can't be done.
    """
    rows = np.array([[int(value) for value in row.text.split(",")] for row in load("digits")])
    return rows[:, :-1].reshape(-1, SIDE, SIDE) / 16.0, rows[:, -1]


def patches(images: np.ndarray) -> np.ndarray:
    """Images (n, 8, 8) -> patches in reading order (n, 16, 4)."""
    n, per_row = len(images), SIDE // PATCH
    cut = images.reshape(n, per_row, PATCH, per_row, PATCH).transpose(0, 1, 3, 2, 4)
    return cut.reshape(n, per_row**2, PATCH**2)


def pictures(rows: np.ndarray) -> np.ndarray:
    """What `patches` cut, put together again: (n, 16, 4) -> (n, 8, 8)."""
    n, per_row = len(rows), SIDE // PATCH
    back = rows.reshape(n, per_row, per_row, PATCH, PATCH).transpose(0, 1, 3, 2, 4)
    return back.reshape(n, SIDE, SIDE)


def codebook(images: np.ndarray, size: int = 64, rounds: int = 20, seed: int = 0) -> np.ndarray:
    """Patches that stand for all others, by k-means: (size, 4)."""
    rows = patches(images).reshape(-1, PATCH**2)
    codes = np.unique(rows, axis=0)
    codes = codes[np.random.default_rng(seed).permutation(len(codes))[:size]]
    for _ in range(rounds):
        near = nearest(rows, codes)
        for code in range(size):
            if (near == code).any():
                codes[code] = rows[near == code].mean(0)
    return codes


def nearest(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """The number of the nearest code to each row: (..., 4) and (size, 4) -> (...) int64."""
    apart = (codes**2).sum(1) - 2 * rows @ codes.T  # (..., size)
    return apart.argmin(-1)


def recognizer(images: np.ndarray, labels: np.ndarray):
    """A classifier that has never seen the model: images (n, 8, 8) -> labels (n,).

    The label of most of the 5 nearest training images.
    """
    known = images.reshape(len(images), -1)

    def recognize(others: np.ndarray) -> np.ndarray:
        near = nearest_rows(others.reshape(len(others), -1), known, 5)
        return np.array([np.bincount(row, minlength=10).argmax() for row in labels[near]])

    return recognize


def nearest_rows(rows: np.ndarray, known: np.ndarray, count: int) -> np.ndarray:
    """The places of the `count` nearest known rows: (n, count) int64."""
    apart = (known**2).sum(1) - 2 * rows @ known.T
    return apart.argsort(1, kind="stable")[:, :count]
