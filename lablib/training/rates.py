"""A schedule of one's own, where none of `fit`'s fits."""

from collections.abc import Callable

from lightning import Callback


class OwnSchedule(Callback):
    """Sets the learning rate before each step, in the place of `fit`'s schedule.

    factor: steps done -> share of the optimizer's own rate. Give it to `fit(..., callbacks=[...])`.
    """

    def __init__(self, factor: Callable[[int], float]):
        self.factor = factor

    def on_train_batch_start(self, trainer, module, batch, batch_index):
        share = self.factor(trainer.global_step)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * share
