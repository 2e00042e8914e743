"""Exponential averages of the weights during training, and the loss that they would have.

Averaged weights at a constant rate stand in for a rate that has decayed, at every step at once.
Source: Zhang et al. (2024), "How Does Critical Batch Size Scale in Pre-training?", section 2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from lightning import Callback
from torch import Tensor, nn

from lablib.training.losses import evaluate


class WeightAverages(Callback):
    """Several averages of one training's weights: average <- decay average + (1 - decay) weights.

    decays: one an average, each in [0, 1); they begin as the weights after the first step.
    held_out, every: on which batches, and after how many steps, the averaged weights are evaluated.
    Give it to `fit(..., callbacks=[...])`. `curves` are then [(step, loss), ...], one a decay.
    Raises ValueError for a decay outside [0, 1).
    """

    def __init__(self, decays: Sequence[float], held_out: Iterable, every: int):
        for decay in decays:
            if not 0 <= decay < 1:
                raise ValueError(f"a decay of {decay} is not in [0, 1)")
        self.decays, self.held_out, self.every = tuple(decays), held_out, every
        self.averages: list[list[Tensor]] = []
        self.curves: list[list[tuple[int, float]]] = [[] for _ in decays]
        self.done = 0

    @torch.no_grad()
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        if trainer.global_step == self.done:
            return  # a batch of an accumulated step
        self.done = trainer.global_step
        weights = list(module.model.parameters())
        if not self.averages:
            self.averages = [[w.clone() for w in weights] for _ in self.decays]
        for average, decay in zip(self.averages, self.decays):
            torch._foreach_lerp_(average, weights, 1 - decay)
        if self.done % self.every == 0:
            self.evaluate(module.model)

    def evaluate(self, model: nn.Module) -> None:
        """Add each average's held-out loss to its curve."""
        for average, curve in zip(self.averages, self.curves):
            with swapped(model, average):
                curve.append((self.done, evaluate(model, self.held_out)))


@contextlib.contextmanager
def swapped(model: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """The model with other weights, in the order of `parameters()`; its own come back."""
    own = [parameter.data for parameter in model.parameters()]
    try:
        for parameter, other in zip(model.parameters(), weights):
            parameter.data = other
        yield
    finally:
        for parameter, weight in zip(model.parameters(), own):
            parameter.data = weight
