"""Span corruption (T5, Raffel et al., 2020) and UL2's mixture of denoisers (Tay et al., 2022).

Lab 404. Spans of a text are taken away, and each leaves a mark of its own, a sentinel. The target
says what each stood for. A decoder reads both as one row, and its loss is taken on the target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lablib.data import Batches

Span = tuple[int, int]  # start, stop


class Denoiser(NamedTuple):
    """What a corruption takes away: a share of the text, in spans of this mean length.

    prefix: instead one span at the end, of the same share. mode: the id that a row begins with.
    """

    rate: float
    mean: float = 1.0
    prefix: bool = False
    mode: int = 0

    @property
    def name(self) -> str:
        """What it takes away, in words."""
        return f"{self.rate:.0%}, " + ("the end" if self.prefix else f"in spans of {self.mean:.0f}")


# Ids of bytes that no UTF-8 text holds, and of control characters that ours does not.
MODES = (0, 1, 2)  # UL2's [R], [X] and [S]
SENTINELS = (*range(0xF5, 0x100), 0xC0, 0xC1, 3, 4, 5, 6, 7, 8)
T5 = (Denoiser(0.15, 3.0),)
# UL2's seven, section 3.1: regular, extreme by share or by length, and sequential denoising. The
# numbers were not compared with the paper's own table, which was not at hand.
UL2 = (
    *(Denoiser(0.15, mean) for mean in (3.0, 8.0)),
    *(Denoiser(0.5, mean, mode=1) for mean in (3.0, 8.0, 64.0)),
    Denoiser(0.15, 64.0, mode=1),
    Denoiser(0.25, prefix=True, mode=2),
)


def draw_spans(length: int, denoiser: Denoiser, random: np.random.Generator) -> list[Span]:
    """Which spans of a text go: their lengths, and their places, are drawn evenly.

    round(length * rate) entries go, in round(that / mean) spans, at least one; at least one entry
    stays between two spans. In T5's own code a span always ends the text; here it may stand
    anywhere. Raises ValueError for a share that would leave nothing, or take nothing.
    """
    gone = round(length * denoiser.rate)
    if not 0 < gone < length:
        raise ValueError(f"a share of {denoiser.rate} takes {gone} of {length} entries")
    if denoiser.prefix:
        return [(length - gone, length)]
    kept = length - gone
    n = min(max(1, round(gone / denoiser.mean)), kept + 1)
    cuts = np.sort(random.choice(gone - 1, n - 1, replace=False)) + 1
    sizes = np.diff([0, *cuts, gone])  # (n,), each at least 1
    # kept entries before each span, no two alike; then the spans before it
    starts = np.sort(random.choice(kept + 1, n, replace=False)) + np.cumsum(sizes) - sizes
    return [(int(start), int(start + size)) for start, size in zip(starts, sizes)]


def corrupt(
    text: Sequence[int], spans: Sequence[Span], sentinels: Sequence[int] = SENTINELS
) -> tuple[list[int], list[int]]:
    """The text with a sentinel in the place of each span, and the target that tells them.

    The target is each sentinel with its span, and one more sentinel at the end. Raises ValueError
    when the sentinels are too few.
    """
    if len(spans) >= len(sentinels):
        raise ValueError(
            f"{len(spans)} spans need {len(spans) + 1} sentinels, not {len(sentinels)}"
        )
    given, target, at = [], [], 0
    for mark, (start, stop) in zip(sentinels, spans):
        given += [*text[at:start], mark]
        target += [mark, *text[start:stop]]
        at = stop
    return [*given, *text[at:]], [*target, sentinels[len(spans)]]


def restore(
    given: Sequence[int], target: Sequence[int], sentinels: Sequence[int] = SENTINELS
) -> list[int]:
    """The text that `corrupt` took apart."""
    told: dict[int, list[int]] = {}
    for entry in target:
        if entry in sentinels:
            told[entry] = spans = []
        else:
            spans.append(entry)
    return [entry for mark in given for entry in told.get(mark, [mark])]


class Denoising:
    """Rows for a decoder: a mode, the corrupted text, its target. Endless, as `Batches` is.

    batches: of rows of text, whose last entry is left out; each row gets one of the denoisers.
    Yields tokens (batch, width) int64 and where the target is (batch, width) bool, for
    `padded_next_token_loss`; width is that of the longest row, and zeros fill up the others.
    """

    def __init__(self, batches: Batches, denoisers: Sequence[Denoiser], seed: int = 0):
        self.batches, self.denoisers = batches, tuple(denoisers)
        self.random = np.random.default_rng(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        return self.rows(next(self.batches)[:, :-1])

    def rows(self, texts: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of some texts, (batch, length): tokens, and where the target is."""
        parts = [self.parts(text.tolist()) for text in texts]
        width = max(len(given) + len(target) for given, target in parts)
        tokens = torch.zeros(len(parts), width, dtype=torch.long)
        counted = torch.zeros(len(parts), width, dtype=torch.bool)
        for row, (given, target) in enumerate(parts):
            end = len(given) + len(target)
            tokens[row, :end] = torch.tensor([*given, *target])
            counted[row, len(given) : end] = True
        return tokens, counted

    def parts(self, text: Sequence[int]) -> tuple[list[int], list[int]]:
        """A mode and the corrupted text; the target."""
        denoiser = self.denoisers[self.random.integers(len(self.denoisers))]
        given, target = corrupt(text, draw_spans(len(text), denoiser, self.random))
        return [denoiser.mode, *given], target
