"""Dropout that begins in the middle of a training (Xue et al., 2023, section 4)."""

from __future__ import annotations

from lightning import Callback

from lablib.scaling.token_crisis import Noise


class SwitchedOn(Callback):
    """Sets a noise to p before each step from `step` on; the first step is step 0.

    noise: as `noisy_` gives it, for p = 0. Give it to `fit(..., callbacks=[...])`.
    """

    def __init__(self, noise: Noise, p: float, step: int):
        self.noise, self.p, self.step = noise, p, step

    def on_train_batch_start(self, trainer, module, batch, batch_index):
        if trainer.global_step >= self.step:
            self.noise.p = self.p
