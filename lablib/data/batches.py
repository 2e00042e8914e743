"""Batches of packed tokens: deterministic under a seed, resumable in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Batches:
    """Rows of `length` + 1 tokens cut from one long array, in a new random order each epoch.

    tokens: (n,) integer array or tensor, documents packed end to end. Yields int64 tensors of
    shape (batch_size, length + 1) without end: inputs are [:, :-1], targets [:, 1:]. Rows overlap
    by the one token that is both a target and the next row's input. Each epoch the array is cut
    at another random offset. What follows depends on (seed, epoch, position) alone.
    Raises ValueError when the array is too short for one batch or holds no ids.
    """

    def __init__(self, tokens: Any, batch_size: int, length: int, seed: int = 0):
        self.tokens = _ids(tokens)
        _check_sizes(batch_size, length)
        self.batch_size, self.length, self.seed = batch_size, length, seed
        self.epoch = self.position = 0
        self.rows = (len(self.tokens) - 1) // length - 1
        if self.rows < batch_size:
            raise ValueError(
                f"{len(self.tokens)} tokens are too few for a batch of {batch_size} rows of "
                f"{length}: at least {(batch_size + 1) * length + 1} are needed"
            )
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in one pass over the array."""
        return self.rows // self.batch_size

    def _starts(self) -> np.ndarray:
        if self._order is None or self._order[0] != self.epoch:
            random = np.random.default_rng((self.seed, self.epoch))
            offset = random.integers(self.length)
            self._order = self.epoch, offset + self.length * random.permutation(self.rows)
        return self._order[1]

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        if self.position == self.batches_per_epoch:
            self.epoch, self.position = self.epoch + 1, 0
        first = self.position * self.batch_size
        starts = torch.from_numpy(self._starts()[first : first + self.batch_size])
        self.position += 1
        return self.tokens[starts[:, None] + torch.arange(self.length + 1)].long()

    def state_dict(self) -> dict[str, int]:
        """Where the iteration stands: seed, epoch and position in batches."""
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from where `state_dict` was taken."""
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self._order = None


def sequential(tokens: Any, batch_size: int, length: int) -> list[Tensor]:
    """Every full row of `tokens` once, in order: what a held-out loss is computed on.

    tokens: (n,) integers. Returns int64 tensors (up to batch_size, length + 1); none when n is
    below length + 1. Raises ValueError for what is no id and for sizes below 1.
    """
    tokens = _ids(tokens).long()
    _check_sizes(batch_size, length)
    if len(tokens) <= length:
        return []
    table = tokens.unfold(0, length + 1, length)  # (rows, length + 1), each begins where one ends
    return list(table.split(batch_size))


def _ids(tokens: Any) -> Tensor:
    """(n,) token ids as a tensor of integers."""
    tokens = torch.as_tensor(np.asarray(tokens))
    if tokens.ndim != 1:
        raise ValueError(f"tokens are one long row of ids, not of shape {tuple(tokens.shape)}")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        if len(tokens):
            raise ValueError(f"tokens are integers, not {str(tokens.dtype).removeprefix('torch.')}")
    elif len(tokens) and tokens.min() < 0:
        raise ValueError(f"token {tokens.min().item()} is negative: ids count from 0")
    return tokens


def _check_sizes(batch_size: int, length: int) -> None:
    if batch_size < 1 or length < 1:
        raise ValueError(f"batch_size {batch_size} and length {length} must be 1 or more")
