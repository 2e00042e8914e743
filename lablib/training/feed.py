"""Batches one after the other, and how to come back to one of them exactly."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, sampler

from lablib.training.losses import n_tokens
from lablib.training.state import random_state, set_random_state

_SAMPLERS = (
    sampler.BatchSampler,
    sampler.RandomSampler,
    sampler.SequentialSampler,
    sampler.SubsetRandomSampler,
    sampler.WeightedRandomSampler,
)


class Feed:
    """Batches one after the other, begun again when they end, up to a known number.

    Its length is known, so Lightning fetches none ahead: the data's own state is then always that
    after the last batch used, which an exact resume needs.
    resumable: refuse data that could not be resumed exactly.
    """

    def __init__(self, data: Any, total: int, resumable: bool = False):
        self.data, self.total, self.used, self.tokens = data, total, 0, 0
        self.source: Iterator = iter(())
        self.epoch: dict = {"drawn": 0, "random": None}
        self.watched = False
        if resumable and not hasattr(data, "state_dict"):
            refuse_inexact(data)
            self.watched = not isinstance(data, (list, tuple, DataLoader))

    def __len__(self) -> int:
        return self.total - self.used

    def __iter__(self) -> Iterator:
        for _ in range(len(self)):
            batch = self.draw()
            self.used += 1
            self.tokens += n_tokens(batch)
            yield batch

    def draw(self) -> Any:
        """The next batch of the data."""
        before = random_state() if self.watched else None
        for _ in range(2):
            for batch in self.source:
                self.epoch["drawn"] += 1
                if before is not None and before != random_state():
                    raise ValueError(
                        f"{type(self.data).__name__} draws from a global random generator and has "
                        "no state_dict, so no checkpoint could resume it exactly: give it one, or "
                        "use a DataLoader"
                    )
                return batch
            self._begin()
        raise ValueError(f"the data gave no more batches after {self.used} of {self.total}")

    def _begin(self) -> None:
        shuffled = isinstance(self.data, DataLoader)
        random = {"global": random_state(), "own": _own_states(self.data)} if shuffled else None
        self.epoch = {"drawn": 0, "random": random}
        self.source = iter(self.data)

    def state(self) -> dict:
        """Where the feed stands: the data's own state, or how to draw up to there again."""
        own = self.data.state_dict() if hasattr(self.data, "state_dict") else None
        return {"used": self.used, "data": own, "epoch": self.epoch}

    def rewind(self, state: dict) -> None:
        """Go on from `state`. Changes the global random generators, which the caller sets next.

        A DataLoader's order follows from the generators at its epoch's start, so that epoch is
        drawn again; another iterable is drawn again from its beginning.
        """
        random = state["epoch"]["random"]
        if state["data"] is not None:
            self.data.load_state_dict(state["data"])
        elif random is not None:
            set_random_state(random["global"])
            for generator, kept in zip(_own_generators(self.data), random["own"]):
                generator.set_state(kept)
            self._begin()
            for _ in range(state["epoch"]["drawn"]):
                next(self.source)
            self.epoch["drawn"] = state["epoch"]["drawn"]
        else:
            for _ in range(state["used"]):
                self.draw()
        self.used = state["used"]


def _own_generators(loader: DataLoader) -> list[torch.Generator]:
    owners = (loader, loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return [generator for generator in dict.fromkeys(found) if generator is not None]


def _own_states(loader: DataLoader) -> list[torch.Tensor]:
    return [generator.get_state() for generator in _own_generators(loader)]


def refuse_inexact(data: Any) -> None:
    """Raise ValueError for a DataLoader whose order can't be had again from random states."""
    if not isinstance(data, DataLoader):
        return
    way_out = (
        "give a loader with state_dict (torchdata's StatefulDataLoader, Batches), or no folder"
    )
    if isinstance(data.dataset, IterableDataset):
        raise ValueError(f"a DataLoader of an IterableDataset can't be resumed exactly: {way_out}")
    parts = (data.batch_sampler, data.sampler, getattr(data.batch_sampler, "sampler", None))
    for part in parts:
        if part is not None and type(part) not in _SAMPLERS:
            raise ValueError(f"{type(part).__name__} can't be resumed exactly: {way_out}")


def describe(data: Any) -> dict[str, str]:
    """What data say of themselves, as text: batch size, length, number of rows, seed."""
    names = {"batch_size": "batch size", "length": "length", "rows": "rows", "seed": "data's seed"}
    values = {text: getattr(data, name, None) for name, text in names.items()}
    return {text: str(value) for text, value in values.items() if isinstance(value, int)}
